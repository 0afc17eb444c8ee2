"""Engines that differ in how they schedule and share the programs of one warm-up, which is what costs time.

A program depends on model, attention and sizes alone. So policies, swapping, running ahead and the like can be tried
on many engines of ``tiny.SIZES`` for the price of one.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from jaxpaged import Engine
from jaxpaged.core import EngineCore
from jaxpaged.models import ModelConfig
from tests.engine.tiny import CONFIG, GREEDY, idle, new_engine, prompt_of

# What no program depends on, beside sizes.
SWITCHES = frozenset(
    {
        "async_scheduling",
        "enable_prefix_caching",
        "memory_critical",
        "memory_warning",
        "num_host_blocks",
        "num_scheduler_steps",
        "preemption_mode",
        "scheduling_policy",
        "seed",
        "swap_space",
        "tenant_weights",
        "watermark",
    }
)
# Memory is used to the last block, so that requests are preempted.
FULL = {"memory_warning": 1.0, "memory_critical": 1.0}

LENGTHS = [(40, 30), (3, 40), (17, 25), (33, 12), (5, 33), (24, 24), (1, 20), (12, 40)]  # prompt, output
PROMPTS = [prompt_of(length, seed) for seed, (length, _) in enumerate(LENGTHS)]
PARAMS = [GREEDY.clone(max_tokens=count) for _, count in LENGTHS]


@cache
def _programs(
    config: ModelConfig, sizes: frozenset[tuple[str, Any]]
) -> tuple[dict[Any, Any], dict[str, Any]]:
    return {}, {}


@contextlib.contextmanager
def sibling(config: ModelConfig = CONFIG, **arguments: Any) -> Iterator[Engine]:
    """An engine over the programs that its siblings have compiled, and the check that it is left with nothing."""
    sizes = frozenset((name, value) for name, value in arguments.items() if name not in SWITCHES)
    programs, small = _programs(config, sizes)
    with new_engine(config, **arguments) as engine:
        runner = core_of(engine).runner
        runner._programs.update(programs)
        runner._small.update(small)
        with unburdened(engine):
            yield engine
        programs |= runner._programs
        small |= runner._small


@contextlib.contextmanager
def unburdened(engine: Engine) -> Iterator[Engine]:
    """``idle`` for an engine that may hold more than the blocks of its requests: host blocks, a step on its way."""
    with idle(engine):
        yield engine
    space = core_of(engine).scheduler.space
    assert space.host is None or space.host.num_held == 0
    assert not space.pins


def core_of(engine: Engine) -> EngineCore:
    """The loop of a live engine."""
    assert engine._core is not None, "closed"
    return engine._core


class Clock:
    """``time.monotonic``, which the test may put forward by ``ahead`` seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        now = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: now() + self.ahead)


class Watched:
    """A step's tokens that tell when they are fetched."""

    def __init__(self, array: Any, fetched: Callable[[], None]) -> None:
        self.array = array
        self.fetched = fetched

    def __array__(self, *arguments: Any, **named: Any) -> np.ndarray:
        self.fetched()
        return np.asarray(self.array, *arguments, **named)


def watch(
    monkeypatch: pytest.MonkeyPatch,
    engine: Engine,
    launched: Callable[[int], None],
    fetched: Callable[[int], None],
) -> None:
    """Calls ``launched(i)`` before step ``i`` is handed over, ``fetched(i)`` as its tokens are asked for."""
    runner = core_of(engine).runner
    count = iter(range(10**6))
    execute, execute_decode_steps = runner.execute, runner.execute_decode_steps

    def one(*arguments: Any) -> Any:
        number = next(count)
        launched(number)
        output = execute(*arguments)
        tokens: Any = Watched(output.sampled.tokens, lambda: fetched(number))
        return output._replace(sampled=output.sampled._replace(tokens=tokens))

    def several(*arguments: Any) -> Any:
        number = next(count)
        launched(number)
        return Watched(execute_decode_steps(*arguments), lambda: fetched(number))

    monkeypatch.setattr(runner, "execute", one)
    monkeypatch.setattr(runner, "execute_decode_steps", several)


def in_flight(engine: Engine) -> int:
    return len(core_of(engine)._launched)
