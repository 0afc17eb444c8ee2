"""Cache scatter into quantised pools as a Mosaic GPU kernel: codes and scales of K and V, one launch a layer.

Grid: ``(head groups, token groups)``, as for pools that are not quantised (``mosaic_gpu``): a thread block is one
warpgroup and takes the heads of its group for its tokens, one token where there are few of them.

Registers: a token's tile ``[heads, D]`` of K, one of V, for each token of the block. All are loaded before any is
worked on (the compiler puts the first token's loads behind that of its slot, and skips them for padding). A warp holds
whole vectors, each in as few lanes as give every lane 16 bytes (of D=128 in bfloat16: 16 lanes, two heads to a warp,
eight to the block), so that the largest element is found by shuffles inside the warp, without shared memory or barrier.
An int4 pool's tile is loaded as two halves ``[heads, D/2]`` in one layout: the two elements of a byte are then in one
lane, and packing is arithmetic between registers.

Memory layout: codes become rows of ``D`` (int4: ``D/2``) bytes, ``S`` rows apart, in the head-major pool; scales are
single float32, ``S`` apart. Both leave from registers: the tiles are small, and TMA could not store a scale.

Padding: a token whose slot lies in the dummy block is not stored.

Numerics: those of ``quantisation.quantise``, bit for bit in the interpreter. On a GPU the reciprocal of the scale is
the hardware's (relative error 2**-23, PTX ISA, "rcp"): scales stay bit for bit, and only an element that lies so near
to the middle between two codes may get the other one, which is no worse. Below compute capability 8.9, without an
instruction that makes fp8, codes of fp8 are made by integer arithmetic, and are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.pallas_kernels.mosaic_gpu import kernel, store_global
from jaxpaged.pallas_kernels.quantisation import KVFormat
from jaxpaged.pallas_kernels.tile_copy import divide, rows_layout

# Of one tile: 32 elements a thread, which are float32 while they are worked on.
MAX_TILE_ELEMENTS = 4096


@dataclass(frozen=True)
class QuantisedWrite:
    """What of a call is static. The layer is not, so that all layers of a program share one lowered kernel.

    Attributes:
      kind: the pool's format.
      tokens: of a thread block.
      fp8_instruction: whether the GPU converts to fp8.
      interpret: a ``plgpu.InterpretGPUParams``, or None.
    """

    kind: KVFormat
    tokens: int
    fp8_instruction: bool
    interpret: Any


@partial(jax.jit, static_argnums=0)
def write_quantised(
    call: QuantisedWrite,
    arrays: tuple[jax.Array, ...],
    k: jax.Array,
    v: jax.Array,
    base: jax.Array,
    slots: jax.Array,
) -> list[jax.Array]:
    """The pool's arrays after the writes of k and v; ``base`` int32 ``[1]`` is the first block of the layer."""
    num_tokens, num_heads, head_dim = k.shape
    pools = [jax.new_ref(array) for array in arrays]
    kernel(
        "cache_scatter_quantised",
        partial(_body, call),
        grid=(num_heads // heads_per_tile(num_heads, head_dim), pl.cdiv(num_tokens, call.tokens)),
        grid_names=("head_group", "token_group"),
        auto_barriers=False,
        interpret=call.interpret,
    )(*pools, k, v, base, slots)
    return [jax.freeze(pool) for pool in pools]


def heads_per_tile(num_heads: int, head_dim: int) -> int:
    """The most heads that divide ``num_heads`` and have at most ``MAX_TILE_ELEMENTS``."""
    most = max(1, min(num_heads, MAX_TILE_ELEMENTS // head_dim))
    return max(heads for heads in range(1, most + 1) if num_heads % heads == 0)


def _body(
    call: QuantisedWrite,
    pool_k: Any,
    pool_v: Any,
    pool_k_scale: Any,
    pool_v_scale: Any,
    k: Any,
    v: Any,
    base: Any,
    slots: Any,
) -> None:
    num_tokens, num_heads, head_dim = k.shape
    count, width = heads_per_tile(num_heads, head_dim), head_dim // call.kind.per_byte
    layout = rows_layout(count, width, 8)
    heads = pl.ds(lax.axis_index("head_group") * count, count)
    halves = [pl.ds(start, width) for start in range(0, head_dim, width)]
    mine = [lax.axis_index("token_group") * call.tokens + i for i in range(call.tokens)]
    inside = [jnp.minimum(token, num_tokens - 1) for token in mine]
    load = partial(plgpu.load, layout=layout, optimized=False)
    loaded = [[[load(new.at[token, heads, half]) for half in halves] for new in (k, v)] for token in inside]
    for token, clipped, vectors in zip(mine, inside, loaded, strict=True):
        block, offset = divide(slots[clipped], pool_k.shape[2])

        @pl.when((block > 0) & (token < num_tokens))
        def _store(vectors: Any = vectors, block: Any = block, offset: Any = offset) -> None:
            for pool, pool_scale, parts in zip(
                (pool_k, pool_v), (pool_k_scale, pool_v_scale), vectors, strict=True
            ):
                codes, scale = _quantise(call, layout, parts)
                store_global(pool.at[base[0] + block, heads, offset], codes)
                store_global(pool_scale.at[base[0] + block, heads, offset], scale)


def _quantise(call: QuantisedWrite, layout: Any, parts: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """``quantise`` of a tile, given whole or in halves."""
    highest = call.kind.largest
    parts = [part.astype(jnp.float32) for part in parts]
    largest = jnp.max(reduce(jnp.maximum, map(jnp.abs, parts)), axis=1)
    scale = jnp.where(largest < 1e-30, 1.0, largest * (1.0 / highest))
    inverse = plgpu.layout_cast(lax.broadcast_in_dim(1.0 / scale, parts[0].shape, [0]), layout)
    scaled = [jnp.clip(part * inverse, -highest, highest) for part in parts]
    if call.kind.storage == jnp.float8_e4m3fn:
        return _fp8(call, scaled[0]), scale
    # The float32 of magnitude 2**23 are the integers: the sum is rounded to one, and its last bits are the code.
    codes = [lax.bitcast_convert_type(part + 1.5 * 2.0**23, jnp.int32) for part in scaled]
    packed = codes[0] if len(codes) == 1 else (codes[0] & 15) | (codes[1] << 4)
    return packed.astype(call.kind.storage), scale


def _fp8(call: QuantisedWrite, x: jax.Array) -> jax.Array:
    if call.fp8_instruction:
        return x.astype(call.kind.storage)
    return lax.bitcast_convert_type(e4m3_bits(x).astype(jnp.int8), call.kind.storage)


def e4m3_bits(x: jax.Array) -> jax.Array:
    """The codes of float8_e4m3fn, as int32, of float32 that is at most 448; rounded to nearest, ties to even.

    A normal number keeps three bits of its fraction: what is cut off carries into them, and from them into the
    exponent, whose bias goes from 127 to 7. A smaller one counts in steps of 2**-9, which adding 2**14 makes the last
    bit of a float32; the eighth step is the first normal number. OCP 8-bit floating point, 1.0, section 5.
    """
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    small = lax.bitcast_convert_type(jnp.abs(x) + 2.0**14, jnp.int32) - 0x46800000
    code = jnp.where(bits < 0x3C800000, small, normal)  # 2**-6
    code = jnp.where(bits > 0x7F800000, 0x7F, code)
    return code | ((lax.bitcast_convert_type(x, jnp.int32) >> 24) & 0x80)
