"""Which implementation moves data into, out of and inside the pool: the choice is the same for all such operations."""

import logging
from functools import cache

import jax.extend.backend

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


@cache
def _log_choice(operation: str, device: str, name: str, reason: str) -> str:
    logger.info("%s on %s uses implementation %r: %s", operation, device, name, reason)
    return name
