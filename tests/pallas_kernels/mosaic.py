"""Runs the attention kernels of Mosaic GPU in the interpreter, the compiled-for device made up."""

from typing import Any

import jax
import numpy as np

from jaxpaged.pallas_kernels import AttentionBatch, KVPool
from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget
from jaxpaged.pallas_kernels.paged_attention.cases import Case
from jaxpaged.pallas_kernels.paged_attention.mosaic_gpu import paged_attention_mosaic_gpu
from jaxpaged.pallas_kernels.paged_attention.tuning import MosaicConfig
from tests.pallas_kernels.interpreter import interpreter

# Few multiprocessors make few splits, and the interpreter's time grows with the thread blocks, empty ones too.
SMALL_GPU = GpuTarget((9, 0), 2, "interpreter")
MMA = MosaicConfig("mma", tile_kv=64, stages=2, ctas_per_sm=2)
WGMMA = MosaicConfig("wgmma", tile_kv=64, stages=2, ctas_per_sm=2, tile_m=64)


def attend_interpreted(
    case: Case,
    inputs: tuple[jax.Array, KVPool, AttentionBatch],
    config: MosaicConfig = MMA,
    *,
    detect_races: bool = False,
    target: GpuTarget = SMALL_GPU,
    **options: Any,
) -> np.ndarray:
    """All tokens' outputs in layer 1, padding included, in float64."""
    q, pool, batch = inputs
    with interpreter(detect_races=detect_races) as interpret:
        out = paged_attention_mosaic_gpu(
            q, pool, 1, batch, case.variant, config=config, interpret=interpret, target=target, **options
        )
        return np.asarray(out, np.float64)
