"""How often the sampler's searches go round, counted by running them on made-up logits.

The logits of a row are normal, of a deviation that makes its distribution peaked (the nucleus of 0.95 holds about a
hundred to a thousand tokens). All rows go round until the last of them is done.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged import sampler_cutoff
from jaxpaged.pallas_kernels.kept_cutoff.mosaic_gpu import CHUNK, GROUP
from jaxpaged.sampler import FILTER, RANDOM

NUM_ROWS = 16
DEVIATION = 4.5


class SamplingSetting(NamedTuple):
    """Parameters that all rows have."""

    name: str
    flags: int
    top_k: int = 0
    top_p: float = 1.0


SETTINGS = (
    SamplingSetting("greedy", 0),
    SamplingSetting("temperature", RANDOM),
    SamplingSetting("top_p=0.95", RANDOM | FILTER, top_p=0.95),
    SamplingSetting("top_k=50", RANDOM | FILTER, top_k=50),
    SamplingSetting("top_k=50, top_p=0.95", RANDOM | FILTER, top_k=50, top_p=0.95),
)


def made_up_logits(vocab_size: int, num_rows: int = NUM_ROWS) -> np.ndarray:
    """Float32 ``[num_rows, vocab_size]``."""
    rng = np.random.default_rng(0)
    return (DEVIATION * rng.standard_normal((num_rows, vocab_size))).astype(np.float32)


@cache
def count(setting: SamplingSetting, vocab_size: int) -> tuple[int, ...]:
    """Trips of the search for top-k and of that for top-p; nothing where the program does not get there."""
    if not setting.flags & FILTER:
        return ()
    trips = []

    def counted(is_open: Callable[[Any], Any], step: Callable[[Any], Any], carry: Any) -> Any:
        number = 0
        while bool(is_open(carry)):
            carry, number = step(carry), number + 1
        trips.append(number)
        return carry

    with mock.patch.object(sampler_cutoff.lax, "while_loop", counted):
        _cutoff(jnp.asarray(made_up_logits(vocab_size)), setting)
    return tuple(trips)


def kernel_reads(setting: SamplingSetting, vocab_size: int, capacity: int) -> float:
    """Times that the kernel of ``pallas_kernels/kept_cutoff`` reads a row of logits, on average over the rows.

    What stands in the HLO is the pass over the logits that finds the chunks' maxima; this is what the kernel
    adds: a pass for top-p alone, the groups of chunks that it copies, and those that it reads again at each step of
    a search because they did not fit.

    Args:
      setting: parameters of all rows.
      vocab_size: V.
      capacity: chunks that its shared memory holds.
    """
    logits = made_up_logits(vocab_size)
    return float(np.mean([_reads_of(row, setting, capacity) for row in logits]))


def _reads_of(row: np.ndarray, setting: SamplingSetting, capacity: int) -> float:
    chunks = row.reshape(-1, CHUNK).max(axis=1)
    chunks = np.pad(chunks, (0, -len(chunks) % GROUP), constant_values=-np.inf).reshape(-1, GROUP)
    weight = np.exp(row - row.max())
    bound, whole = -np.inf, 0
    if setting.top_k:
        bound = np.sort(chunks.ravel())[-setting.top_k]
    elif setting.top_p < 1:
        bound = row.max() + np.log(0.9 * (1 - setting.top_p) * weight.sum() / len(row))
        whole = len(chunks)
    active = (chunks >= bound).sum(axis=1)
    some = np.flatnonzero(active)
    room = np.cumsum(active[some]) - active[some] + GROUP <= capacity
    copied, left = some[room], some[~room]
    reads = whole + len(copied)
    if len(left):
        for threshold in _thresholds(row, setting):
            reads += (chunks[left].max(axis=1) >= threshold).sum()
    return reads / len(chunks)


def _thresholds(row: np.ndarray, setting: SamplingSetting) -> list[float]:
    """The logits that the searches of one row try, and that of the last pass."""
    tried: list[float] = []
    is_weight = not setting.top_k

    def followed(is_open: Callable[[Any], Any], step: Callable[[Any], Any], carry: Any) -> Any:
        while bool(is_open(carry)):
            new = step(carry)
            image = new[0] if bool(new[0][0] != carry[0][0]) else new[1]
            value = float(sampler_cutoff._value(image)[0])
            tried.append(float(row.max()) + float(np.log(value)) if is_weight else value)
            carry = new
        return carry

    with mock.patch.object(sampler_cutoff.lax, "while_loop", followed):
        at = _cutoff(jnp.asarray(row[None]), setting)
    return [*tried, float(at[0])]


def _cutoff(logits: jax.Array, setting: SamplingSetting) -> jax.Array:
    of_row = jnp.ones(len(logits), jnp.float32)
    top_k = jnp.full(len(logits), setting.top_k, jnp.int32)
    return sampler_cutoff.kept_cutoff(
        logits, logits.max(axis=-1), of_row, top_k, setting.top_p * of_row, 0 * of_row
    )
