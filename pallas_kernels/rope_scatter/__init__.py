"""Rotary embedding and cache scatter in one launch."""

from jaxpaged.pallas_kernels.rope_scatter.api import IMPLEMENTATIONS, rope_scatter

__all__ = ["IMPLEMENTATIONS", "rope_scatter"]
