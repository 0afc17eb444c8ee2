"""Which host block holds what: swapped-out requests and evicted prefixes in host memory, plain ints, O(1) each."""

from collections import OrderedDict
from collections.abc import Iterable


class HostTier:
    """Hands out the host blocks ``0 .. num_blocks - 1``, to two kinds of users.

    Requests that were swapped out *hold* blocks, each block one request's. Prefix blocks that lost their place on the
    device are *cached* by digest, least recently used first to go: they give way to holders and to newer prefixes.

    The tier knows ids only; ``HostPool`` has the content. It copies in the order in which it is told to, so a
    block may get a new owner while its old content is still to be loaded, under one condition: *copies are issued
    in the order of the calls that gave their ids*. After ``find`` returned a block, a later ``store`` or ``hold`` may
    well return the same one: the load planned with ``find`` goes to the pool before the store that overwrites the
    block, and reads the old content. Nor may all loads go first: a ``store`` makes its digest findable at once, so a
    load of the same scheduling pass may have to come after it. A request's load, likewise, comes before its
    ``release``. Whoever plans a store and does not issue it, or learns that it failed, undoes the plan: ``forget`` the
    digest or ``release`` the blocks.

    Invariants (``check_invariants``):
      * every block is free, held or cached, and only one of them;
      * a cached block has one digest, and a digest one block.

    Args:
      num_blocks: host blocks; 0 is a tier that never has room.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise ValueError(f"num_blocks={num_blocks} must not be negative")
        self.num_blocks = num_blocks
        self.num_evicted = 0  # cached prefixes that gave way, since the start
        # A stack: a block that was in use before has its pages of memory already.
        self._free = list(reversed(range(num_blocks)))
        self._held: set[int] = set()
        self._cached: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._digest_of: dict[int, bytes] = {}  # the other way

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Blocks of swapped-out requests."""
        return len(self._held)

    @property
    def num_cached(self) -> int:
        """Blocks of evicted prefixes."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that ``hold`` could get: free and cached ones."""
        return len(self._free) + len(self._cached)

    def hold(self, count: int) -> list[int] | None:
        """``count`` blocks for a swapped-out request, or None when there are not so many: all or nothing.

        Free blocks come first, then those of the least recently used prefixes.
        """
        if count < 0:
            raise ValueError(f"count={count} must not be negative")
        if count > self.num_available:
            return None
        blocks = [self._take() for _ in range(count)]
        self._held.update(blocks)
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """Frees blocks that a request holds; what they hold is lost.

        Raises:
          ValueError: a block is not held, or named twice; nothing has changed then.
        """
        blocks = list(blocks)
        if len(set(blocks)) != len(blocks) or not self._held.issuperset(blocks):
            raise ValueError(f"blocks={blocks}: each must be held, and be named once")
        self._held.difference_update(blocks)
        self._free.extend(blocks)

    def store(self, digest: bytes) -> int | None:
        """The block to which an evicted prefix block is to be copied; it can be found from now on.

        None when there is nothing to copy: the prefix is here already (it becomes the most recently used), or all
        blocks are held.
        """
        if self.touch(digest) or not self.num_available:
            return None
        block = self._take()
        self._cached[digest] = block
        self._digest_of[block] = digest
        return block

    def find(self, digest: bytes) -> int | None:
        """The block of a cached prefix; does not count as use, see ``touch``."""
        return self._cached.get(digest)

    def touch(self, digest: bytes) -> bool:
        """Makes a cached prefix the most recently used; False when it is not here."""
        if digest not in self._cached:
            return False
        self._cached.move_to_end(digest)
        return True

    def take(self, blocks: Iterable[int]) -> None:
        """Turns cached blocks, as found by ``find``, into held ones: they are about to be loaded, then released."""
        for block in blocks:
            del self._cached[self._digest_of.pop(block)]
            self._held.add(block)

    def forget_block(self, block: int) -> None:
        """Drops the cached prefix that lies in a block, if one does: its store failed."""
        digest = self._digest_of.get(block)
        if digest is not None:
            self.forget(digest)

    def forget(self, digest: bytes) -> bool:
        """Drops a cached prefix; False when it was not here."""
        block = self._cached.pop(digest, None)
        if block is None:
            return False
        del self._digest_of[block]
        self._free.append(block)
        return True

    def clear(self) -> None:
        """Drops all cached prefixes: after new weights none of them holds. Held blocks stay."""
        self._free.extend(self._cached.values())
        self._cached.clear()
        self._digest_of.clear()

    def _take(self) -> int:
        """A block without an owner; the caller saw that one is available."""
        if self._free:
            return self._free.pop()
        self.num_evicted += 1
        _, block = self._cached.popitem(last=False)
        del self._digest_of[block]
        return block

    def check_invariants(self, held: Iterable[int] | None = None) -> None:
        """Asserts the invariants; ``held`` are the blocks that swapped-out requests know of."""
        parts = [*self._free, *self._held, *self._cached.values()]
        assert len(parts) == self.num_blocks, "free + held + cached != total"
        assert set(parts) == set(range(self.num_blocks)), "a block is in two places, or is none of ours"
        assert self._digest_of == {block: digest for digest, block in self._cached.items()}, (
            "maps not inverse"
        )
        if held is not None:
            known = list(held)
            assert len(known) == len(set(known)), "two requests hold one block"
            assert set(known) == self._held, "held blocks differ from those of the requests"
