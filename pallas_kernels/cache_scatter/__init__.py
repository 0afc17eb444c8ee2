"""Writing new keys and values into the KV pool."""

from jaxpaged.pallas_kernels.cache_scatter.api import IMPLEMENTATIONS, cache_scatter

__all__ = ["IMPLEMENTATIONS", "cache_scatter"]
