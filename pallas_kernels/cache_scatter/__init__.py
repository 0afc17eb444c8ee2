"""Writing new keys and values into the KV pool."""

from jaxpaged.pallas_kernels.cache_scatter.api import cache_scatter, cache_scatter_reference

__all__ = ["cache_scatter", "cache_scatter_reference"]
