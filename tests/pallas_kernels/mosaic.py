"""Runs the attention kernels of Mosaic GPU in the interpreter, the compiled-for device made up."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.pallas_kernels import AttentionBatch, KVPool
from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget
from jaxpaged.pallas_kernels.paged_attention.cases import Case, make_inputs
from jaxpaged.pallas_kernels.paged_attention.mosaic_gpu import paged_attention_mosaic_gpu
from jaxpaged.pallas_kernels.paged_attention.tuning import MosaicConfig
from tests.pallas_kernels.interpreter import interpreter
from tests.pallas_kernels.oracle import attend, softmax_attention

# Few multiprocessors make few splits, and the interpreter's time grows with the thread blocks, empty ones too.
SMALL_GPU = GpuTarget((9, 0), 2, "interpreter")
MMA = MosaicConfig("mma", tile_kv=64, stages=2, ctas_per_sm=2)
WGMMA = MosaicConfig("wgmma", tile_kv=64, stages=2, ctas_per_sm=2, tile_m=64)
PREFILL = MosaicConfig("prefill", tile_kv=64, stages=2, ctas_per_sm=1, tile_m=128)

# What takes any shape of batch and of heads; prefill has tests of its own.
FORMS = {"mma": MMA, "wgmma": WGMMA}


def by_name(case: Case) -> str:
    return case.name


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


def check(case: Case, config: MosaicConfig, dtype: str = "bfloat16", **options: Any) -> None:
    """As near to the truth as the reference in the same dtype is, within twice its error."""
    inputs = make_inputs(case, dtype=jnp.dtype(dtype), poison=options.pop("poison", np.nan))
    check_inputs(case, inputs, config, **options)


def check_inputs(
    case: Case, inputs: tuple[jax.Array, KVPool, AttentionBatch], config: MosaicConfig, **options: Any
) -> None:
    """``check`` of given inputs. Padding tokens' results are zeros."""
    exact = softmax_attention(inputs[0], inputs[1], 1, inputs[2], case.variant)
    allowed = 2 * np.abs(attend("reference", case, inputs)[: len(exact)] - exact).max() + 1e-5
    out = attend_interpreted(case, inputs, config, **options)
    assert np.isfinite(out).all(), "padding included"
    assert np.abs(out[: len(exact)] - exact).max() <= allowed
    np.testing.assert_array_equal(out[len(exact) :], 0)
