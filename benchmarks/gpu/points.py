"""What is measured: batches of one shape each, in the order of what they tell."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

HEADS = ((32, 8), (64, 8), (16, 16))  # query heads, key/value heads
BATCHES = (1, 8, 64, 256)
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
BLOCK_SIZES = (16, 32, 64, 128)
HEAD_DIM = 128
ITEM_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Point:
    """One decode batch: every row has one query token.

    Attributes:
      lengths: tokens of each row in the cache, its new one included.
      num_heads, num_kv_heads, head_dim, block_size: as in the pool.
    """

    lengths: tuple[int, ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    block_size: int = 16
    head_dim: int = HEAD_DIM

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.lengths)

    @property
    def context(self) -> int:
        """The longest row."""
        return max(self.lengths)

    @property
    def is_uniform(self) -> bool:
        """Whether all rows have one length."""
        return min(self.lengths) == max(self.lengths)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of all rows, each counted once: what must be read."""
        return 2 * sum(self.lengths) * self.num_kv_heads * self.head_dim * ITEM_BYTES

    @property
    def padded_bytes(self) -> int:
        """The same where every row takes as much as the longest."""
        return 2 * self.batch * self.context * self.num_kv_heads * self.head_dim * ITEM_BYTES

    def as_json(self) -> dict[str, object]:
        """The shape; ``lengths`` only where they differ."""
        found: dict[str, object] = {
            "batch": self.batch,
            "context": self.context,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "block_size": self.block_size,
            "kv_bytes": self.kv_bytes,
        }
        if not self.is_uniform:
            found["lengths"] = list(self.lengths)
        return found


def uniform(batch: int, context: int, heads: tuple[int, int] = HEADS[0], block_size: int = 16) -> Point:
    """A batch of rows of one length."""
    return Point((context,) * batch, *heads, block_size)


@dataclass(frozen=True)
class Bar:
    """A point with the share of copy bandwidth that it must reach."""

    point: Point
    share: float

    @property
    def name(self) -> str:
        """``64 rows x 4096``."""
        return f"{self.point.batch} rows x {self.point.context}"


BARS = (Bar(uniform(64, 4096), 0.90), Bar(uniform(1, 131072), 0.85))
RAGGED = Point((131072, *(512 + 24 * i for i in range(63))))


@dataclass(frozen=True)
class Grid:
    """A product of shapes.

    Attributes:
      batches, contexts, heads, block_sizes: the values of each axis.
      head_dim: of all.
    """

    batches: tuple[int, ...] = BATCHES
    contexts: tuple[int, ...] = CONTEXTS
    heads: tuple[tuple[int, int], ...] = HEADS
    block_sizes: tuple[int, ...] = BLOCK_SIZES
    head_dim: int = HEAD_DIM

    def points(self) -> list[Point]:
        """All of them; one block size after the other, and of each the longest contexts first.

        So a run that is cut short has whole tables of the first block sizes.
        """
        product = itertools.product(
            self.block_sizes, self.heads, sorted(self.contexts, reverse=True), self.batches
        )
        found = (uniform(b, c, h, s) for s, h, c, b in product)
        return [replace(point, head_dim=self.head_dim) for point in found]


QUICK = [
    uniform(64, 4096),
    uniform(1, 131072),
    uniform(64, 4096, block_size=64),
    uniform(1, 4096),
    uniform(8, 8192),
    uniform(256, 1024),
    uniform(64, 4096, (64, 8)),
    uniform(64, 4096, (16, 16)),
    uniform(1, 512),
]


@dataclass(frozen=True)
class Scatter:
    """New keys and values of ``num_tokens`` tokens; consecutive slots if ``prefill``, else a row each."""

    num_tokens: int
    prefill: bool
    num_kv_heads: int = 8
    block_size: int = 16
    head_dim: int = HEAD_DIM

    @property
    def moved_bytes(self) -> int:
        """Keys and values, written once."""
        return 2 * self.num_tokens * self.num_kv_heads * self.head_dim * ITEM_BYTES


SCATTERS = (Scatter(64, False), Scatter(256, False), Scatter(2048, True), Scatter(8192, True))


@dataclass(frozen=True)
class Plan:
    """Everything a run measures.

    Attributes:
      bars: points with a bar to reach.
      points: the table, bars included.
      variants_at: where variants are compared with none.
      ragged: a batch of rows of very different length.
      scatters: writes to the pool.
    """

    points: list[Point]
    bars: tuple[Bar, ...] = BARS
    variants_at: tuple[Point, ...] = field(default_factory=lambda: tuple(bar.point for bar in BARS))
    ragged: Point = RAGGED
    scatters: tuple[Scatter, ...] = SCATTERS


def dry_plan() -> Plan:
    """Sizes at which a CPU gets through all of it in seconds."""
    tiny = [Point((length,), 4, 2, 16, 32) for length in (64, 128)]
    bars = tuple(Bar(point, bar.share) for point, bar in zip(tiny, BARS, strict=True))
    return Plan(tiny, bars, tuple(tiny[:1]), Point((64, 16), 4, 2, 16, 32), (Scatter(8, False, 2, 16, 32),))
