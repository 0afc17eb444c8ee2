"""Cache scatter as a Mosaic GPU kernel: K and V of a step go into the pool in place, one launch a layer.

Grid: ``(head groups, token groups)``. A thread block moves the heads of its group, of K and of V, for its tokens:
all heads of one token, a few KiB, as long as there are few tokens (decode), because then latency decides and
load, wait, store is the shortest chain. With many tokens (prefill) it takes up to eight of them, so that the
number of blocks stays near ``_BLOCKS_PER_SM`` for each multiprocessor. The last group reads the last token
again where it has fewer tokens, and does not store it. There is a second head group only where a token's heads
are more than ``MAX_TILE_BYTES``.

Memory layout: a token's tile ``[heads, D]`` is contiguous in ``k`` and ``v`` and becomes rows of ``D`` elements,
``S * D`` apart, in the head-major pool: one box for TMA, whole sectors of 32 bytes either way. How tiles travel is
told in ``tile_copy``.

Padding: a token whose slot lies in the dummy block is not stored. Tokens that share slot 0 therefore never race, a
race detector has nothing to forgive, and the dummy block keeps the zeros it began with.

Numerics: none here. The cast to the pool's dtype is XLA's, which fuses it into what makes ``k`` and ``v``.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxpaged.pallas_kernels.batch import KVPool
from jaxpaged.pallas_kernels.cache_scatter.mosaic_quantise import (
    QuantisedWrite,
    heads_per_tile,
    write_quantised,
)
from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget, kernel
from jaxpaged.pallas_kernels.tile_copy import (
    MAX_TILE_BYTES,
    TileCopy,
    divide,
    rows_per_tile,
    supported_target,
)

# Thread blocks that hide each other's latency on one multiprocessor; more would only cost their start.
_BLOCKS_PER_SM = 8
_MAX_TOKENS = 8


def cache_scatter_mosaic_gpu(
    kv_pool: KVPool,
    k: jax.Array,
    v: jax.Array,
    layer: int,
    slots: jax.Array,
    *,
    tma: bool | None = None,
    interpret: Any = None,
    target: GpuTarget | None = None,
) -> KVPool:
    """One kernel for K and V; arguments as in ``cache_scatter``.

    Args:
      tma: whether tiles go by TMA or through registers; None for TMA where the GPU has it.
      interpret: a ``plgpu.InterpretGPUParams`` to run in the interpreter, for tests.
      target: the GPU to trace for, if not the default device.

    Raises:
      NotImplementedError: the device, the pool's dtype or its head dimension is not supported.
    """
    target = supported_target("cache_scatter", kv_pool, target, interpret)
    base = jnp.full(1, layer * kv_pool.num_blocks, jnp.int32)
    if kv_pool.format is not None:
        tile_bytes = heads_per_tile(*k.shape[1:]) * k.shape[2] * k.dtype.itemsize
        tokens = tokens_per_block(k.shape[0], tile_bytes, target.num_sms)
        has_fp8 = target.compute_capability >= (8, 9)  # PTX ISA, "cvt"
        quantised = QuantisedWrite(kv_pool.format, tokens, has_fp8, interpret)
        return kv_pool.with_arrays(write_quantised(quantised, kv_pool.arrays, k, v, base, slots))
    call = _Call(target, target.has_tma if tma is None else tma, interpret)
    pool_k, pool_v = _write(call, kv_pool.k, kv_pool.v, k, v, base, slots)
    return KVPool(pool_k, pool_v, kv_pool.num_layers)


@dataclass(frozen=True)
class _Call:
    """What of a call is static. The layer is not, so that all layers of a program share one lowered kernel."""

    target: GpuTarget
    tma: bool
    interpret: Any


@partial(jax.jit, static_argnums=0)
def _write(
    call: _Call,
    pool_k: jax.Array,
    pool_v: jax.Array,
    k: jax.Array,
    v: jax.Array,
    base: jax.Array,
    slots: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    dtype, block_size = pool_k.dtype, pool_k.shape[2]
    num_tokens, num_heads, head_dim = k.shape
    heads = rows_per_tile(num_heads, head_dim * dtype.itemsize)
    tokens = tokens_per_block(num_tokens, heads * head_dim * dtype.itemsize, call.target.num_sms)
    copy = TileCopy(2 * tokens, (heads, head_dim), dtype, call.tma)

    def cache_scatter_kernel(
        pool_k: Any, pool_v: Any, k: Any, v: Any, base: Any, slots: Any, *scratch: Any
    ) -> None:
        head = pl.ds(lax.axis_index("head_group") * heads, heads)
        mine = [lax.axis_index("token_group") * tokens + i for i in range(tokens)]
        inside = [jnp.minimum(token, num_tokens - 1) for token in mine]

        def find_targets() -> list[Any]:
            targets = []
            for token, clipped in zip(mine, inside, strict=True):
                block, offset = divide(slots[clipped], block_size)
                wanted = (block > 0) & (token < num_tokens)
                targets += [(pool.at[base[0] + block, head, offset], wanted) for pool in (pool_k, pool_v)]
            return targets

        copy([new.at[token, head] for token in inside for new in (k, v)], find_targets, scratch)

    pools = jax.new_ref(pool_k), jax.new_ref(pool_v)
    kernel(
        "cache_scatter",
        cache_scatter_kernel,
        grid=(num_heads // heads, pl.cdiv(num_tokens, tokens)),
        grid_names=("head_group", "token_group"),
        scratch_types=copy.scratch_types,
        interpret=call.interpret,
    )(*pools, k.astype(dtype), v.astype(dtype), base, slots)
    return jax.freeze(pools[0]), jax.freeze(pools[1])


def tokens_per_block(num_tokens: int, tile_bytes: int, num_sms: int) -> int:
    """Tokens of a thread block: a power of two, as large as leaves ``_BLOCKS_PER_SM`` on each multiprocessor."""
    most = min(_MAX_TOKENS, MAX_TILE_BYTES // tile_bytes, num_tokens // (_BLOCKS_PER_SM * num_sms))
    return 1 << (max(most, 1).bit_length() - 1)
