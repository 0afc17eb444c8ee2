"""The attention kernel on a GPU, in every form, as the tests of this folder call it."""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from jaxpaged.pallas_kernels import AttentionBatch, AttentionVariant, KVPool
from jaxpaged.pallas_kernels.mosaic_gpu import gpu_target
from jaxpaged.pallas_kernels.paged_attention import paged_attention
from jaxpaged.pallas_kernels.paged_attention.cases import CASES, Case
from jaxpaged.pallas_kernels.paged_attention.mosaic_gpu import paged_attention_mosaic_gpu
from jaxpaged.pallas_kernels.paged_attention.tuning import MosaicConfig

Inputs = tuple[jax.Array, KVPool, AttentionBatch]

# None: the sizes that a call takes by itself.
CONFIGS: dict[str, MosaicConfig | None] = {
    "chosen": None,
    "mma": MosaicConfig("mma", tile_kv=64, stages=2, ctas_per_sm=2),
    "wgmma": MosaicConfig("wgmma", tile_kv=64, stages=2, ctas_per_sm=2, tile_m=64),
    "prefill": MosaicConfig("prefill", tile_kv=64, stages=2, ctas_per_sm=1, tile_m=128),
}
DETERMINISTIC_FORMS = ("chosen", "mma", "wgmma")
SUPPORTED_CASES = [case for case in CASES if case.block_size >= 16]


def forms() -> list[str]:
    """The forms of the kernel that this GPU runs."""
    target = gpu_target()
    assert target is not None, "run with --gpu on a machine that has one"
    return ["mma", "wgmma", "prefill"] if target.has_wgmma else ["mma"]


def require(form: str) -> None:
    """Skips where the GPU cannot run a form of the kernel."""
    if form in ("wgmma", "prefill") and form not in forms():
        pytest.skip(f"{form} is Hopper's")


@cache
def compiled(form: str, layer: int, variant: AttentionVariant, deterministic: bool) -> Any:
    """One jitted call."""

    def call(q: jax.Array, pool: KVPool, batch: AttentionBatch) -> jax.Array:
        options: dict[str, Any] = {"deterministic": deterministic}
        config = CONFIGS[form]
        if config is None:
            return paged_attention(
                q, pool, layer, batch, variant=variant, implementation="mosaic_gpu", **options
            )
        return paged_attention_mosaic_gpu(q, pool, layer, batch, variant, config=config, **options)

    return jax.jit(call)


def attend(
    form: str, case: Case, inputs: Inputs, layer: int = 1, *, deterministic: bool = False
) -> np.ndarray:
    """All tokens' outputs, padding included, in float64."""
    return np.asarray(compiled(form, layer, case.variant, deterministic)(*inputs), np.float64)
