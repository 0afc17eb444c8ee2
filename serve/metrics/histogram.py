"""Counts of observations in fixed buckets, cheap enough for the engine's thread."""

import math
import threading
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise


class Histogram:
    """How many observations fell below which bounds, and their sum.

    ``prometheus_client`` has one too, but a step gives the same gap to many tokens at once, which that one would have
    to be told token by token.

    Any thread may observe, and read at the same time. Invariants (``check_invariants``): the bounds ascend strictly and
    are finite; there is one count for each and one for what exceeds all; counts and sum only grow.

    Args:
      bounds: upper bounds of the buckets, each included in its bucket.

    Raises:
      ValueError: ``bounds`` is empty, does not ascend or holds something that is not finite.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(float(bound) for bound in bounds)
        ascends = all(low < high for low, high in pairwise(self.bounds))
        if not self.bounds or not ascends or not all(map(math.isfinite, self.bounds)):
            raise ValueError(f"bounds={bounds!r}: must be finite numbers that ascend")
        self._lock = threading.Lock()
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Adds ``count`` observations of ``value``; one that is negative or not finite is left out.

        Such a value says nothing, and would spoil the sum for good.
        """
        if not 0.0 <= value < math.inf:
            return
        place = bisect_left(self.bounds, value)
        with self._lock:
            self._counts[place] += count
            self._sum += value * count

    def read(self) -> tuple[list[int], float]:
        """How many observations are at most each bound, then how many there are at all, and the sum of all."""
        with self._lock:
            counts, total = self._counts.copy(), self._sum
        for place in range(1, len(counts)):
            counts[place] += counts[place - 1]
        return counts, total

    def check_invariants(self) -> None:
        """Asserts the invariants."""
        cumulative, total = self.read()
        assert len(cumulative) == len(self.bounds) + 1, "not one count for each bucket"
        assert all(low <= high for low, high in pairwise(cumulative)), "a negative count"
        assert math.isfinite(total), "a sum that is not finite"
        assert total >= 0, "a negative sum"
