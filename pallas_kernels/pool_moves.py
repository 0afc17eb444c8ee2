"""What all operations that move data of the pool share: the choice of implementation, writes in place by XLA."""

import logging
from collections.abc import Callable
from functools import cache

import jax
import jax.extend.backend
import jax.numpy as jnp
from jax import lax

from jaxpaged.pallas_kernels.batch import KVPool

logger = logging.getLogger(__name__)


def best_implementation(operation: str, kv_pool: KVPool) -> str:
    """The implementation that ``implementation=None`` takes on the default device; logged once for each answer."""
    device = jax.extend.backend.get_default_device()
    if device.platform != "gpu":
        return _log_choice(operation, device.platform, "xla", "there is no kernel for this device")
    # Imported where it is used: Mosaic GPU takes a quarter of a second to load.
    from jaxpaged.pallas_kernels.mosaic_gpu import gpu_target
    from jaxpaged.pallas_kernels.tile_copy import unsupported_reason

    reason = unsupported_reason(kv_pool, gpu_target())
    name, why = ("xla", f"for 'mosaic_gpu', {reason}") if reason else ("mosaic_gpu", "fastest there")
    return _log_choice(operation, device.device_kind, name, why)


def scattered(
    pool: jax.Array, scatter: Callable[[jax.Array], jax.Array], starts: jax.Array, boxes: jax.Array
) -> jax.Array:
    """``scatter(pool)``, in place under donation for every dtype.

    XLA's CPU compiler takes a scatter for arithmetic, of which it has none in fp8: it would convert the whole pool to
    16 bits and back. There boxes are written one after the other, which is what it makes of a scatter anyway.

    Args:
      pool: an array ``[L*N, Hkv, S, ...]`` of the pool.
      scatter: writes the boxes.
      starts: int32 ``[P, rank of the pool]``, where in the pool each box begins.
      boxes: ``[P, ...]``, of the pool's rank and dtype each.
    """
    if pool.dtype != jnp.float8_e4m3fn:
        return scatter(pool)

    def one_by_one(pool: jax.Array, starts: jax.Array, boxes: jax.Array) -> jax.Array:
        def write(i: jax.Array, pool: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(pool, boxes[i], starts[i])

        return lax.fori_loop(0, len(boxes), write, pool)

    return lax.platform_dependent(pool, starts, boxes, cpu=one_by_one, default=lambda pool, *_: scatter(pool))


@cache
def _log_choice(operation: str, device: str, name: str, reason: str) -> str:
    logger.info("%s on %s uses implementation %r: %s", operation, device, name, reason)
    return name
