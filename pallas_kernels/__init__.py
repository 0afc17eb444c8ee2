"""Attention and KV-cache operations over a paged pool; every implementation of an op has one signature."""

from jaxpaged.pallas_kernels.batch import AttentionBatch, KVPool, MixedKVPool
from jaxpaged.pallas_kernels.block_copy import copy_blocks, gather_blocks, scatter_blocks
from jaxpaged.pallas_kernels.cache_scatter import cache_scatter
from jaxpaged.pallas_kernels.causal_attention import causal_attention
from jaxpaged.pallas_kernels.paged_attention import paged_attention, paged_attention_step
from jaxpaged.pallas_kernels.variant import AttentionVariant

__all__ = [
    "AttentionBatch",
    "AttentionVariant",
    "KVPool",
    "MixedKVPool",
    "cache_scatter",
    "causal_attention",
    "copy_blocks",
    "gather_blocks",
    "paged_attention",
    "paged_attention_step",
    "scatter_blocks",
]
