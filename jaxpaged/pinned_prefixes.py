"""Prefixes that stay: pins hold the blocks of a prefix for a time, whether anybody uses them or not."""

import logging
from collections.abc import Iterable

from jaxpaged.block_allocator import BlockAllocator
from jaxpaged.prefix_cache import PrefixCache

logger = logging.getLogger(__name__)


class PinnedPrefixes:
    """Which prefixes are pinned, until when, and the blocks they hold for it.

    A pin names blocks by their cache keys, so it can be set before the prefix was ever computed: it takes hold of each
    block when that is published. Invariants: every block of a pin is held once for it in the allocator, and is in the
    cache under one of its keys.
    """

    def __init__(self, allocator: BlockAllocator, cache: PrefixCache) -> None:
        self._allocator = allocator
        self._cache = cache
        self._expires: dict[str, float | None] = {}
        self._keys: dict[str, tuple[bytes, ...]] = {}  # in the order in which they were given
        self._blocks: dict[str, dict[int, bytes]] = {}
        self.wanted: dict[bytes, set[str]] = {}  # key to the pins that name it

    def __contains__(self, pin: str) -> bool:
        return pin in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def blocks(self) -> set[int]:
        """The blocks that are held."""
        return {block for blocks in self._blocks.values() for block in blocks}

    @property
    def num_keys(self) -> int:
        """Blocks that will be held once all pinned prefixes are computed."""
        return len(self.wanted)

    def has_room(self, pin: str, keys: Iterable[bytes], limit: int) -> bool:
        """Whether all pins together, this one with these keys, name at most so many blocks."""
        others = [names for name, names in self._keys.items() if name != pin]
        return len(frozenset(keys).union(*others)) <= limit

    def add(self, pin: str, keys: Iterable[bytes], expires: float | None) -> int:
        """Pins blocks until ``expires`` (seconds of ``time.monotonic``; None for good); again: from now on anew.

        ``keys`` come first to last: blocks are let go of the other way, since a prefix is found from its beginning.
        Returns how many of them are in the pool already.
        """
        self.remove(pin)
        self._expires[pin], self._keys[pin], self._blocks[pin] = expires, tuple(dict.fromkeys(keys)), {}
        for key in self._keys[pin]:
            self.wanted.setdefault(key, set()).add(pin)
            block = self._cache.get(key)
            if block is not None:
                self._hold(pin, block, key)
        return len(self._blocks[pin])

    def _hold(self, pin: str, block: int, key: bytes) -> None:
        self._allocator.hold(block)
        self._blocks[pin][block] = key

    def published(self, block: int, key: bytes) -> None:
        """A block came into the cache."""
        for pin in self.wanted.get(key, ()):
            self._hold(pin, block, key)

    def forget(self, block: int) -> None:
        """A block left the cache, because what it holds is not to be relied on."""
        for blocks in self._blocks.values():
            if blocks.pop(block, None) is not None:
                self._allocator.release([block])

    def remove(self, pin: str) -> bool:
        """Ends a pin; False when there was none of this name."""
        if pin not in self._keys:
            return False
        self._release(pin)
        del self._blocks[pin]
        for key in self._keys.pop(pin):
            self.wanted[key].discard(pin)
            if not self.wanted[key]:
                del self.wanted[key]
        del self._expires[pin]
        return True

    def expire(self, now: float) -> list[str]:
        """Ends the pins whose time is over; returns their names."""
        over = [pin for pin, expires in self._expires.items() if expires is not None and expires <= now]
        for pin in over:
            self.remove(pin)
            logger.info("prefix pin %s expired", pin)
        return over

    def give_way(self) -> bool:
        """Ends the pin that would have ended first, for want of memory; False when no pin holds a block."""
        holding = [pin for pin, blocks in self._blocks.items() if blocks]
        if not holding:
            return False
        first = min(holding, key=lambda pin: (self._expires[pin] is None, self._expires[pin] or 0.0))
        logger.warning(
            "prefix pin %s gives way: a request that runs needs its %d blocks",
            first,
            len(self._blocks[first]),
        )
        return self.remove(first)

    def release_blocks(self) -> None:
        """Lets go of all blocks; the pins stay and take hold again of what is computed anew."""
        for pin in self._blocks:
            self._release(pin)

    def _release(self, pin: str) -> None:
        block_of = {key: block for block, key in self._blocks[pin].items()}
        self._allocator.release(block_of[key] for key in reversed(self._keys[pin]) if key in block_of)
        self._blocks[pin].clear()

    def holders(self) -> dict[int, int]:
        """Block to the number of pins that hold it."""
        counts: dict[int, int] = {}
        for blocks in self._blocks.values():
            for block in blocks:
                counts[block] = counts.get(block, 0) + 1
        return counts

    def check_invariants(self) -> None:
        """Asserts the invariants."""
        assert self._keys.keys() == self._expires.keys() == self._blocks.keys(), "pins half there"
        for pin, blocks in self._blocks.items():
            for block, key in blocks.items():
                assert key in self._keys[pin], "a block that nobody pinned"
                assert self._cache.get(key) == block, "a pinned block that cannot be found"
