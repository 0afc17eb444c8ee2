"""Rotary embedding and cache scatter as one Mosaic GPU kernel.

Grid: ``(key/value heads, groups of TOKENS tokens)``. A thread block, one warpgroup, takes a group's query heads, key
and value of one key/value head. The tables are loaded once for all of its heads.

Memory layout: a tile is ``[TOKENS, D/2]``, one half of one head, so that it has the shape of its table and nothing has
to be broadcast. Queries go from registers to global memory. A key's or a value's row leaves for an address of its
own: by TMA from shared memory, where tiles meet as ``[TOKENS, D]``, or without TMA row by row through registers, each
warp doing all of a row.

Padding: a token whose slot lies in the dummy block is not stored, as in ``cache_scatter``. Where the tokens are no
multiple of ``TOKENS``, XLA pads them.

Numerics: rotated in float32 and rounded once, to qkv's dtype and then to the pool's.
Source: Su et al. 2021, arXiv:2104.09864, in its rotate-half form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.pallas_kernels.batch import KVPool
from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget, kernel, store_global
from jaxpaged.pallas_kernels.tile_copy import divide, supported_target

# A head's half of so many tokens is at least an element for each of 128 threads.
TOKENS = 8


@dataclass(frozen=True)
class _Call:
    """What of a call is static. The layer is not, so that all layers of a program share one lowered kernel."""

    tma: bool
    interpret: Any


def rope_scatter_mosaic_gpu(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    kv_pool: KVPool,
    layer: int,
    slots: jax.Array,
    *,
    tma: bool | None = None,
    interpret: Any = None,
    target: GpuTarget | None = None,
) -> tuple[jax.Array, KVPool]:
    """One kernel; arguments as in ``rope_scatter``.

    Args:
      tma: whether rows go to the pool by TMA or through registers; None for TMA where the GPU has it.
      interpret: a ``plgpu.InterpretGPUParams`` to run in the interpreter, for tests.
      target: the GPU to trace for, if not the default device.

    Raises:
      NotImplementedError: the device, a dtype or the head dimension is not supported.
    """
    target = supported_target("rope_scatter", kv_pool, target, interpret)
    if qkv.dtype != kv_pool.k.dtype or kv_pool.k.shape[3] % 64:
        raise NotImplementedError(
            f"rope_scatter: implementation='mosaic_gpu': qkv.dtype={qkv.dtype} is not the pool's {kv_pool.k.dtype}, "
            f"or head_dim={kv_pool.k.shape[3]} is no multiple of 64"
        )
    num_tokens = qkv.shape[0]
    missing = -num_tokens % TOKENS
    if missing:
        qkv = jnp.pad(qkv, ((0, missing), (0, 0), (0, 0), (0, 0)))
        cos, sin = (jnp.pad(table, ((0, missing), (0, 0))) for table in (cos, sin))
        slots = jnp.pad(slots, (0, missing))
    call = _Call(target.has_tma if tma is None else tma, interpret)
    base = jnp.full(1, layer * kv_pool.num_blocks, jnp.int32)
    q, pool_k, pool_v = _write(call, kv_pool.k, kv_pool.v, qkv, cos, sin, base, slots)
    return q[:num_tokens], KVPool(pool_k, pool_v, kv_pool.num_layers)


@partial(jax.jit, static_argnums=0)
def _write(
    call: _Call,
    pool_k: jax.Array,
    pool_v: jax.Array,
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    base: jax.Array,
    slots: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    num_tokens, num_heads, wide, head_dim = qkv.shape
    group = wide - 2
    pools = jax.new_ref(pool_k), jax.new_ref(pool_v)
    q = kernel(
        "rope_scatter",
        partial(_body, group, head_dim),
        out_type=jax.ShapeDtypeStruct((num_tokens, num_heads * group, head_dim), qkv.dtype),
        grid=(num_heads, num_tokens // TOKENS),
        grid_names=("head", "token_group"),
        scratch_types=[plgpu.SMEM((TOKENS, head_dim), qkv.dtype) for _ in pools] if call.tma else [],
        interpret=call.interpret,
    )(*pools, qkv, cos, sin, base, slots)
    return q, jax.freeze(pools[0]), jax.freeze(pools[1])


def _body(
    group: int,
    head_dim: int,
    pool_k: Any,
    pool_v: Any,
    qkv: Any,
    cos: Any,
    sin: Any,
    base: Any,
    slots: Any,
    q: Any,
    *tiles: Any,
) -> None:
    head, half = lax.axis_index("head"), head_dim // 2
    first_token = lax.axis_index("token_group") * TOKENS
    mine = pl.ds(first_token, TOKENS)
    halves = pl.ds(0, half), pl.ds(half, half)

    def rotated(tokens: Any, index: int, layout: Any) -> list[jax.Array]:
        load = partial(plgpu.load, layout=layout, optimized=False)
        x, y = (load(qkv.at[tokens, head, index, part]).astype(jnp.float32) for part in halves)
        cosine, sine = load(cos.at[tokens]), load(sin.at[tokens])
        return [z.astype(qkv.dtype) for z in (x * cosine - y * sine, y * cosine + x * sine)]

    def for_each_token(store: Callable[[int, Any, Any], None]) -> None:
        for i in range(TOKENS):
            block, offset = divide(slots[first_token + i], pool_k.shape[2])
            rows = [pool.at[base[0] + block, head, offset] for pool in (pool_k, pool_v)]
            pl.when(block > 0)(partial(store, i, *rows))

    tile = plgpu.Layout.WG_STRIDED((TOKENS, half), vec_size=min(8, TOKENS * half // 128))
    if tiles:
        for part, new in zip(halves, rotated(mine, group, tile), strict=True):
            store_global(tiles[0].at[:, part], new)
        for part in halves:
            value = plgpu.load(qkv.at[mine, head, group + 1, part], layout=tile, optimized=False)
            store_global(tiles[1].at[:, part], value)
        plgpu.commit_smem()

        def store(i: int, *rows: Any) -> None:
            for staged, row in zip(tiles, rows, strict=True):
                plgpu.copy_smem_to_gmem(staged.at[i], row)

    else:

        def store(i: int, *rows: Any) -> None:
            row = _row_layout(half)
            for part, new in zip(halves, rotated(first_token + i, group, row), strict=True):
                store_global(rows[0].at[part], new)
            for part in halves:
                source = qkv.at[first_token + i, head, group + 1, part]
                store_global(rows[1].at[part], plgpu.load(source, layout=row, optimized=False))

    for_each_token(store)
    for index in range(group):
        for part, new in zip(halves, rotated(mine, index, tile), strict=True):
            store_global(q.at[mine, head * group + index, part], new)
    if tiles:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _row_layout(width: int) -> Any:
    """Half a head is too small for a warpgroup: every warp moves all of it."""
    size = 2 if width % 64 == 0 else 1
    tiling = plgpu.Tiling(((32 * size,), (size,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(plgpu.Replicated(4),), lane_dims=(-2,), vector_dim=-1)
