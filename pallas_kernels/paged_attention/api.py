"""Paged attention: one signature, several implementations."""

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import TypeAlias

import jax

from jaxpaged.pallas_kernels.batch import AttentionBatch, KVPool, MixedKVPool
from jaxpaged.pallas_kernels.paged_attention import numba_cpu
from jaxpaged.pallas_kernels.paged_attention.differentiable import attend, scatter_and_attend
from jaxpaged.pallas_kernels.paged_attention.numba_cpu import paged_attention_numba
from jaxpaged.pallas_kernels.paged_attention.reference import paged_attention_reference
from jaxpaged.pallas_kernels.paged_attention.xla import paged_attention_xla
from jaxpaged.pallas_kernels.variant import AttentionVariant

logger = logging.getLogger(__name__)

Implementation: TypeAlias = Callable[[jax.Array, KVPool, int, AttentionBatch, AttentionVariant], jax.Array]


def _mosaic_gpu(
    q: jax.Array, kv_pool: KVPool, layer: int, batch: AttentionBatch, variant: AttentionVariant
) -> jax.Array:
    # Imported where it is used: Mosaic GPU takes a quarter of a second to load.
    from jaxpaged.pallas_kernels.paged_attention.mosaic_gpu import paged_attention_mosaic_gpu

    return paged_attention_mosaic_gpu(q, kv_pool, layer, batch, variant)


def _mosaic_gpu_deterministic(
    q: jax.Array, kv_pool: KVPool, layer: int, batch: AttentionBatch, variant: AttentionVariant
) -> jax.Array:
    from jaxpaged.pallas_kernels.paged_attention.mosaic_gpu import paged_attention_mosaic_gpu

    return paged_attention_mosaic_gpu(q, kv_pool, layer, batch, variant, deterministic=True)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": paged_attention_reference,
    "xla": paged_attention_xla,
    "numba": paged_attention_numba,
    "mosaic_gpu": _mosaic_gpu,
}

# Those that give a row the same bits in every batch; numba always does.
DETERMINISTIC: dict[str, Implementation] = {
    "xla": partial(paged_attention_xla, deterministic=True),
    "numba": paged_attention_numba,
    "mosaic_gpu": _mosaic_gpu_deterministic,
}


def paged_attention(
    q: jax.Array,
    kv_pool: KVPool | MixedKVPool,
    layer: int,
    batch: AttentionBatch,
    *,
    variant: AttentionVariant | None = None,
    implementation: str | None = None,
    deterministic: bool = False,
) -> jax.Array:
    """Causal attention of a ragged batch of queries over keys and values in a paged pool.

    The keys and values of the step's own tokens must already be in the pool (``cache_scatter``). Token ``t``
    attends to positions ``0..positions[t]`` of its row. Scores and softmax are float32. Method: Kwon et al.
    2023 (arXiv:2309.06180).

    Differentiable once, in reverse mode, in ``q`` and the floating-point arrays of ``variant``. The pool has no
    gradient: ``paged_attention_step`` has those of the step's own keys and values.

    Args:
      q: float ``[T, Hq, D]``.
      kv_pool: see ``KVPool`` and ``MixedKVPool``; ``Hkv`` divides ``Hq``.
      layer: which layer of the pool.
      batch: see ``AttentionBatch``. Block ids must lie in ``[0, N)``: JAX clamps others silently, so the
        host checks them.
      variant: see ``AttentionVariant``.
      implementation: ``"reference"``, ``"xla"``, ``"numba"`` (CPU), ``"mosaic_gpu"`` (NVIDIA), or None for the
        best one here.
      deterministic: a row's result has the same bits whatever else is in the batch, and however its tokens are
        spread over steps.

    Returns:
      ``[T, Hq, D]`` in the dtype of ``q``; padding tokens are finite and meaningless.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation, a layer out of range.
      NotImplementedError: a named implementation cannot take this call; it says why and never falls back. Or
        somebody differentiates with respect to the pool.
    """
    variant = variant or AttentionVariant()
    if not 0 <= layer < kv_pool.num_layers:
        raise ValueError(f"paged_attention: layer={layer} is not in [0, {kv_pool.num_layers})")
    kv_pool, layer = kv_pool.part_of(layer)
    _check(q, kv_pool, batch, variant)
    forward = _implementation(q, kv_pool, batch, variant, implementation, deterministic)
    return attend(forward, q, kv_pool, layer, batch, variant)


def paged_attention_step[Pool: (KVPool, MixedKVPool)](
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pool: Pool,
    layer: int,
    batch: AttentionBatch,
    *,
    variant: AttentionVariant | None = None,
    implementation: str | None = None,
    deterministic: bool = False,
) -> tuple[jax.Array, Pool]:
    """``cache_scatter`` of the step's keys and values, then ``paged_attention``: one layer of a step, to train with.

    Differentiable once, in reverse mode, in ``q``, ``k``, ``v`` and the floating-point arrays of ``variant``. What
    the pool held before is a constant: in a chain of layers, each with the pool that the one before returned, every
    layer's own keys have their gradients, and those of earlier steps have none. Rounding to the pool's dtype, or
    quantisation, counts as the identity. See ``gradient`` for the method. Kept for the backward pass is a copy of the
    blocks that the block tables name, in this layer, and not the pool, which is updated in place as in serving.

    Args:
      q: float ``[T, Hq, D]``.
      k, v: float ``[T, Hkv, D]``, keys and values of the same tokens.
      kv_pool, layer, batch, variant, implementation, deterministic: see ``paged_attention``.

    Returns:
      ``[T, Hq, D]`` in the dtype of ``q``, padding tokens finite and meaningless; and the pool after the writes.

    Raises:
      ValueError, NotImplementedError: see ``paged_attention`` and ``cache_scatter``.
    """
    variant = variant or AttentionVariant()
    if not 0 <= layer < kv_pool.num_layers:
        raise ValueError(f"paged_attention: layer={layer} is not in [0, {kv_pool.num_layers})")
    part, index = kv_pool.part_of(layer)
    _check(q, part, batch, variant)
    forward = _implementation(q, part, batch, variant, implementation, deterministic)
    out, written = scatter_and_attend(forward, q, k, v, part, index, batch, variant)
    return out, kv_pool.with_part(layer, written)


def _implementation(
    q: jax.Array,
    kv_pool: KVPool,
    batch: AttentionBatch,
    variant: AttentionVariant,
    implementation: str | None,
    deterministic: bool,
) -> Implementation:
    """The named implementation, or the best."""
    if implementation is None:
        implementation = best_implementation(
            jax.default_backend(), q, kv_pool, variant, batch, deterministic=deterministic
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"paged_attention: implementation={implementation!r} is none of {sorted(IMPLEMENTATIONS)}"
        )
    if deterministic and implementation not in DETERMINISTIC:
        raise NotImplementedError(
            f"paged_attention: deterministic=True with implementation={implementation!r}, whose order of additions "
            f"depends on the batch; {', '.join(sorted(DETERMINISTIC))} can"
        )
    chosen = DETERMINISTIC if deterministic else IMPLEMENTATIONS
    return chosen[implementation]


def best_implementation(
    platform: str,
    q: jax.Array,
    kv_pool: KVPool,
    variant: AttentionVariant,
    batch: AttentionBatch | None = None,
    *,
    deterministic: bool = False,
) -> str:
    """The implementation that ``implementation=None`` takes on a platform; logged once for each answer.

    Without ``batch`` it is the one for a batch of usual size: a variant's bias tables may be too large for another.
    Whoever calls with batches of several sizes and wants the same bits in all of them names what the largest gives.
    """
    if platform == "cpu":
        reason = numba_cpu.unsupported_reason(q, kv_pool, variant)
        return (
            _log_choice(platform, "xla", reason)
            if reason
            else _log_choice(platform, "numba", "fastest there")
        )
    if platform in ("gpu", "cuda"):
        from jaxpaged.pallas_kernels.mosaic_gpu import gpu_target
        from jaxpaged.pallas_kernels.paged_attention import mosaic_gpu

        reason = mosaic_gpu.automatic_reason(gpu_target(), q, kv_pool, variant, batch, deterministic)
        if reason is None:
            return _log_choice(platform, "mosaic_gpu", "made for this device")
        return _log_choice(platform, "xla", f"for 'mosaic_gpu', {reason}")
    return _log_choice(platform, "xla", "there is no kernel for this device")


def unsupported_reason(
    implementation: str, q: jax.Array, kv_pool: KVPool, variant: AttentionVariant
) -> str | None:
    """Why a named implementation cannot take calls of these shapes and dtypes on the default device, or None.

    Nothing is computed: ``q`` and ``kv_pool`` may be tracers.
    """
    if implementation == "numba":
        if jax.default_backend() != "cpu":
            return f"it runs on the CPU, the default device is a {jax.default_backend()}"
        return numba_cpu.unsupported_reason(q, kv_pool, variant)
    if implementation == "mosaic_gpu":
        from jaxpaged.pallas_kernels.mosaic_gpu import gpu_target
        from jaxpaged.pallas_kernels.paged_attention import mosaic_gpu

        return mosaic_gpu.unsupported_reason(gpu_target(), q, kv_pool, variant)
    return None


@cache
def _log_choice(platform: str, name: str, reason: str) -> str:
    logger.info("paged_attention on %s uses implementation %r: %s", platform, name, reason)
    return name


def _check(q: jax.Array, kv_pool: KVPool, batch: AttentionBatch, variant: AttentionVariant) -> None:
    if q.ndim != 3 or kv_pool.k.ndim != 4 or kv_pool.k.shape != kv_pool.v.shape:
        raise ValueError(
            f"paged_attention: q.shape={q.shape} must be [T, Hq, D] and kv_pool.k.shape={kv_pool.k.shape}, "
            f"kv_pool.v.shape={kv_pool.v.shape} must both be [L*N, Hkv, S, D]"
        )
    heads = kv_pool.num_kv_heads, kv_pool.head_dim
    if q.shape[2] != heads[1] or q.shape[1] % heads[0]:
        raise ValueError(
            f"paged_attention: q.shape={q.shape} does not fit a pool with (Hkv, D)={heads}, "
            f"kv_pool.k.shape={kv_pool.k.shape}"
        )
    rows, tokens = batch.block_tables.shape[0], q.shape[0]
    wanted = {
        "seq_lens": rows,
        "query_start_loc": rows + 1,
        "rows": tokens,
        "positions": tokens,
        "slots": tokens,
    }
    for name, size in wanted.items():
        shape = getattr(batch, name).shape
        if shape != (size,):
            raise ValueError(f"paged_attention: batch.{name}.shape={shape} must be ({size},)")
    if variant.sinks is not None and variant.sinks.shape != (q.shape[1],):
        raise ValueError(
            f"paged_attention: variant.sinks.shape={variant.sinks.shape} must be ({q.shape[1]},)"
        )
