"""Copies of whole blocks inside the KV pool."""

from jaxpaged.pallas_kernels.block_copy.api import copy_blocks

__all__ = ["copy_blocks"]
