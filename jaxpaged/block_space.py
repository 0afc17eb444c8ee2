"""The KV memory as requests see it: growing, sharing, copying on write, letting go."""

import logging
from dataclasses import dataclass, field

from jaxpaged.block_allocator import BlockAllocator
from jaxpaged.prefix_cache import PrefixCache, block_hashes
from jaxpaged.request import Request

logger = logging.getLogger(__name__)


@dataclass
class BlockStats:
    """Counters since the start; read them, do not write them."""

    allocated: int = 0
    reused: int = 0  # blocks taken from the prefix cache
    evicted: int = 0  # cached prefixes lost to a new owner
    copied: int = 0  # copies on write
    prefix_queries: int = 0  # tokens that were looked up
    prefix_hits: int = 0  # tokens that were found


@dataclass
class BlockSpace:
    """Allocator and prefix cache together, for one pool.

    Invariants (``check_invariants``, given all requests): those of the two parts, and each block's count is the
    number of tables that name it; a table covers the tokens computed so far; no table names a block twice;
    only a request that ``may_share`` can write to a block that another one holds.
    """

    num_blocks: int
    block_size: int
    enable_prefix_caching: bool = True
    stats: BlockStats = field(default_factory=BlockStats)

    def __post_init__(self) -> None:
        self.cache = PrefixCache()
        self.allocator = BlockAllocator(self.num_blocks, on_reuse=self._forget)

    def _forget(self, block: int) -> None:
        if self.cache.forget(block):
            self.stats.evicted += 1
            logger.debug("prefix cache: block %d evicted", block)

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return self.allocator.num_free

    def cached_prefix(self, request: Request) -> list[int]:
        """Blocks of the longest cached prefix of a request, never its last token: that must be computed."""
        if not self.enable_prefix_caching or request.needs_all_logits:
            return []
        self._hash_full_blocks(request, request.num_tokens)
        usable = (request.num_tokens - 1) // self.block_size
        return self.cache.find(request.block_hashes[:usable])

    def num_revived(self, blocks: list[int]) -> int:
        """How many of these blocks are free now, so that holding them uses up free memory."""
        return sum(self.allocator.is_free(block) for block in blocks)

    def adopt(self, request: Request, blocks: list[int]) -> None:
        """Gives a request with an empty table a cached prefix."""
        assert not request.table.ids, "adopt needs an empty table"
        for block in blocks:
            self.allocator.hold(block)
        request.table.ids.extend(blocks)
        request.num_computed_tokens = request.num_cached_tokens = len(blocks) * self.block_size
        if self.enable_prefix_caching:
            self.stats.prefix_queries += request.num_tokens
            self.stats.prefix_hits += request.num_cached_tokens
            self.stats.reused += len(blocks)

    def fork(self, parent: Request, child: Request, num_tokens: int) -> None:
        """Lets ``child`` share the blocks that hold the parent's first ``num_tokens`` tokens."""
        assert not child.table.ids, "fork needs an empty table"
        blocks = parent.table.ids[: -(-num_tokens // self.block_size)]
        for block in blocks:
            self.allocator.hold(block)
        child.table.ids.extend(blocks)
        parent.may_share = child.may_share = True

    def blocks_to_grow(self, request: Request, num_tokens: int) -> int:
        """Free blocks it takes to compute up to ``num_tokens``, a copy on write included."""
        return request.table.missing(num_tokens) + self._writes_shared(request)

    def _writes_shared(self, request: Request) -> bool:
        """Whether the first token to compute lies in a block that others hold as well."""
        index = request.num_computed_tokens // self.block_size
        ids = request.table.ids
        return index < len(ids) and self.allocator.count(ids[index]) > 1

    def grow(self, request: Request, num_tokens: int) -> tuple[int, int] | None:
        """Makes room for ``num_tokens`` tokens; the caller saw that ``blocks_to_grow`` are free.

        Returns:
          (source, target) of a block to copy before the step writes, or None.
        """
        copy = None
        ids = request.table.ids
        if self._writes_shared(request):
            index = request.num_computed_tokens // self.block_size
            copy = (ids[index], self.allocator.allocate())
            self.allocator.release([ids[index]])
            ids[index] = copy[1]
            self.stats.copied += 1
            self.stats.allocated += 1
        self.append_blocks(request, num_tokens)
        return copy

    def append_blocks(self, request: Request, num_tokens: int) -> None:
        """Adds the blocks that ``num_tokens`` tokens still miss; the caller saw that they are free."""
        missing = request.table.missing(num_tokens)
        for _ in range(missing):
            request.table.ids.append(self.allocator.allocate())
        self.stats.allocated += missing

    def publish(self, request: Request, num_tokens: int) -> list[int]:
        """Makes the blocks that are full at ``num_tokens`` findable; returns those that are new in the cache.

        May be called before the step that fills them has run: within a step every layer writes all keys and
        values before any query reads, so another request of the same step can already use them.
        """
        if not self.enable_prefix_caching:
            return []
        self._hash_full_blocks(request, num_tokens)
        new = []
        for index in range(request.num_published, num_tokens // self.block_size):
            block = request.table.ids[index]
            if self.cache.add(block, request.block_hashes[index]):
                new.append(block)
        request.num_published = max(request.num_published, num_tokens // self.block_size)
        return new

    def _hash_full_blocks(self, request: Request, num_tokens: int) -> None:
        if num_tokens // self.block_size > len(request.block_hashes):
            tokens = request.token_ids
            request.block_hashes += block_hashes(
                tokens, self.block_size, request.block_hashes, request.cache_salt
            )

    def unpublish(self, blocks: list[int]) -> None:
        """Drops blocks whose step failed."""
        for block in blocks:
            self.cache.forget(block)

    def release(self, request: Request) -> None:
        """Lets go of all blocks of a request; nothing of it counts as computed any more."""
        self.allocator.release(reversed(request.table.ids))
        request.table.ids.clear()
        request.num_computed_tokens = request.num_published = 0
        request.may_share = False

    def check_invariants(self, requests: list[Request]) -> None:
        """Asserts the invariants over every request that may hold blocks."""
        holders: dict[int, int] = {}
        for request in requests:
            assert len(set(request.table.ids)) == len(request.table.ids), "a table names a block twice"
            assert request.num_computed_tokens <= request.table.capacity, "computed tokens without a block"
            index = request.num_computed_tokens // self.block_size
            if index < len(request.table) and self.allocator.count(request.table.ids[index]) > 1:
                assert request.may_share, "would write to a shared block without knowing"
            for block in request.table:
                holders[block] = holders.get(block, 0) + 1
        self.allocator.check_invariants(holders)
        self.cache.check_invariants()
