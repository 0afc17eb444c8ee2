"""Paged attention on NVIDIA GPUs: Pallas kernels on Mosaic GPU, from Ampere on.

Every form of the kernel takes any ragged batch: rows that decode, chunks of prompts, hits of the prefix cache. One
launch attends every item of a work list (``mosaic_plan``).

* ``mosaic_mma`` and ``mosaic_wgmma`` are made for few query tokens a row. Queries are packed into tiles and results
  unpacked by XLA, and a second kernel joins the partial results (``mosaic_combine``).
* ``mosaic_prefill`` is made for many, on Hopper; see ``mosaic_ragged``.

The plan is shared by all layers of a step.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels.batch import AttentionBatch, KVPool
from jaxpaged.pallas_kernels.mosaic_gpu import (
    INTERPRETED,
    GpuTarget,
    gpu_target,
    smem_bytes_of,
    unsupported_device_reason,
)
from jaxpaged.pallas_kernels.paged_attention.mosaic_codes import by_part, from_parts, ring_width, words_of
from jaxpaged.pallas_kernels.paged_attention.mosaic_combine import combine
from jaxpaged.pallas_kernels.paged_attention.mosaic_launch import attend_items
from jaxpaged.pallas_kernels.paged_attention.mosaic_mma import MMA
from jaxpaged.pallas_kernels.paged_attention.mosaic_operands import (
    KernelMods,
    pack_operands,
    pack_queries,
    split_mods,
    too_large_reason,
)
from jaxpaged.pallas_kernels.paged_attention.mosaic_plan import WorkPlan, make_plan, max_tiles
from jaxpaged.pallas_kernels.paged_attention.mosaic_prefill import HALVES, ROWS, result_columns
from jaxpaged.pallas_kernels.paged_attention.mosaic_ragged import attend_ragged
from jaxpaged.pallas_kernels.paged_attention.mosaic_ring import swizzle_for_cp_async
from jaxpaged.pallas_kernels.paged_attention.mosaic_tile import TileShape
from jaxpaged.pallas_kernels.paged_attention.mosaic_wgmma import WGMMA
from jaxpaged.pallas_kernels.paged_attention.tuning import CallShape, MosaicConfig, config_for
from jaxpaged.pallas_kernels.quantisation import KVFormat
from jaxpaged.pallas_kernels.variant import AttentionVariant, VariantSpec

HEAD_DIMS = (64, 96, 128, 192, 256)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_GROUP = 64

# The widest heads of a quantised pool, and under a variant's functions, for which the prefill kernel has registers.
_PREFILL_OF_CODES, _PREFILL_OF_MODS = 128, 192

# Barriers, and what the compiler reserves to reduce across warps.
_SCRATCH = 4096


@dataclass(frozen=True)
class _Call:
    """What of a call is static: with equal ones, all layers of a program share one lowered function."""

    spec: VariantSpec
    config: MosaicConfig
    target: GpuTarget
    deterministic: bool
    interpret: Any
    kind: KVFormat | None


def paged_attention_mosaic_gpu(
    q: jax.Array,
    kv_pool: KVPool,
    layer: int,
    batch: AttentionBatch,
    variant: AttentionVariant,
    *,
    deterministic: bool = False,
    config: MosaicConfig | None = None,
    interpret: Any = None,
    target: GpuTarget | None = None,
) -> jax.Array:
    """Attention over the pool in place; arguments as in ``paged_attention``.

    Args:
      q: bfloat16 or float16 ``[T, Hq, D]``, of the pool's dtype if that is not quantised.
      kv_pool: see ``KVPool``.
      layer: which layer of the pool.
      batch: see ``AttentionBatch``.
      variant: see ``AttentionVariant``.
      deterministic: a row's result has the same bits whatever else is in the batch.
      config: tile sizes; chosen for the device and the shapes if None.
      interpret: a ``plgpu.InterpretGPUParams``: run on the CPU, for tests.
      target: the GPU to build for, the default device if None.

    Raises:
      NotImplementedError: no GPU, or a shape, dtype or variant outside of what the kernels take.
    """
    if target is None:
        target = INTERPRETED if interpret is not None else gpu_target()
    reason = unsupported_reason(target, q, kv_pool, variant, batch, config, deterministic)
    if reason is not None:
        raise NotImplementedError(f"paged_attention implementation 'mosaic_gpu': {reason}")
    assert target is not None
    config = config or _config(target, q, kv_pool, batch, split_mods(variant), deterministic=deterministic)
    spec, arrays = variant.split()
    base = jnp.full(1, layer * kv_pool.num_blocks, jnp.int32)
    call = _Call(spec, config, target, deterministic, interpret, kv_pool.format)
    pool = kv_pool.arrays
    if kv_pool.format is not None:
        pool = (words_of(kv_pool.k), words_of(kv_pool.v), *pool[2:])
    return _attend(call, q, pool, base, batch, arrays)


def unsupported_reason(
    target: GpuTarget | None,
    q: jax.Array,
    kv_pool: KVPool,
    variant: AttentionVariant,
    batch: AttentionBatch | None = None,
    config: MosaicConfig | None = None,
    deterministic: bool = False,
) -> str | None:
    """Why a call cannot be taken, or None; without ``batch``, but for the size of what a variant needs of arrays."""
    reason = unsupported_device_reason(target) or _shape_reason(target, q, kv_pool)
    if reason is not None:
        return reason
    assert target is not None
    if config is not None and config.form != "mma" and not target.has_wgmma:
        return f"config.form={config.form!r} needs a Hopper GPU, the target is {target.kind}"
    kind, width = kv_pool.format, ring_width(kv_pool.head_dim, kv_pool.format)
    if config is not None:
        tile_m, _ = _tile_rows(config, q.shape[1] // kv_pool.k.shape[1], width)
        needed = shared_memory(config, tile_m, kv_pool.head_dim, kind)
        if needed > target.smem_bytes:
            return f"{config} needs {needed} bytes of shared memory, {target.kind} has {target.smem_bytes}"
        if config.form == "prefill" and deterministic:
            return "config.form='prefill' splits rows as the batch lets it, which deterministic=True forbids"
        if config.form == "prefill" and kind is not None and kv_pool.head_dim > _PREFILL_OF_CODES:
            return f"config.form='prefill' takes {kind.name} up to head_dim={_PREFILL_OF_CODES}: {kv_pool.head_dim}"
        if config.form == "prefill" and q.shape[1] // kv_pool.k.shape[1] * q.shape[2] % 64:
            return f"config.form='prefill' needs heads of a kv head that are multiples of 64 wide together: {q.shape}"
    try:
        mods = split_mods(variant)
    except NotImplementedError as error:
        return str(error)
    if batch is None:
        return None
    config = config or _config(target, q, kv_pool, batch, mods, deterministic=deterministic)
    tile_m, tile_q = _tile_rows(config, q.shape[1] // kv_pool.k.shape[1], width)
    tiles = max_tiles(q.shape[0], batch.seq_lens.shape[0], tile_q)
    return too_large_reason(
        mods, tiles, kv_pool.k.shape[1], tile_m, _keys_covered(batch, kv_pool.block_size, config)
    )


def automatic_reason(
    target: GpuTarget | None,
    q: jax.Array,
    kv_pool: KVPool,
    variant: AttentionVariant,
    batch: AttentionBatch | None = None,
    deterministic: bool = False,
) -> str | None:
    """Why ``implementation=None`` does not take this one, or None."""
    reason = unsupported_reason(target, q, kv_pool, variant, batch, deterministic=deterministic)
    if reason is None and target is not None and not target.has_wgmma:
        return f"it is chosen by itself on Hopper only and must be named on {target.kind}"
    return reason


def _shape_reason(target: GpuTarget | None, q: jax.Array, kv_pool: KVPool) -> str | None:
    num_kv_heads, block_size, head_dim, kind = (
        kv_pool.num_kv_heads, kv_pool.block_size, kv_pool.head_dim, kv_pool.format
    )  # fmt: skip
    if q.dtype not in (jnp.bfloat16, jnp.float16) or (kind is None and kv_pool.k.dtype != q.dtype):
        return (
            f"it takes bfloat16 or float16, queries and pool alike, got {q.dtype} and {kv_pool.k.dtype} "
            "(a quantised pool may differ)"
        )
    if head_dim not in HEAD_DIMS:
        return f"head_dim={head_dim} is none of {HEAD_DIMS}"
    if block_size not in BLOCK_SIZES:
        return f"block_size={block_size} is none of {BLOCK_SIZES}"
    width = ring_width(head_dim, kind)
    if width % 16:
        return f"head_dim={head_dim} is no multiple of 64, which it must be for {kind and kind.name}"
    if target is not None and not target.has_tma and swizzle_for_cp_async(block_size, width) is None:
        return f"blocks of {block_size} with head_dim={head_dim} in {kind and kind.name} need Hopper or newer"
    if q.shape[1] // num_kv_heads > MAX_GROUP:
        return f"{q.shape[1]} query heads over {num_kv_heads} kv heads: at most {MAX_GROUP} may share one"
    return None


def _config(
    target: GpuTarget,
    q: jax.Array,
    kv_pool: KVPool,
    batch: AttentionBatch,
    mods: KernelMods,
    *,
    deterministic: bool,
) -> MosaicConfig:
    num_kv_heads, block_size, head_dim = kv_pool.num_kv_heads, kv_pool.block_size, kv_pool.head_dim
    num_rows, table_width = batch.block_tables.shape
    shape = CallShape(
        q.shape[0], num_rows, q.shape[1], num_kv_heads, head_dim, block_size, table_width * block_size
    )
    config = config_for(target, shape, kv_pool.k.dtype, deterministic=deterministic)
    too_wide = (kv_pool.format is not None and head_dim > _PREFILL_OF_CODES) or (
        bool(mods) and head_dim > _PREFILL_OF_MODS
    )
    if config.form == "prefill" and too_wide:
        return MosaicConfig("wgmma", 64, 2, 1, 64)
    if config.form == "prefill" and (kv_pool.format is not None or any(axes.key for axes in mods.axes)):
        return replace(config, tile_kv=64)  # numbers for 128 keys find no registers beside their scores
    return config


def shared_memory(config: MosaicConfig, tile_m: int, head_dim: int, kind: KVFormat | None = None) -> int:
    """Bytes that a thread block takes of shared memory, within what barriers and reductions need (``_SCRATCH``)."""
    ring = (2 * config.stages, config.tile_kv, ring_width(head_dim, kind))
    extra = 0
    if kind is not None:
        extra = 2 * config.stages * config.tile_kv * 4
        numbers = {"mma": 0, "wgmma": 1, "prefill": HALVES}[config.form]
        extra += numbers * 2 * config.tile_kv * head_dim
    other = (tile_m, config.tile_kv if config.form == "mma" else head_dim)
    results = (tile_m, result_columns(head_dim)) if config.form == "prefill" else (0,)
    return smem_bytes_of([(shape, jnp.bfloat16) for shape in (ring, other, results)]) + extra + _SCRATCH


def _tile_rows(config: MosaicConfig, group: int, width: int) -> tuple[int, int]:
    """Rows of a tile and query tokens in it: at least one token's heads, and a size the products have.

    With ``m`` rows the warps that are left side by side take ``512 / m`` columns of values.
    """
    if config.form == "prefill":
        return HALVES * ROWS, HALVES * (ROWS // group)
    tile_m = next(m for m in (16, 32, 64) if m >= max(config.tile_m, group) and width % (512 // m) == 0)
    return tile_m, max(1, tile_m // group)


def _keys_covered(batch: AttentionBatch, block_size: int, config: MosaicConfig) -> int:
    """Key positions up to the end of the last tile of a full table."""
    return -(-batch.block_tables.shape[1] * block_size // config.tile_kv) * config.tile_kv


@partial(jax.jit, static_argnums=0)
def _attend(
    call: _Call,
    q: jax.Array,
    pool: tuple[jax.Array, ...],
    base: jax.Array,
    batch: AttentionBatch,
    arrays: tuple[jax.Array, ...],
) -> jax.Array:
    variant, k = call.spec.bind(arrays), pool[0]
    q = q if call.kind is None else by_part(q, call.kind)
    shape = _tile_shape(call, variant, q, k)
    split_budget = call.target.num_sms * call.config.ctas_per_sm // k.shape[1]
    if call.config.form == "prefill":
        out = attend_ragged(
            shape,
            q,
            pool,
            base,
            batch,
            variant,
            split_budget=split_budget,
            interpret=call.interpret,
        )
        return out if call.kind is None else from_parts(out, call.kind)
    out = _attend_packed(call, shape, q, pool, base, batch, variant, split_budget)
    out = out if call.kind is None else from_parts(out, call.kind)
    real = jnp.arange(q.shape[0]) < batch.query_start_loc[-1]
    return jnp.where(real[:, None, None], out, jnp.zeros((), out.dtype))


def _tile_shape(call: _Call, variant: AttentionVariant, q: jax.Array, k: jax.Array) -> TileShape:
    head_dim, group = q.shape[2], q.shape[1] // k.shape[1]
    tile_m, tile_q = _tile_rows(call.config, group, ring_width(head_dim, call.kind))
    if call.config.form == "prefill":  # as a half sees it
        tile_m, tile_q = tile_m // HALVES, tile_q // HALVES
    return TileShape(
        config=call.config,
        tile_m=tile_m,
        tile_q=tile_q,
        group=group,
        head_dim=head_dim,
        block_size=k.shape[2],
        scale=variant.scale_for(head_dim),
        logit_soft_cap=variant.logit_soft_cap,
        sliding_window=variant.sliding_window,
        mods=split_mods(variant),
        has_tma=call.target.has_tma,
        kind=call.kind,
        interpreted=call.interpret is not None,
    )


def _attend_packed(
    call: _Call,
    shape: TileShape,
    q: jax.Array,
    pool: tuple[jax.Array, ...],
    base: jax.Array,
    batch: AttentionBatch,
    variant: AttentionVariant,
    split_budget: int,
) -> jax.Array:
    """By the forms that take queries packed into tiles."""
    config, mods, tile_m = call.config, shape.mods, shape.tile_m
    num_heads, (_, num_kv_heads, block_size, _) = q.shape[1], pool[0].shape
    plan = make_plan(
        batch,
        tile_q=shape.tile_q,
        tile_kv=config.tile_kv,
        sliding_window=variant.sliding_window,
        split_budget=split_budget,
        deterministic=call.deterministic,
        max_len=batch.block_tables.shape[1] * block_size,
        mask_mod=variant.mask_mod,
        num_heads=num_heads,
    )
    keys = _keys_covered(batch, block_size, config)
    operands = pack_operands(
        mods, plan, num_heads=num_heads, num_kv_heads=num_kv_heads, tile_m=tile_m, keys=keys
    )
    packed = pack_queries(q, plan, num_kv_heads, tile_m)
    max_items = plan.items.shape[0]
    grid_items = min(max_items, max(1, split_budget)) if call.deterministic else max_items
    partials, log_sums = attend_items(
        WGMMA() if config.form == "wgmma" else MMA(),
        shape,
        packed,
        pool,
        base,
        batch.block_tables,
        plan,
        operands,
        grid_items=grid_items,
        interpret=call.interpret,
    )
    sinks = None if variant.sinks is None else _pack_heads(variant.sinks, num_kv_heads, tile_m)
    joined = combine(
        partials, log_sums, plan.item_starts, plan.item_counts, sinks, q.dtype, interpret=call.interpret
    )
    return _unpack(joined, plan, shape.group)


def _unpack(packed: jax.Array, plan: WorkPlan, group: int) -> jax.Array:
    """``[P, Hkv, M, D]`` -> ``[T, Hq, D]``."""
    tiles, num_kv_heads, _, head_dim = packed.shape
    tile_q = plan.tile_tokens.shape[1]
    packed = packed[:, :, : tile_q * group].reshape(tiles, num_kv_heads, tile_q, group, head_dim)
    out = packed[plan.token_tiles, :, plan.token_slots]
    return out.reshape(-1, num_kv_heads * group, head_dim)


def _pack_heads(values: jax.Array, num_kv_heads: int, tile_m: int) -> jax.Array:
    """``[Hq]`` -> float32 ``[Hkv, M]``, one value for each row of a tile."""
    grouped = values.astype(jnp.float32).reshape(num_kv_heads, -1)
    return grouped[:, jnp.arange(tile_m) % grouped.shape[1]]
