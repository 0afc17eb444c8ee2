"""The numba half of ``numba_cpu``: imported only where the kernel is used."""

import math

import numba
import numpy as np

from jaxpaged.pallas_kernels.numba_ffi import (
    float32_pointer,
    int32_pointer,
    operand,
    operand_dim,
    prefetch,
    result,
    uint8_pointer,
)
from jaxpaged.pallas_kernels.paged_attention.numba_codes import (
    decode_fp8,
    decode_int4,
    decode_int8,
    multiply,
)
from jaxpaged.pallas_kernels.paged_attention.numba_cpu import KINDS
from jaxpaged.pallas_kernels.paged_attention.numba_vector import (
    LANES,
    add_values,
    exp_sum,
    max_of,
    score_keys,
)

TILE_Q = 8  # query tokens that share one read of a key block
CHUNK = 256  # keys of one online-softmax step
_CACHE_LINE = 64

_FP8, _INT8 = KINDS["fp8_e4m3"], KINDS["int8"]
_MASKED = np.float32(-1e30)
_ZERO, _ONE = np.float32(0), np.float32(1)

# Reassociation lets LLVM vectorise sums; NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract", "nsz", "arcp"}
_jit = numba.njit(fastmath=_FAST, error_model="numpy", boundscheck=False, cache=True)


@_jit
def _scratch(size):  # type: ignore[no-untyped-def]
    """``size`` float32 from the start of a cache line: vectors that lie in two lines load at half the speed."""
    memory = np.empty(size + LANES, np.float32)
    skip = -np.int64(memory.ctypes.data) % _CACHE_LINE // memory.itemsize
    return memory[skip : skip + size]


@_jit
def _score_block(q, head, group, k, block, kv_head, scores, line, column, hi, scale):  # type: ignore[no-untyped-def]
    """Scores of the first ``hi`` slots of a block against heads ``head:`` of every query of ``q`` ``[Q, Hq, D]``.

    They go to ``scores[line + i * G + g, column:]`` for query ``i`` and head ``g`` of the group.
    """
    num_q, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k.shape[1], k.shape[2]
    if head_dim % LANES == 0 and block_size % LANES == 0:
        tile = (block * num_kv_heads + kv_head) * block_size * head_dim
        for i in range(num_q):
            for g in range(group):
                query_at = (i * num_heads + head + g) * head_dim
                scores_at = (line + i * group + g) * scores.shape[1] + column
                # Slots past ``hi`` are scored as well: nobody looks at the result.
                for s in range(0, hi, LANES):
                    score_keys(q, query_at, k, tile + s * head_dim, scores, scores_at + s, head_dim, scale)
        return
    for i in range(num_q):
        for g in range(group):
            query, scored = q[i, head + g], scores[line + i * group + g]
            for s in range(hi):
                key = k[block, kv_head, s]
                total = _ZERO
                for d in range(head_dim):
                    total += query[d] * key[d]
                scored[column + s] = total * scale


@_jit
def _add_block(acc, scores, line, count, column, v, block, kv_head, lo, hi):  # type: ignore[no-untyped-def]
    """``acc[n] += scores[n, column + lo : column + hi] @ v[block, kv_head, lo:hi]`` for ``count`` lines ``n``."""
    num_kv_heads, block_size, head_dim = v.shape[1], v.shape[2], v.shape[3]
    if head_dim % LANES == 0:
        values_at = ((block * num_kv_heads + kv_head) * block_size + lo) * head_dim
        for n in range(line, line + count):
            weights_at = n * scores.shape[1] + column + lo
            add_values(acc, n * head_dim, scores, weights_at, v, values_at, hi - lo, head_dim)
        return
    for n in range(line, line + count):
        for s in range(lo, hi):
            weight, value = scores[n, column + s], v[block, kv_head, s]
            for d in range(head_dim):
                acc[n, d] += weight * value[d]


@_jit
def _decode(tile, codes, kind, block, kv_head, lo, hi):  # type: ignore[no-untyped-def]
    """Codes of slots ``lo:hi`` of a block and head, as numbers, to the same slots of ``tile`` ``[1, 1, S, D]``."""
    width, head_dim = codes.shape[3], tile.shape[3]
    at = ((block * codes.shape[1] + kv_head) * codes.shape[2] + lo) * width
    if kind == _FP8:
        decode_fp8(tile, lo * head_dim, codes, at, (hi - lo) * width)
    elif kind == _INT8:
        decode_int8(tile, lo * head_dim, codes, at, (hi - lo) * width)
    else:
        for s in range(hi - lo):
            decode_int4(tile, (lo + s) * head_dim, codes, at + s * width, width)


@_jit
def _multiply(scores, line, count, column, scales, block, kv_head, lo, hi):  # type: ignore[no-untyped-def]
    """``scores[n, column + lo : column + hi] *= scales[block, kv_head, lo:hi]`` for ``count`` lines ``n``."""
    at = (block * scales.shape[1] + kv_head) * scales.shape[2] + lo
    for n in range(line, line + count):
        multiply(scores, n * scores.shape[1] + column + lo, scales, at, hi - lo)


@_jit
def _score_codes(q, head, group, k, k_scale, kind, tile, block, kv_head, scores, line, column, hi, scale):  # type: ignore[no-untyped-def]
    """``_score_block`` where the keys are codes: ``q . (s c) = s (q . c)``."""
    _decode(tile, k, kind, block, kv_head, 0, hi)
    _score_block(q, head, group, tile, 0, 0, scores, line, column, hi, scale)
    _multiply(scores, line, q.shape[0] * group, column, k_scale, block, kv_head, 0, hi)


@_jit
def _prefetch_tile(pool, scales, block, kv_head):  # type: ignore[no-untyped-def]
    size = pool.shape[2] * pool.shape[3]
    at = (block * pool.shape[1] + kv_head) * size
    if scales is None:
        for line in range(0, size, LANES):
            prefetch(pool, at + line)
        return
    for line in range(0, size, _CACHE_LINE):
        prefetch(pool, at + line)
    at = (block * scales.shape[1] + kv_head) * scales.shape[2]
    for line in range(0, scales.shape[2], LANES):
        prefetch(scales, at + line)


@_jit
def _softmax_step(scores, n, top, total, acc, lo, hi):  # type: ignore[no-untyped-def]
    """Turns ``scores[n, lo:hi]`` into weights against the new maximum; decays what was accumulated."""
    at = n * scores.shape[1]
    new_top = max_of(scores, at, lo, hi, top[n])
    if new_top > top[n]:
        decay = np.float32(math.exp(top[n] - new_top))
        total[n] *= decay
        line = acc[n]
        for d in range(len(line)):
            line[d] *= decay
    top[n] = new_top
    total[n] += exp_sum(scores, at, lo, hi, new_top)


@_jit
def _cap(scores, lo, hi, cap):  # type: ignore[no-untyped-def]
    for j in range(lo, hi):
        scores[j] = cap * np.float32(math.tanh(scores[j] / cap))


@_jit
def _attend_tile(  # type: ignore[no-untyped-def]
    q, k, v, k_scale, v_scale, tile, table, acc, top, total, scores, positions, geometry, scale, cap
):
    """All keys of one tile of queries of one row.

    Args: ``q`` ``[Q, Hq, D]``; pools ``[L*N, Hkv, S, D]``, or bytes with scales ``[L*N, Hkv, S]`` and scratch ``tile``
    ``[1, 1, S, D]``; the row's ``table``; per (kv head, query, head of the group) in this order ``acc`` ``[n, D]``,
    ``top`` ``[n]`` and ``total`` ``[n]``, initialised; scratch ``scores`` ``[n, CHUNK]``; ``positions`` of the
    queries; geometry: a tuple of integers.
    """
    layer_base, window, head0, heads, group, kind = geometry
    num_q, block_size = q.shape[0], k.shape[2]
    per_head = num_q * group
    start = max(0, positions[0] - window + 1) if window > 0 else 0
    chunk = max(1, CHUNK // block_size) * block_size
    for base in range(start // chunk * chunk, positions[num_q - 1] + 1, chunk):
        end = min(base + chunk, positions[num_q - 1] + 1)
        first_block, end_block = max(base, start) // block_size, (end - 1) // block_size + 1
        for b in range(first_block, end_block):
            block = layer_base + table[b]
            for h in range(heads):
                if b + 1 < end_block:
                    _prefetch_tile(k, k_scale, layer_base + table[b + 1], head0 + h)
                else:
                    _prefetch_tile(v, v_scale, layer_base + table[first_block], head0 + h)
                hi = min(block_size, end - b * block_size)
                head, line, column = head0 + h, h * per_head, b * block_size - base
                if k_scale is None:
                    _score_block(q, head * group, group, k, block, head, scores, line, column, hi, scale)
                else:
                    _score_codes(
                        q, head * group, group, k, k_scale, kind, tile, block, head, scores, line, column, hi, scale
                    )  # fmt: skip
        for i in range(num_q):
            hi = min(end, positions[i] + 1) - base
            lo = max(max(base, start), positions[i] + 1 - window) - base if window > 0 else 0
            if hi <= lo:
                continue
            for h in range(heads):
                for n in range(h * per_head + i * group, h * per_head + (i + 1) * group):
                    if cap > 0:
                        _cap(scores[n], lo, hi, cap)
                    _softmax_step(scores, n, top, total, acc, lo, hi)
        for b in range(first_block, end_block):
            block, column = layer_base + table[b], b * block_size - base
            for h in range(heads):
                if b + 1 < end_block:
                    _prefetch_tile(v, v_scale, layer_base + table[b + 1], head0 + h)
                if v_scale is not None:
                    # What any query of the tile sees.
                    lo, hi = max(0, start - b * block_size), min(block_size, end - b * block_size)
                    _decode(tile, v, kind, block, head0 + h, lo, hi)
                for i in range(num_q):
                    hi = min(block_size, positions[i] + 1 - b * block_size)
                    lo = max(0, positions[i] + 1 - window - b * block_size) if window > 0 else 0
                    if hi <= lo:
                        continue  # the block lies after this query, or before its window
                    line = h * per_head + i * group
                    if v_scale is None:
                        _add_block(acc, scores, line, group, column, v, block, head0 + h, lo, hi)
                    else:
                        _multiply(scores, line, group, column, v_scale, block, head0 + h, lo, hi)
                        _add_block(acc, scores, line, group, column, tile, 0, 0, lo, hi)


@_jit
def _attend_rows(  # type: ignore[no-untyped-def]
    q, k, v, k_scale, v_scale, tile, tables, starts, positions, sinks, out, geometry, scale, cap
):
    """Every tile of every row; ``out`` is ``[T, heads of this part * G, D]``."""
    _, _, head0, heads, group, _ = geometry
    head_dim = q.shape[2]
    rows = TILE_Q * heads * group
    width = -(-max(CHUNK, k.shape[2]) // LANES) * LANES
    acc = _scratch(rows * head_dim).reshape((rows, head_dim))
    top, total = np.empty(rows, np.float32), np.empty(rows, np.float32)
    scores = _scratch(rows * width).reshape((rows, width))
    for row in range(len(starts) - 1):
        for first in range(starts[row], starts[row + 1], TILE_Q):
            num_q = min(TILE_Q, starts[row + 1] - first)
            per_head = num_q * group
            acc[: heads * per_head] = _ZERO
            for n in range(heads * per_head):
                head = (head0 + n // per_head) * group + n % group
                top[n] = sinks[head] if len(sinks) > 0 else _MASKED
                total[n] = _ONE if len(sinks) > 0 else _ZERO
            _attend_tile(
                q[first : first + num_q], k, v, k_scale, v_scale, tile, tables[row], acc, top, total, scores,
                positions[first : first + num_q], geometry, scale, cap,
            )  # fmt: skip
            for n in range(heads * per_head):
                line = out[first + n % per_head // group, n // per_head * group + n % group]
                inverse = _ONE / max(total[n], np.float32(1e-30))
                for d in range(head_dim):
                    line[d] = acc[n, d] * inverse
    out[starts[len(starts) - 1] :] = _ZERO


@_jit
def _attend_frame(frame, k, v, k_scale, v_scale, tile):  # type: ignore[no-untyped-def]
    """The operands that are the same for all pools."""
    num_tokens, num_heads, head_dim = (
        operand_dim(frame, 0, 0),
        operand_dim(frame, 0, 1),
        operand_dim(frame, 0, 2),
    )
    num_rows, width = operand_dim(frame, 3, 0), operand_dim(frame, 3, 1)
    q = numba.carray(float32_pointer(operand(frame, 0)), (num_tokens, num_heads, head_dim))
    tables = numba.carray(int32_pointer(operand(frame, 3)), (num_rows, width))
    starts = numba.carray(int32_pointer(operand(frame, 4)), (num_rows + 1,))
    positions = numba.carray(int32_pointer(operand(frame, 5)), (num_tokens,))
    ints = numba.carray(int32_pointer(operand(frame, 6)), (5,))
    floats = numba.carray(float32_pointer(operand(frame, 7)), (2,))
    sinks = numba.carray(float32_pointer(operand(frame, 8)), (operand_dim(frame, 8, 0),))
    base, window, head0, heads, kind = ints[0], ints[1], ints[2], ints[3], ints[4]
    group = num_heads // k.shape[1]
    out = numba.carray(float32_pointer(result(frame, 0)), (num_tokens, heads * group, head_dim))
    geometry = (np.int64(base), np.int64(window), np.int64(head0), np.int64(heads), group, np.int64(kind))
    _attend_rows(
        q, k, v, k_scale, v_scale, tile, tables, starts, positions, sinks, out, geometry, floats[0], floats[1]
    )


@_jit
def _pool_shape(frame):  # type: ignore[no-untyped-def]
    return (
        operand_dim(frame, 1, 0),
        operand_dim(frame, 1, 1),
        operand_dim(frame, 1, 2),
        operand_dim(frame, 1, 3),
    )


@_jit
def paged_attention_frame(frame):  # type: ignore[no-untyped-def]
    """FFI entry: operands q, k, v, block_tables, query_start_loc, positions, ints, floats, sinks; one result."""
    shape = _pool_shape(frame)
    k = numba.carray(float32_pointer(operand(frame, 1)), shape)
    v = numba.carray(float32_pointer(operand(frame, 2)), shape)
    _attend_frame(frame, k, v, None, None, None)


@_jit
def quantised_attention_frame(frame):  # type: ignore[no-untyped-def]
    """FFI entry over a pool of codes: operands as above, then k_scale and v_scale."""
    shape = _pool_shape(frame)
    k = numba.carray(uint8_pointer(operand(frame, 1)), shape)
    v = numba.carray(uint8_pointer(operand(frame, 2)), shape)
    k_scale = numba.carray(float32_pointer(operand(frame, 9)), shape[:3])
    v_scale = numba.carray(float32_pointer(operand(frame, 10)), shape[:3])
    head_dim = operand_dim(frame, 0, 2)
    tile = _scratch(shape[2] * head_dim).reshape((1, 1, shape[2], head_dim))
    _attend_frame(frame, k, v, k_scale, v_scale, tile)
