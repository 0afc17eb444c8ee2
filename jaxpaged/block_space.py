"""The KV memory as requests see it: growing, sharing, copying on write, swapping out, letting go.

A request has one block table for each group of layers (``KVLayout``). All groups draw on one allocator. In a group of
sliding-window layers the blocks behind the window are given back while the request runs; a 0 stands in the table where
they were, the dummy block, which attention does not look at.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from jaxpaged.block_allocator import DUMMY_BLOCK, BlockAllocator
from jaxpaged.block_table import BlockTable
from jaxpaged.host_tier import HostTier
from jaxpaged.pinned_prefixes import PinnedPrefixes
from jaxpaged.prefix_cache import PrefixCache, block_hashes, group_key
from jaxpaged.request import Request
from jaxpaged.step_plan import Move, MoveKind
from jaxpaged.unused_slots import UnusedSlots

logger = logging.getLogger(__name__)


@dataclass
class BlockStats:
    """Counters since the start; read them, do not write them."""

    allocated: int = 0
    reused: int = 0  # blocks taken from the prefix cache
    evicted: int = 0  # cached prefixes lost to a new owner
    copied: int = 0  # copies on write
    trimmed: int = 0  # blocks given back behind a sliding window
    swapped_out: int = 0  # blocks of preempted requests that went to the host
    swapped_in: int = 0  # and came back
    demoted: int = 0  # evicted prefix blocks that went to the host
    promoted: int = 0  # and came back
    requests_swapped_in: int = 0
    prefix_queries: int = 0  # tokens that were looked up
    prefix_hits: int = 0  # tokens that were found


@dataclass(frozen=True)
class Entry:
    """What a waiting request can begin with, before it holds any of it.

    ``tables`` has one list for each group: a block that is found in the cache, ``-1 - h`` for host block ``h``, or 0
    for a hole. None for a request that holds its blocks already, after a fork.
    """

    num_computed_tokens: int
    tables: list[list[int]] | None


@dataclass
class BlockSpace:
    """Allocator, prefix cache, pins and host tier together, for one pool.

    Invariants (``check_invariants``, given all requests): those of the parts, and each block's count is the number of
    tables and pins that name it; a table covers the tokens computed so far, but for holes behind a window; no
    table names a block twice; only a request that ``may_share`` can write to a block that another one holds.

    Args:
      num_blocks, block_size: of the pool.
      enable_prefix_caching: whether full blocks are found again.
      windows: for each group of layers its sliding window in tokens, None for full attention.
      host: host memory for what is pushed out, or None.
    """

    num_blocks: int
    block_size: int
    enable_prefix_caching: bool = True
    windows: tuple[int | None, ...] = (None,)
    host: HostTier | None = None
    stats: BlockStats = field(default_factory=BlockStats)

    def __post_init__(self) -> None:
        self.cache = PrefixCache()
        self.allocator = BlockAllocator(self.num_blocks, self._evict, self.cache.blocks)
        self.pins = PinnedPrefixes(self.allocator, self.cache)
        self.has_windows = any(window is not None for window in self.windows)
        self._moves: list[Move] = []
        self.unused = UnusedSlots(self.allocator, self.block_size, len(self.windows))
        self.num_swapped = 0  # requests whose blocks are on the host

    def _evict(self, block: int) -> None:
        """A free block is about to get a new owner: what it holds goes to the host, if that has room."""
        key = self.cache.key_of(block)
        if key is None:
            return
        self.cache.forget(block)
        self.stats.evicted += 1
        target = None if self.host is None else self.host.store(key)
        if target is not None:
            self._moves.append(Move(MoveKind.SWAP_OUT, block, target))
            self.stats.demoted += 1
        logger.debug("prefix cache: block %d evicted%s", block, "" if target is None else " to the host")

    def take_moves(self) -> list[Move]:
        """The moves planned since the last call, in the order in which they have to happen."""
        moves, self._moves = self._moves, []
        return moves

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return self.allocator.num_free

    def peak_blocks(self, num_tokens: int, max_chunk: int) -> int:
        """Blocks that one request of so many computed tokens needs at most, in steps of up to ``max_chunk``."""
        every = -(-num_tokens // self.block_size)
        return sum(
            every if window is None else min(every, (window + max_chunk - 3) // self.block_size + 2)
            for window in self.windows
        )

    # Entering: what a waiting request finds, and taking it.

    def plan_entry(self, request: Request) -> Entry:
        """What a request of the waiting queue can begin with."""
        if request.host_tables is not None:
            return Entry(request.num_computed_tokens, [self._swapped(request, g) for g in self._groups()])
        if request.holds_blocks:
            return Entry(request.num_computed_tokens, None)
        num_blocks, tables = self._longest_prefix(request)
        return Entry(num_blocks * self.block_size, tables)

    def _groups(self) -> range:
        return range(len(self.windows))

    def _swapped(self, request: Request, group: int) -> list[int]:
        """The blocks of a swapped-out request; full ones that are still in the pool need not come from the host."""
        assert request.host_tables is not None, "not swapped out"
        found = []
        for index, host_block in enumerate(request.host_tables[group]):
            block = None
            if host_block >= 0 and index < min(len(request.block_hashes), self._num_full(request)):
                block = self.cache.get(group_key(request.block_hashes[index], group))
            found.append(block or (-1 - host_block if host_block >= 0 else DUMMY_BLOCK))
        return found

    def _num_full(self, request: Request) -> int:
        return request.num_computed_tokens // self.block_size

    def _longest_prefix(self, request: Request) -> tuple[int, list[list[int]]]:
        """Cached blocks of the longest prefix, never the last token: that must be computed."""
        none: list[list[int]] = [[] for _ in self._groups()]
        if not self.enable_prefix_caching or request.needs_all_logits:
            return 0, none
        self._hash_full_blocks(request, request.num_tokens)
        hashes = request.block_hashes[: (request.num_tokens - 1) // self.block_size]
        found = [self._findable(hashes, group) for group in self._groups()]
        length = min(
            (len(f) for f, window in zip(found, self.windows, strict=True) if window is None),
            default=len(hashes),
        )
        # A group with a window needs only the blocks that the next token's window reaches.
        while length > 0 and not all(
            all(found[group][self._first_needed(group, length * self.block_size) : length])
            for group in self._groups()
            if self.windows[group] is not None
        ):
            length -= 1
        for group in self._groups():
            first = self._first_needed(group, length * self.block_size)
            none[group] = [0] * first + found[group][first:length]
        return length, none

    def _findable(self, hashes: Sequence[bytes], group: int) -> list[int]:
        """Items as in ``Entry.tables``, up to the first that is missing; past it, with 0, in a group with a window."""
        found, stops = [], self.windows[group] is None
        for digest in hashes:
            key = group_key(digest, group)
            block = self.cache.get(key)
            if block is None and self.host is not None:
                host_block = self.host.find(key)
                block = None if host_block is None else -1 - host_block
            if block is None and stops:
                break
            found.append(block or 0)
        return found

    def _first_needed(self, group: int, position: int) -> int:
        """Index of the first block that the token at ``position`` attends to in a group."""
        window = self.windows[group]
        return 0 if window is None else max(0, position - window + 1) // self.block_size

    def blocks_to_enter(self, request: Request, entry: Entry, num_tokens: int) -> int:
        """Free blocks it takes to begin with ``entry`` and to compute up to ``num_tokens``."""
        if entry.tables is None:
            return self.blocks_to_grow(request, num_tokens)
        every, needed = -(-num_tokens // self.block_size), 0
        for table in entry.tables:
            needed += max(0, every - len(table))
            needed += sum(item < 0 or (item > 0 and self.allocator.is_free(item)) for item in table)
        return needed

    def enter(self, request: Request, entry: Entry) -> None:
        """Gives a request what ``plan_entry`` found; the caller saw that there is room."""
        if entry.tables is None:
            return
        was_swapped = request.host_tables is not None
        for block in (item for table in entry.tables for item in table if item > 0):
            self.allocator.hold(block)  # all of them before anything is allocated and something evicted
        loads = [(-1 - item) for table in entry.tables for item in table if item < 0]
        if loads and not was_swapped:
            assert self.host is not None, "host blocks without a host tier"
            self.host.take(loads)  # so that what is evicted now cannot go where these still lie
        for table, items in zip(request.tables, entry.tables, strict=True):
            assert not table.ids, "enter needs empty tables"
            table.ids.extend(item if item >= 0 else self._load(-1 - item) for item in items)
        self._leave_host(request if was_swapped else None, loads)
        request.num_computed_tokens = entry.num_computed_tokens
        self.unused.joined(request)
        if was_swapped:
            self.stats.swapped_in += len(loads)
            self.stats.requests_swapped_in += 1
            return
        request.num_cached_tokens = entry.num_computed_tokens
        self.stats.promoted += len(loads)
        if self.enable_prefix_caching:
            self.stats.prefix_queries += request.num_tokens
            self.stats.prefix_hits += request.num_cached_tokens
            self.stats.reused += sum(item > 0 for table in entry.tables for item in table)

    def _load(self, host_block: int) -> int:
        block = self.allocator.allocate()
        self._moves.append(Move(MoveKind.SWAP_IN, host_block, block))
        self.stats.allocated += 1
        return block

    def _leave_host(self, request: Request | None, loads: list[int]) -> None:
        """The host blocks can be used again: whatever is moved there is moved after the loads."""
        if self.host is None:
            return
        if request is None:
            self.host.release(loads)
        elif request.host_tables is not None:
            self.host.release(block for table in request.host_tables for block in table if block >= 0)
            request.host_tables = None
            self.num_swapped -= 1

    def fork(self, parent: Request, child: Request, num_tokens: int) -> bool:
        """Lets ``child`` share the blocks of the parent's first ``num_tokens`` computed tokens.

        Returns:
          Whether it could: what lies behind the parent's sliding window is gone, what is swapped out is not here.
        """
        assert not child.holds_blocks, "fork needs empty tables"
        end = -(-num_tokens // self.block_size)
        if num_tokens > parent.num_computed_tokens or not parent.holds_blocks:
            return False
        for group, table in enumerate(parent.tables):
            if DUMMY_BLOCK in table.ids[self._first_needed(group, num_tokens) : end]:
                return False
        for group, (theirs, own) in enumerate(zip(parent.tables, child.tables, strict=True)):
            first = self._first_needed(group, num_tokens)
            for block in theirs.ids[first:end]:
                self.allocator.hold(block)
            own.ids.extend([DUMMY_BLOCK] * first + theirs.ids[first:end])
        child.num_computed_tokens = num_tokens
        self.unused.joined(child)
        for request in (parent, child):
            self.unused.set_sharing(request, True)
        return True

    # Growing, while it runs.

    def trim(self, request: Request) -> None:
        """Gives back the blocks that no token from the next one on attends to."""
        for group, table in enumerate(request.tables):
            end = min(self._first_needed(group, request.num_computed_tokens), len(table))
            gone = [block for block in table.ids[table.num_trimmed : end] if block != DUMMY_BLOCK]
            if gone:
                self.allocator.release(gone)
                self.stats.trimmed += len(gone)
            if end > table.num_trimmed:
                table.ids[table.num_trimmed : end] = [DUMMY_BLOCK] * (end - table.num_trimmed)
                table.num_trimmed = end

    def blocks_to_grow(self, request: Request, num_tokens: int) -> int:
        """Free blocks it takes to compute up to ``num_tokens``, copies on write included."""
        needed = request.table.missing(num_tokens) * len(request.tables)  # tables are of one length
        return needed + len(self._shared_tables(request)) if request.may_share else needed

    def _shared_tables(self, request: Request) -> list[BlockTable]:
        """The tables in which the first token to compute lies in a block that others hold as well."""
        index = request.num_computed_tokens // self.block_size
        return [
            table
            for table in request.tables
            if index < len(table.ids) and self.allocator.count(table.ids[index]) > 1
        ]

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Makes room for ``num_tokens`` tokens; the caller saw that ``blocks_to_grow`` are free.

        Returns:
          Whether a block in the middle of a table was replaced, by a copy that the step makes before it writes.
        """
        shared = self._shared_tables(request) if request.may_share else []
        for table in shared:
            index = request.num_computed_tokens // self.block_size
            source, target = table.ids[index], self.allocator.allocate()
            self._moves.append(Move(MoveKind.COPY, source, target))
            self.allocator.release([source])
            table.ids[index] = target
            self.stats.copied += 1
            self.stats.allocated += 1
        if request.may_share:
            self._forget_overwritten(request)
            # From here on it ends in a block of its own: others share full ones only, until the next fork.
            self.unused.set_sharing(request, False)
        self.append_blocks(request, num_tokens)
        return bool(shared)

    def _forget_overwritten(self, request: Request) -> None:
        """A fork that alone is left with a full block writes into it: its old content must not be found any more."""
        index = request.num_computed_tokens // self.block_size
        for group, table in enumerate(request.tables):
            key = self.cache.key_of(table.ids[index]) if index < len(table.ids) else None
            if key is None:
                continue
            self._hash_full_blocks(request, request.num_tokens)
            own = request.block_hashes[index : index + 1]
            if not own or group_key(own[0], group) != key:
                self.cache.forget(table.ids[index])

    def append_blocks(self, request: Request, num_tokens: int) -> None:
        """Adds the blocks that ``num_tokens`` tokens still miss; the caller saw that they are free."""
        missing = request.table.missing(num_tokens)
        if not missing:
            return
        for table in request.tables:
            for _ in range(missing):
                table.ids.append(self.allocator.allocate())
        self.stats.allocated += missing * len(request.tables)
        self.unused.grown(missing * len(request.tables))

    def publish(self, request: Request, num_tokens: int) -> list[int]:
        """Makes the blocks that are full at ``num_tokens`` findable; returns those that are new in the cache.

        May be called before the step that fills them has run: within a step every layer writes all keys and
        values before any query reads, so another request of the same step can already use them.
        """
        if not self.enable_prefix_caching or num_tokens // self.block_size <= request.num_published:
            return []
        self._hash_full_blocks(request, num_tokens)
        new = []
        for index in range(request.num_published, num_tokens // self.block_size):
            for group, table in enumerate(request.tables):
                block, key = table.ids[index], group_key(request.block_hashes[index], group)
                if block != DUMMY_BLOCK and self.cache.add(block, key):
                    new.append(block)
                    if self.pins.wanted:
                        self.pins.published(block, key)
        request.num_published = num_tokens // self.block_size
        return new

    def _hash_full_blocks(self, request: Request, num_tokens: int) -> None:
        if num_tokens // self.block_size > len(request.block_hashes):
            tokens = request.token_ids
            request.block_hashes += block_hashes(
                tokens, self.block_size, request.block_hashes, request.cache_salt
            )

    def unpublish(self, blocks: Iterable[int], moves: Iterable[Move] = ()) -> None:
        """Drops what a failed step was to write: blocks, and prefixes on their way to the host."""
        for block in blocks:
            self.cache.forget(block)
            self.pins.forget(block)
        self.allocator.recount_cached()
        if self.host is not None:
            for move in moves:
                if move.kind is MoveKind.SWAP_OUT:
                    self.host.forget_block(move.target)

    # Leaving.

    def swap_out(self, request: Request) -> bool:
        """Moves the blocks of a request to the host; False when that has no room for all of them."""
        self.trim(request)  # what it brings back must leave room for a step
        count = sum(block != DUMMY_BLOCK for table in request.tables for block in table.ids)
        held = None if self.host is None else self.host.hold(count)
        if held is None:
            return False
        targets, host_tables = iter(held), []
        for table in request.tables:
            host_tables.append([-1 if block == DUMMY_BLOCK else next(targets) for block in table.ids])
            self._moves += [
                Move(MoveKind.SWAP_OUT, block, target)
                for block, target in zip(table.ids, host_tables[-1], strict=True)
                if target >= 0
            ]
        computed = request.num_computed_tokens
        self.release(request)
        request.num_computed_tokens, request.host_tables = computed, host_tables
        self.num_swapped += 1
        self.stats.swapped_out += count
        return True

    def release(self, request: Request) -> None:
        """Lets go of all blocks of a request; nothing of it counts as computed any more."""
        self.unused.left(request)
        for table in request.tables:
            self.allocator.release(block for block in reversed(table.ids) if block != DUMMY_BLOCK)
            table.clear()
        self._leave_host(request, [])
        request.num_computed_tokens = request.num_published = 0

    def forget_everything(self) -> None:
        """The content of the pool was lost: no prefix is to be found, here or on the host; pins wait anew."""
        self.pins.release_blocks()
        self.cache.clear()
        self.allocator.recount_cached()
        if self.host is not None:
            self.host.clear()

    def check_invariants(self, requests: list[Request]) -> None:
        """Asserts the invariants over every request that may hold blocks."""
        self.pins.check_invariants()
        holders = self.pins.holders()
        on_host: list[int] = []
        for request in requests:
            for table in request.tables:
                ids = [block for block in table.ids if block != DUMMY_BLOCK]
                assert len(set(ids)) == len(ids), "a table names a block twice"
                assert len(table) == len(request.table), "tables of different length"
                if request.host_tables is None:
                    assert request.num_computed_tokens <= table.capacity, "computed tokens without a block"
                for block in ids:
                    holders[block] = holders.get(block, 0) + 1
            assert request.num_published <= len(request.table), "published blocks that it does not hold"
            if self._shared_tables(request):
                assert request.may_share, "would write to a shared block without knowing"
            if request.host_tables is not None:
                assert not request.holds_blocks, "in the pool and swapped out"
                on_host += [block for table in request.host_tables for block in table if block >= 0]
        assert self.num_swapped == sum(r.host_tables is not None for r in requests), "swapped out miscounted"
        self.unused.check_invariants(requests)
        self.allocator.check_invariants(holders)
        self.cache.check_invariants()
        if self.host is not None:
            self.host.check_invariants(on_host)
