"""Which of several replicas a request goes to: the one that knows its prompt's beginning, unless that is much busier.

A replica keeps the KV blocks of what it computed, so a prompt that begins as an earlier one did is cheap where that
one was, and only there. Nothing is remembered here and routers need not talk to each other: a beginning is hashed,
and each hash ranks the replicas by rendezvous hashing (Thaler and Ravishankar 1998), so that a replica that comes or
goes moves the keys that it gets or had, and no others. A replica is passed over while it has more than its share of
what is under way, as in consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018).

A beginning has several lengths. The shortest decides, so that all that begins with the same system prompt meets. Once
its replica is full, the next length does: of a thousand conversations under one system prompt each goes to a
second replica of its own, rather than all to the same, and finds it again at its next turn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

# Bytes of a prompt as JSON: of English some 64, 256 and 1,024 tokens.
DEPTHS = (256, 1024, 4096)
KEY_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class LoadBound:
    """How many requests a replica may have under way and still get those whose beginning it knows.

    Raises ValueError naming what is out of bounds.

    Attributes:
      factor: times the mean of all replicas; the closer to 1, the more even, and the more beginnings move.
      allowance: so many in any case. A batch that is not full takes one more almost for free, wherever it is.
    """

    factor: float = 1.25
    allowance: int = 1

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ValueError(f"factor={self.factor}: must be at least 1")
        if not self.allowance >= 1:
            raise ValueError(f"allowance={self.allowance}: must be at least 1")

    def limit(self, num_requests: int, num_replicas: int) -> int:
        """The most a replica may have, one more than ``num_requests`` on all of them included."""
        return max(self.allowance, math.ceil(self.factor * (num_requests + 1) / num_replicas))


class _Beginning(msgspec.Struct):
    """What of a request's body decides; the rest is skipped, and nothing is decoded."""

    prompt: msgspec.Raw = msgspec.Raw(b"null")
    messages: msgspec.Raw = msgspec.Raw(b"null")
    cache_salt: msgspec.Raw = msgspec.Raw(b"null")


_DECODER = msgspec.json.Decoder(_Beginning)


def body_keys(body: bytes, tenant: str = "", depths: Sequence[int] = DEPTHS) -> tuple[int, ...]:
    """Keys of a body of ``/v1/completions`` or ``/v1/chat/completions``; none if it has no prompt or is no JSON.

    Of several prompts the first ones count. Requests with different ``cache_salt``, or of different tenants, share
    nothing and need not meet.
    """
    try:
        found = _DECODER.decode(body)
    except (msgspec.DecodeError, RecursionError):  # to be told by whoever answers it
        return ()
    messages, prompt = bytes(found.messages), bytes(found.prompt)
    text = prompt if messages == b"null" else messages
    salt = tenant.encode() + b"/" + bytes(found.cache_salt)
    return () if text == b"null" else prefix_keys(text, salt=salt, depths=depths)


def prefix_keys(prompt: bytes, *, salt: bytes = b"", depths: Sequence[int] = DEPTHS) -> tuple[int, ...]:
    """Hashes of 64 bits of the beginnings of ``prompt``, shortest first; the whole of one that is shorter than all.

    Two prompts have as many keys in common as ``depths`` (ascending) are covered by what both begin with.
    """
    ends = [depth for depth in depths if depth <= len(prompt)] or [len(prompt)]
    digest = blake2b(digest_size=KEY_BYTES, key=blake2b(salt, digest_size=16).digest())
    keys, begun = [], 0
    for end in ends:
        digest.update(prompt[begun:end])
        keys.append(int.from_bytes(digest.copy().digest(), "big"))
        begun = end
    return tuple(keys)


def rendezvous_order(key: int, replicas: Sequence[str]) -> list[str]:
    """``replicas`` as ``key`` ranks them; independent of their order here, and of each other."""
    return sorted(replicas, key=lambda name: _weight(key, name), reverse=True)


def placement(keys: Sequence[int], loads: Mapping[str, int], bound: LoadBound) -> list[str]:
    """All replicas, in the order in which to try them.

    The first is within ``bound``: the favourite of the first key whose favourite is, or else the first of the last
    key's ranking that is. After it come the others within the bound, as the last key ranks them, and then those that
    are beyond it. Without keys the least busy come first.

    Args:
      keys: as of ``prefix_keys``.
      loads: requests under way on each replica, by its name.
    """
    if not keys:
        return sorted(loads, key=lambda name: (loads[name], name))
    if not loads:
        return []
    limit = bound.limit(sum(loads.values()), len(loads))
    order = sorted(rendezvous_order(keys[-1], list(loads)), key=lambda name: loads[name] >= limit)
    for key in keys:
        favourite = max(loads, key=lambda name: _weight(key, name))
        if loads[favourite] < limit:
            order.remove(favourite)
            return [favourite, *order]
    return order


def _weight(key: int, name: str) -> bytes:
    return blake2b(name.encode(), digest_size=KEY_BYTES, key=key.to_bytes(KEY_BYTES, "big")).digest()
