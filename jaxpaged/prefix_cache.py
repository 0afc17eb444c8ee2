"""Which full blocks can be used again: a hash chain over their tokens.

The hash of a block covers its tokens and the hash of the block before it, so it names a whole prefix; a
prefix is found by walking down from its first block (vLLM's design of automatic prefix caching).
sha256 rather than Python's ``hash``: a collision would show one user another one's text, and tokens are
the client's choice.
"""

import hashlib
from array import array
from collections.abc import Collection, Iterable, Sequence


def block_hashes(
    token_ids: Sequence[int], block_size: int, known: Sequence[bytes] = (), salt: str | None = None
) -> list[bytes]:
    """Hashes of the full blocks of a sequence that come after those ``known``.

    Args:
      token_ids: the whole sequence.
      block_size: tokens a block.
      known: hashes of the leading blocks, if computed before.
      salt: sequences with different salts share nothing.

    Returns:
      32-byte digests of the blocks ``len(known) ..``.
    """
    parent = (
        known[-1] if known else hashlib.sha256(b"" if salt is None else b"salt:" + salt.encode()).digest()
    )
    hashes = []
    for start in range(len(known) * block_size, len(token_ids) - block_size + 1, block_size):
        tokens = array("q", token_ids[start : start + block_size])
        parent = hashlib.sha256(parent + tokens.tobytes()).digest()
        hashes.append(parent)
    return hashes


def group_key(digest: bytes, group: int) -> bytes:
    """The name of a block in one group of layers: groups keep different things of the same tokens."""
    return digest if group == 0 else digest + group.to_bytes(2)


class PrefixCache:
    """Block hash to block and back. Knows nothing of holders: a cached block may be live or free.

    Invariants (``check_invariants``): the two maps are each other's inverse; a block has at most one hash.
    """

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block: int) -> bool:
        return block in self._hash_of

    @property
    def blocks(self) -> Collection[int]:
        """The cached blocks, live or free; changes with the cache."""
        return self._hash_of.keys()

    def get(self, digest: bytes) -> int | None:
        """The block of a hash."""
        return self._block_of.get(digest)

    def key_of(self, block: int) -> bytes | None:
        """The hash of a block."""
        return self._hash_of.get(block)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix."""
        blocks = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def add(self, block: int, digest: bytes) -> bool:
        """Makes a full block findable; False when another block already stands for this prefix."""
        if digest in self._block_of or block in self._hash_of:
            return False
        self._block_of[digest] = block
        self._hash_of[block] = digest
        return True

    def forget(self, block: int) -> bool:
        """Drops a block, because its content is about to change; False when it was not cached."""
        digest = self._hash_of.pop(block, None)
        if digest is None:
            return False
        del self._block_of[digest]
        return True

    def clear(self) -> None:
        """Drops everything: after new weights no old prefix holds."""
        self._block_of.clear()
        self._hash_of.clear()

    def check_invariants(self) -> None:
        """Asserts that the two maps are inverse."""
        assert len(self._block_of) == len(self._hash_of), "maps of different size"
        assert all(self._block_of[h] == b for b, h in self._hash_of.items()), "maps are not inverse"
