"""Dense causal attention over contiguous sequences: what a model trains with."""

from jaxpaged.pallas_kernels.causal_attention.api import causal_attention

__all__ = ["causal_attention"]
