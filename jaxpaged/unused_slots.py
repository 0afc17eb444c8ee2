"""How many slots of live blocks hold nothing: the ends of last blocks, which only their holders can use."""

from collections.abc import Iterable

from jaxpaged.block_allocator import DUMMY_BLOCK, BlockAllocator
from jaxpaged.request import Request


class UnusedSlots:
    """Counts them as blocks and tokens come and go, in O(1), without looking at any table.

    Every table's unused end is counted. After a fork several tables may end in one block, until each of their requests
    writes: those requests are known, and ``count`` takes out what is counted more than once.

    Invariants (``check_invariants``): the sum is that over all tables; known are the requests that ``may_share``.

    Args:
      allocator: knows how many hold a block.
      block_size: slots a block.
      num_tables: tables of a request.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int, num_tables: int) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self._num_tables = num_tables
        self._sum = 0
        self._sharing: set[Request] = set()

    def count(self) -> int:
        """The slots; O(1) for each request that may share its last block."""
        if not self._sharing:
            return self._sum
        # Holders of a block that is not full end in it and may share it. Whoever else holds one has filled it.
        ends: dict[int, list[int]] = {}
        for request in self._sharing:
            for table in request.tables:
                if table.ids and table.ids[-1] != DUMMY_BLOCK:
                    ends.setdefault(table.ids[-1], []).append(table.capacity - request.num_computed_tokens)
        surplus = 0
        for block, unused in ends.items():
            is_full = self._allocator.count(block) > len(unused)
            surplus += sum(unused) - (0 if is_full else min(unused))
        return self._sum - surplus

    def joined(self, request: Request) -> None:
        """A request has got its first blocks and computed tokens."""
        self._sum += _unused(request)

    def grown(self, num_blocks: int) -> None:
        """Tables have got further blocks."""
        self._sum += num_blocks * self._block_size

    def written(self, num_tokens: int) -> None:
        """Requests have computed further tokens, each of which fills a slot a table."""
        self._sum -= num_tokens * self._num_tables

    def left(self, request: Request) -> None:
        """A request is about to let go of its blocks, if it has any."""
        self._sum -= _unused(request)
        self.set_sharing(request, False)

    def set_sharing(self, request: Request, may_share: bool) -> None:
        """Sets whether the block that a request writes to next may have another holder."""
        request.may_share = may_share
        if may_share:
            self._sharing.add(request)
        else:
            self._sharing.discard(request)

    def check_invariants(self, requests: Iterable[Request]) -> None:
        """Asserts the invariants over every request that may hold blocks."""
        known = list(requests)
        assert self._sum == sum(map(_unused, known)), "unused slots miscounted"
        assert self._sharing == {request for request in known if request.may_share}, "sharing without notice"


def _unused(request: Request) -> int:
    """What is unused of a request's blocks, whoever else holds them."""
    if not request.holds_blocks:
        return 0
    return sum([table.capacity - request.num_computed_tokens for table in request.tables])
