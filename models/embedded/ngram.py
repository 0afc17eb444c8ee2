"""The baseline to beat: an interpolated Kneser-Ney n-gram model over the same tokens.

Method: Kneser and Ney 1995 in the interpolated form of Chen and Goodman 1999 (doi:10.1006/csla.1999.0128), one absolute
discount per order, lower orders from continuation counts, ending in the uniform distribution.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Order:
    """Counts of the n-grams of one length; keys are n-grams packed into integers, sorted."""

    keys: np.ndarray
    counts: np.ndarray
    context_keys: np.ndarray
    context_totals: np.ndarray  # sum of the counts of a context's n-grams
    context_types: np.ndarray  # number of distinct tokens that follow a context
    discount: float


class KneserNey:
    """Probabilities of tokens given the ``order - 1`` before them."""

    def __init__(self, stream: np.ndarray, *, order: int, vocab_size: int) -> None:
        """Counts a training stream of token ids [T].

        Raises ``ValueError`` when ``order`` n-grams do not fit into 64-bit keys.
        """
        if order < 1 or vocab_size**order > 2**63:
            raise ValueError(f"KneserNey: order={order} with vocab_size={vocab_size} does not fit 64 bits")
        self.order, self.vocab_size = order, vocab_size
        keys, counts = np.unique(_pack(stream, order, vocab_size), return_counts=True)
        self._orders: list[_Order] = []
        for length in range(order, 0, -1):
            self._orders.insert(0, _summarise(keys, counts, vocab_size))
            # Continuation counts: how many different tokens precede the n-gram without its first token.
            keys, counts = np.unique(keys % vocab_size ** (length - 1), return_counts=True)

    def log_probs(self, stream: np.ndarray) -> np.ndarray:
        """Natural log-probability float64 [T - 1] of every token of ``stream`` [T] but the first."""
        probs = np.full(len(stream) - 1, 1.0 / self.vocab_size)
        for length in range(1, self.order + 1):
            # The first tokens have too little context for the longer n-grams and keep the shorter ones' estimate.
            scored = slice(max(length - 2, 0), None)
            keys = _pack(stream, length, self.vocab_size)
            if length == 1:
                keys = keys[1:]
            probs[scored] = self._interpolate(self._orders[length - 1], keys, probs[scored])
        return np.log(probs)

    def _interpolate(self, order: _Order, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
        counts = _look_up(order.keys, order.counts, keys)
        contexts = keys // self.vocab_size
        totals = _look_up(order.context_keys, order.context_totals, contexts)
        types = _look_up(order.context_keys, order.context_types, contexts)
        seen = np.maximum(totals, 1)
        probs = (np.maximum(counts - order.discount, 0.0) + order.discount * types * lower) / seen
        return np.where(totals > 0, probs, lower)


def _pack(stream: np.ndarray, length: int, vocab_size: int) -> np.ndarray:
    """Every n-gram of ``length`` tokens as one integer, the oldest token in the highest digits."""
    keys = np.zeros(len(stream) - length + 1, np.int64)
    for offset in range(length):
        keys = keys * vocab_size + stream[offset : offset + len(keys)]
    return keys


def _summarise(keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> _Order:
    context_keys, starts, types = np.unique(keys // vocab_size, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, starts)
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    discount = once / (once + 2 * twice) if once and twice else 0.5
    return _Order(keys, counts, context_keys, totals, types, discount)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[i] where keys[i] == wanted, else 0."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
