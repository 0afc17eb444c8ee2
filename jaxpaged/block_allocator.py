"""Who holds which block of KV memory: reference counts and a free queue, plain ints, O(1) each."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence

DUMMY_BLOCK = 0


class BlockAllocator:
    """Hands out the blocks ``1 .. num_blocks - 1``; block 0 is the dummy that padding writes to.

    A block whose last holder lets go becomes free but keeps its content, and may be revived by
    ``hold`` until ``allocate`` gives it to somebody else. The free queue is in the order of becoming free,
    so the longest unused block goes first (LRU).

    Invariants (``check_invariants``):
      * every block but the dummy is either free with count 0 or live with count >= 1;
      * free + live = ``num_usable``;
      * the dummy is neither;
      * ``num_cached`` free blocks are in ``cached``; ``holders`` counts the live blocks by their counts.

    Args:
      num_blocks: blocks of the pool, the dummy included; at least 2.
      on_reuse: called with a block id when a free block is about to get a new owner, that is when its
        old content is lost.
      cached: the blocks whose content can be found. While a block is free it may leave this only by ``on_reuse``, or
        ``recount_cached`` has to follow; it joins only while it is live.
    """

    def __init__(
        self,
        num_blocks: int,
        on_reuse: Callable[[int], None] | None = None,
        cached: Container[int] = (),
    ) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks={num_blocks} must be at least 2: block 0 is the dummy")
        self.num_blocks = num_blocks
        self._on_reuse = on_reuse
        self._cached = cached
        self.num_cached = 0
        self._shared: Counter[int] = Counter()  # a count of at least 2 to how many blocks have it
        self._counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def num_usable(self) -> int:
        """Blocks that requests can have: all but the dummy."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can hand out now."""
        return len(self._free)

    @property
    def num_live(self) -> int:
        """Blocks with at least one holder."""
        return self.num_usable - len(self._free)

    @property
    def holders(self) -> dict[int, int]:
        """Number of holders, ascending, to how many blocks have so many; those that nobody holds are left out."""
        several = {count: self._shared[count] for count in sorted(self._shared) if self._shared[count]}
        single = self.num_live - sum(several.values())
        return {1: single, **several} if single else several

    @property
    def counts(self) -> Sequence[int]:
        """How many hold each block, by id; to be read, and only until something changes."""
        return self._counts

    def count(self, block: int) -> int:
        """How many hold a block."""
        return self._counts[block]

    def is_free(self, block: int) -> bool:
        """Whether nobody holds the block."""
        return block in self._free

    def allocate(self) -> int:
        """A free block, now held once.

        Raises:
          IndexError: nothing is free; callers look at ``num_free`` first.
        """
        if not self._free:
            raise IndexError("BlockAllocator: no free block")
        block, _ = self._free.popitem(last=False)
        self.num_cached -= block in self._cached
        if self._on_reuse is not None:
            self._on_reuse(block)
        self._counts[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more holder; revives a free block with the content it still has."""
        self._check_block(block)
        count = self._counts[block] = self._counts[block] + 1
        if count == 1:
            del self._free[block]
            self.num_cached -= block in self._cached
        else:
            self._count_shared(count, 1)

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less for each block, in this order; the last one out makes it free.

        Callers pass a sequence's blocks last to first: a prefix is only of use from its beginning, so its
        tail should be reused before its head.
        """
        for block in blocks:
            self._check_block(block)
            count = self._counts[block]
            if count <= 0:
                raise ValueError(f"block={block}: released more often than held")
            self._counts[block] = count - 1
            if count == 1:
                self._free[block] = None
                self.num_cached += block in self._cached
            else:
                self._count_shared(count, -1)

    def _count_shared(self, count: int, sign: int) -> None:
        """A block has come to ``count``, at least 2, or has left it."""
        self._shared[count] += sign
        if count > 2:
            self._shared[count - 1] -= sign

    def recount_cached(self) -> None:
        """After free blocks have left ``cached``; O(free), for what hardly ever happens."""
        self.num_cached = sum(block in self._cached for block in self._free)

    def _check_block(self, block: int) -> None:
        if not DUMMY_BLOCK < block < self.num_blocks:
            raise ValueError(f"block={block}: must be in [1, {self.num_blocks - 1}]")

    def check_invariants(self, holders: dict[int, int] | None = None) -> None:
        """Asserts the invariants; ``holders`` maps each live block to the holders its owners know of."""
        live = [b for b in range(1, self.num_blocks) if self._counts[b] > 0]
        assert len(live) + len(self._free) == self.num_usable, "free + live != total"
        assert not any(b in self._free for b in live), "a block is free and held"
        assert DUMMY_BLOCK not in self._free, "the dummy is free"
        assert self._counts[DUMMY_BLOCK] == 0, "the dummy is held"
        assert all(count >= 0 for count in self._counts), "a negative count"
        assert self.num_cached == sum(block in self._cached for block in self._free), (
            "cached blocks miscounted"
        )
        assert self.holders == Counter(self._counts[b] for b in live), "holders miscounted"
        if holders is not None:
            assert {b: self._counts[b] for b in live} == holders, "counts differ from the holders"
