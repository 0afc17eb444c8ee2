"""Moves of whole blocks: inside the KV pool, out of it and into it."""

from jaxpaged.pallas_kernels.block_copy.api import (
    IMPLEMENTATIONS,
    BlockMoves,
    copy_blocks,
    gather_blocks,
    scatter_blocks,
)

__all__ = ["IMPLEMENTATIONS", "BlockMoves", "copy_blocks", "gather_blocks", "scatter_blocks"]
