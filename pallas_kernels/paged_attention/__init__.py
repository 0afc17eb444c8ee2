"""Attention over a paged KV pool."""

from jaxpaged.pallas_kernels.paged_attention.api import (
    IMPLEMENTATIONS,
    best_implementation,
    paged_attention,
    paged_attention_step,
    unsupported_reason,
)

__all__ = [
    "IMPLEMENTATIONS",
    "best_implementation",
    "paged_attention",
    "paged_attention_step",
    "unsupported_reason",
]
