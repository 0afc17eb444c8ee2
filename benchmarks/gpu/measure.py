"""Measures the participants at a point: generates each layout once, checks each result, then times it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from benchmarks.gpu import inputs
from benchmarks.gpu.participants import Participant
from benchmarks.gpu.points import Point
from benchmarks.gpu.timing import Step, Timing, num_sets, time_jax, time_torch

LAYOUTS = ("pool", "exact_pool", "pages", "contiguous")
# bfloat16 results of two right implementations differ by about 0.005; a wrong block or head gives 1.
TOLERANCE = 0.02


class Budget:
    """Seconds of wall clock that a run may take."""

    def __init__(self, seconds: float) -> None:
        self.started = time.monotonic()
        self.seconds = seconds

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - (time.monotonic() - self.started)


@dataclass
class Setting:
    """What holds for all measurements of a run.

    Attributes:
      copy_bandwidth: bytes a second.
      max_bytes: keys and values of one layout may take this much.
      budget: of the run.
      is_dry: few launches and sets, one short sample: shows that everything runs, not how fast.
      unpaged: figures of participants without blocks: the same for every block size.
    """

    copy_bandwidth: float
    max_bytes: int
    budget: Budget
    is_dry: bool = False
    unpaged: dict[tuple[str, Point], dict[str, Any]] = field(default_factory=dict)

    def num_sets(self, set_bytes: int) -> int:
        """How many sets of inputs to rotate through."""
        return (
            min(2, num_sets(set_bytes, self.max_bytes))
            if self.is_dry
            else num_sets(set_bytes, self.max_bytes)
        )

    def time(
        self,
        step: Step,
        carry: Any,
        sets: Any,
        shared: Any = None,
        *,
        launches: int = 32,
        donate: bool = False,
        check: Callable[[Any], None] | None = None,
        program: Any = None,
    ) -> Timing:
        """``time_jax`` as this run does it."""
        dry = {"samples": 2, "sample_seconds": 0.0} if self.is_dry else {}
        launches = 1 if self.is_dry else launches
        return time_jax(
            step, carry, sets, shared, launches=launches, donate=donate, check=check, program=program, **dry
        )


class DeviceLostError(RuntimeError):
    """A kernel left the GPU in a state in which nothing runs any more in this process."""


def reason(error: BaseException) -> dict[str, str]:
    """An error as an entry of the table, in one line. Raises DeviceLostError if the device did not survive it."""
    line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    try:
        jax.block_until_ready(jax.device_put(np.zeros(8)) + 1)
    except Exception as lost:
        raise DeviceLostError(line) from lost
    return {"reason": line}


def measure_point(
    point: Point, participants: Sequence[Participant], setting: Setting
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Figures of each participant, or the reason why there is none; as they come.

    The first participant whose layout is ``pool`` is what the results of all others are compared with.
    """
    comparison = Comparison()
    for layout in LAYOUTS:
        mine = [participant for participant in participants if participant.layout == layout]
        known = {p.name: found for p in mine if (found := setting.unpaged.get(_key(p, point))) is not None}
        yield from known.items()
        mine = [participant for participant in mine if participant.name not in known]
        if not mine:
            continue
        try:
            sets, shared = _generate(layout, point, setting)
        except Exception as error:  # out of memory, say: ends this layout and no other
            for participant in mine:
                yield participant.name, reason(error)
            continue
        for participant in mine:
            if setting.budget.left <= 0:
                return
            try:
                found = _measure(participant, point, sets, shared, comparison, setting)
            except Exception as error:  # a participant that is missing or broken ends no run
                found = reason(error)
            if not participant.uses_blocks:
                setting.unpaged[_key(participant, point)] = found
            yield participant.name, found
        del sets, shared


def _key(participant: Participant, point: Point) -> tuple[str, Point]:
    return participant.name, point if participant.uses_blocks else replace(point, block_size=1)


def _generate(layout: str, point: Point, setting: Setting) -> tuple[Any, Any]:
    max_bytes = setting.max_bytes
    size = point.padded_bytes if layout == "contiguous" else point.kv_bytes
    if size > max_bytes:
        raise MemoryError(f"{size / 2**30:.1f} GiB of keys and values, {max_bytes / 2**30:.1f} GiB allowed")
    count = setting.num_sets(size)
    if layout in ("pool", "exact_pool"):
        return inputs.paged_sets(point, count, dummy=layout == "pool")
    return (inputs.page_sets if layout == "pages" else inputs.contiguous_sets)(point, count)


class WrongResultError(ArithmeticError):
    """A result differs from the expected one by more than rounding."""


@dataclass
class Comparison:
    """Compares first results with an expected one; the first of all becomes it.

    Attributes:
      expected: float32 ``[B, Hq * D]``, or None yet.
      error: relative error of the last result, in the norm.
    """

    expected: np.ndarray | None = None
    error: float = 0.0

    def __call__(self, result: Any) -> None:
        """Raises WrongResultError if the result is another one."""
        out = np.asarray(result, np.float32)
        out = out.reshape(out.shape[0], -1)
        expected = out if self.expected is None else self.expected
        self.error = float(f"{np.linalg.norm(out - expected) / np.linalg.norm(expected):.2g}")
        if not self.error < TOLERANCE:  # NaN is wrong as well
            raise WrongResultError(f"relative error {self.error}")
        self.expected = expected


def _measure(
    participant: Participant, point: Point, sets: Any, shared: Any, comparison: Comparison, setting: Setting
) -> dict[str, Any]:
    """The figures of a participant, its result checked before."""
    step = participant.step(point)
    q: Any = inputs.queries(point)
    if participant.is_torch:
        q, sets = _to_torch(q, sets)
        comparison(step(q, sets[0], shared).float().cpu().numpy())
        timing = time_torch(step, q, sets, launches=participant.launches)
    else:
        timing = setting.time(step, q, sets, shared, launches=participant.launches, check=comparison)
    return {**figures(timing, point.kv_bytes, setting.copy_bandwidth), "error": comparison.error}


def figures(timing: Timing, num_bytes: int, copy_bandwidth: float) -> dict[str, Any]:
    """Time, bytes a second, and share of copy bandwidth."""
    speed = num_bytes / timing.seconds
    return {
        **timing.as_json(),
        "bytes_per_second": float(f"{speed:.5g}"),
        "share": float(f"{speed / copy_bandwidth:.4g}"),
    }


def _to_torch(q: jax.Array, sets: Any) -> tuple[Any, Any]:
    """The same memory as tensors ``[B, H, n, D]``."""
    import torch

    pairs = [tuple(torch.from_dlpack(side).transpose(1, 2) for side in pair) for pair in sets]
    return torch.from_dlpack(q)[:, :, None], pairs
