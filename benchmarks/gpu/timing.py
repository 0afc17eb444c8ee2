"""Times of device work, without the host's.

A kernel that runs for ten microseconds cannot be timed by calling it: dispatching a compiled JAX program costs about as
much. So one program holds many *launches*, each of which takes the result of the one before it: no compiler
may drop, merge or overlap them, and the device alone decides how long they take. A *sample* is a number of such
programs, dispatched back to back and waited for once; it is long enough (``SAMPLE_SECONDS``) that this wait does
not count. What is reported is the median over the samples, with their spread.

Launches go through several sets of inputs in turn (``num_sets``), together larger than any L2 cache, so that
each finds its inputs in device memory, as in a model, where a layer's keys have long been displaced when their
turn comes again. What all launches of a program share, like the plan of a batch, XLA computes once in a program, as
in a model's step with that many layers.

PyTorch's side captures its launches in one CUDA graph, which is replayed between two CUDA events.

On a device that is slower than the host all of this is true; where it is not, ``host_bound`` says so: dispatching
a program took most of the time that one takes, so the device may have waited and the figure is an upper bound.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

SAMPLES = 7
SAMPLE_SECONDS = 0.03
MAX_SECONDS = 4.0  # of all samples of one measurement, where a launch is slow
# Twice the largest L2 cache there is (B200: 126 MB). A set is a pytree of arrays: this many are enough of them.
DISPLACING_BYTES = 2**28
MAX_SETS = 64
# Programs whose dispatch surely does not wait for room in the device's queue.
UNBLOCKED_CALLS = 4

# (carry, one set of inputs, what all launches share) -> carry
Step = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of one launch.

    Attributes:
      seconds: median over the samples.
      samples: seconds of a launch in each of them.
      launches: how many launches a sample has.
      host_bound: whether the device may have waited for the host.
    """

    seconds: float
    samples: tuple[float, ...]
    launches: int
    host_bound: bool

    @property
    def spread(self) -> float:
        """Range of the samples as a share of the median."""
        return (max(self.samples) - min(self.samples)) / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Microseconds, rounded to what a measurement can tell."""
        return {
            "us": float(f"{1e6 * self.seconds:.5g}"),
            "spread": round(self.spread, 4),
            "samples": len(self.samples),
            "launches": self.launches,
            "host_bound": self.host_bound,
        }


def num_sets(set_bytes: int, max_bytes: int) -> int:
    """How many sets of inputs to rotate through.

    Args:
      set_bytes: of one set.
      max_bytes: what all of them may take.
    """
    wanted = math.ceil(DISPLACING_BYTES / max(set_bytes, 1))
    return max(1, min(wanted, MAX_SETS, max_bytes // max(set_bytes, 1)))


def repeat(step: Step, launches: int) -> Callable[[Any, Sequence[Any], Any], tuple[Any, Any]]:
    """``launches`` of ``step``, one after the other, through the sets in turn: the first result and the last."""
    # Lowered once and called many times; XLA sees the copies, the tracer does not.
    one = jax.jit(step)

    def program(carry: Any, sets: Sequence[Any], shared: Any) -> tuple[Any, Any]:
        first = carry = one(carry, sets[0], shared)
        for launch in range(1, launches):
            carry = one(carry, sets[launch % len(sets)], shared)
        return first, carry

    return program


def repeat_in_place(step: Step, launches: int) -> Callable[[Any, Sequence[Any], Any], tuple[Any, Any]]:
    """The same for a carry that is updated in place: the first result is gone."""
    program = repeat(step, launches)
    return lambda carry, sets, shared: (None, program(carry, sets, shared)[1])


def time_jax(
    step: Step,
    carry: Any,
    sets: Sequence[Any],
    shared: Any = None,
    *,
    launches: int = 32,
    donate: bool = False,
    check: Callable[[Any], None] | None = None,
    program: Callable[..., tuple[Any, Any]] | None = None,
    samples: int = SAMPLES,
    sample_seconds: float = SAMPLE_SECONDS,
    max_seconds: float = MAX_SECONDS,
) -> Timing:
    """Times a step that takes its own result.

    Args:
      step: ``(carry, set, shared) -> carry`` of the same shapes.
      carry: what the first launch takes; gone afterwards if donated.
      sets: inputs that launches rotate through.
      shared: an input of every launch.
      launches: of one program. Where there are more sets, programs take turns with them.
      donate: whether the carry is updated in place.
      check: called with the result of the very first launch, before anything is timed; raises if it is wrong.
      program: ``compiled_program`` of the same step and launches, where it was compiled before.
      samples: how many times to measure.
      sample_seconds: how long each should take.
      max_seconds: a bound on all of them together, kept by taking fewer (two at least).
    """
    whole = len(sets) // launches * launches or len(sets)
    groups = [sets[first : min(first + launches, whole)] for first in range(0, whole, launches)]
    program = program or compiled_program(step, launches, donate=donate)
    for attempt in range(2):  # compiles; then settles clocks and allocator
        started = time.perf_counter()
        first, carry = jax.block_until_ready(program(carry, groups[0], shared))
        estimate = time.perf_counter() - started
        if check is not None and attempt == 0:
            check(first)
    calls = math.ceil(max(1, sample_seconds / estimate) / len(groups)) * len(groups)
    samples = max(2, min(samples, int(max_seconds / (estimate * calls))))
    times, dispatches = [], []
    for _ in range(samples):
        started = time.perf_counter()
        for call in range(calls):
            _, carry = program(carry, groups[call % len(groups)], shared)
            if call == min(calls, UNBLOCKED_CALLS) - 1:
                dispatches.append((time.perf_counter() - started) / (call + 1))
        jax.block_until_ready(carry)
        times.append((time.perf_counter() - started) / (calls * launches))
    seconds = statistics.median(times)
    bound = statistics.median(dispatches) > 0.8 * seconds * launches
    return Timing(seconds, tuple(times), calls * launches, bound)


def compiled_program(step: Step, launches: int, *, donate: bool = False) -> Callable[..., tuple[Any, Any]]:
    """What ``time_jax`` calls; compiled at its first call."""
    if donate:
        return jax.jit(repeat_in_place(step, launches), donate_argnums=0)
    if launches > 1:
        return jax.jit(repeat(step, launches))
    one = jax.jit(step)

    def program(carry: Any, sets: Sequence[Any], shared: Any) -> tuple[Any, Any]:
        only = one(carry, sets[0], shared)  # a program that returned it twice would copy it
        return only, only

    return program


def time_torch(
    step: Step, carry: Any, sets: Sequence[Any], *, launches: int = 32, samples: int = SAMPLES
) -> Timing:
    """The same for PyTorch: ``step(carry, set, None) -> carry`` on CUDA tensors, captured in a graph."""
    import torch

    launches = max(launches, len(sets))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # handles, workspaces and lazy loading stay out of the graph
            step(carry, sets[0], None)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = carry
        for launch in range(launches):
            value = step(value, sets[launch % len(sets)], None)
    estimate = _replay(graph, 2)
    calls = max(1, math.ceil(SAMPLE_SECONDS / estimate))
    samples = max(2, min(samples, int(MAX_SECONDS / (estimate * calls))))
    times = tuple(_replay(graph, calls) / launches for _ in range(samples))
    return Timing(statistics.median(times), times, calls * launches, False)


def _replay(graph: Any, calls: int) -> float:
    """Seconds of one replay of ``calls``, by the device's own clock."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / calls
