"""Where the tokens of one sequence lie: its block ids in the order of positions."""

from collections.abc import Iterable, Iterator


class BlockTable:
    """The block ids of a sequence; token ``p`` lies in slot ``ids[p // S] * S + p % S``.

    Where a sliding window has moved on, or a prefix was not needed, stands 0, the dummy block.

    Invariant: every other id in it is held once by this table in the allocator, through whoever owns the table.
    """

    __slots__ = ("block_size", "ids", "num_trimmed")

    def __init__(self, block_size: int, ids: Iterable[int] = ()) -> None:
        self.block_size = block_size
        self.ids = list(ids)
        self.num_trimmed = 0  # leading blocks that were given back, or that nobody need look at again

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __repr__(self) -> str:
        return f"BlockTable(block_size={self.block_size}, ids={self.ids})"

    def clear(self) -> None:
        """Empties the table; the caller has let go of the blocks."""
        self.ids.clear()
        self.num_trimmed = 0

    @property
    def capacity(self) -> int:
        """Tokens that fit into the blocks there are."""
        return len(self.ids) * self.block_size

    def missing(self, num_tokens: int) -> int:
        """Blocks still needed to hold ``num_tokens``."""
        return max(0, -(-num_tokens // self.block_size) - len(self.ids))

    def slot(self, position: int) -> int:
        """The pool slot of a position."""
        return self.ids[position // self.block_size] * self.block_size + position % self.block_size
