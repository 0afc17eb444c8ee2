"""jaxpaged: paged-KV inference for the JAX stack."""

from typing import TYPE_CHECKING

from jaxpaged.models.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from jaxpaged.beam_params import BeamSearchParams
    from jaxpaged.block_trace import BlockTrace
    from jaxpaged.engine import Engine
    from jaxpaged.outputs import CompletionOutput, EngineStats, Logprob, RequestOutput
    from jaxpaged.pallas_kernels import AttentionVariant
    from jaxpaged.records import IterationRecord, RequestRecord
    from jaxpaged.sampling_params import RequestOutputKind, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "AttentionVariant",
    "BeamSearchParams",
    "BlockTrace",
    "CompletionOutput",
    "Engine",
    "EngineStats",
    "IterationRecord",
    "Logprob",
    "RequestOutput",
    "RequestOutputKind",
    "RequestRecord",
    "SamplingParams",
]

# A program that only wants SamplingParams should not wait for jax.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "AttentionVariant": "jaxpaged.pallas_kernels",
        "BeamSearchParams": "jaxpaged.beam_params",
        "BlockTrace": "jaxpaged.block_trace",
        "CompletionOutput": "jaxpaged.outputs",
        "Engine": "jaxpaged.engine",
        "EngineStats": "jaxpaged.outputs",
        "IterationRecord": "jaxpaged.records",
        "Logprob": "jaxpaged.outputs",
        "RequestOutput": "jaxpaged.outputs",
        "RequestOutputKind": "jaxpaged.sampling_params",
        "RequestRecord": "jaxpaged.records",
        "SamplingParams": "jaxpaged.sampling_params",
    },
)
