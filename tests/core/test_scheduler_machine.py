"""The scheduler under arbitrary use, over simulated memory (``scheduler_world``)."""

import re
from random import Random
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from benchmarks import scheduler_soak
from jaxpaged.pinned_prefixes import PinnedPrefixes
from tests.core import scheduler_operations as operations
from tests.core.scheduler_settings import Settings
from tests.core.scheduler_world import World

RANDOM = st.randoms(note_method_calls=False, use_true_random=False)


class SchedulerMachine(RuleBasedStateMachine):
    """Everything together, over tiny pools; after each operation all invariants are checked."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None

    @initialize(rng=RANDOM)
    def start(self, rng: Random) -> None:
        settings = Settings.draw(rng)
        hypothesis.note(str(settings))
        self.world = World(settings, rng)
        for _ in range(3):
            self.do(operations.add, rng)

    def do(self, operation: operations.Operation, rng: Random) -> None:
        assert self.world is not None
        operation(self.world, rng)
        self.world.check()

    @rule(rng=RANDOM)
    def add(self, rng: Random) -> None:
        self.do(operations.add, rng)

    # More rules for what is to happen more often.
    @rule(rng=RANDOM)
    def step(self, rng: Random) -> None:
        self.do(operations.step, rng)

    @rule(rng=RANDOM)
    def step_again(self, rng: Random) -> None:
        self.do(operations.step, rng)

    @rule(rng=RANDOM)
    def step_on(self, rng: Random) -> None:
        self.do(operations.step, rng)

    @rule(rng=RANDOM)
    def fork(self, rng: Random) -> None:
        self.do(operations.fork, rng)

    @rule(rng=RANDOM)
    def finish_one(self, rng: Random) -> None:
        self.do(operations.finish_one, rng)

    @rule(rng=RANDOM)
    def abort(self, rng: Random) -> None:
        self.do(operations.abort, rng)

    @rule(rng=RANDOM)
    def tick(self, rng: Random) -> None:
        self.do(operations.tick, rng)

    @rule(rng=RANDOM)
    def fail(self, rng: Random) -> None:
        self.do(operations.fail, rng)

    @precondition(lambda self: self.world is not None and self.world.launched)
    @rule(rng=RANDOM)
    def fail_late(self, rng: Random) -> None:
        self.do(operations.fail_late, rng)

    @rule(rng=RANDOM)
    def pin(self, rng: Random) -> None:
        self.do(operations.pin, rng)

    @rule(rng=RANDOM)
    def unpin(self, rng: Random) -> None:
        self.do(operations.unpin, rng)

    @rule(rng=RANDOM)
    def observe(self, rng: Random) -> None:
        self.do(operations.observe, rng)

    def teardown(self) -> None:
        """Whatever has happened, everybody who is left finishes."""
        if self.world is None:
            return
        try:
            self.world.finish_all(Random(0))
        finally:
            self.world.close()


TestScheduler: Any = SchedulerMachine.TestCase
TestScheduler.settings = hypothesis.settings(max_examples=200, stateful_step_count=40)


def test_soak(capsys: pytest.CaptureFixture[str]) -> None:
    """The short form of a benchmark: other random numbers, longer runs."""
    assert scheduler_soak.main(["--operations", "6000", "--seed", "1"]) == 0
    found = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[:2] == "  ")
    rare = (
        "preemptions: swap",
        "preemptions: recompute",
        "forks that share",
        "steps of several tokens",
        "pins",
    )
    assert all(int(found[f"  {name}"]) >= 10 for name in rare), "a feature that is hardly used proves nothing"


def test_soak_tells_what_to_repeat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PinnedPrefixes, "expire", lambda self, now: [])
    assert scheduler_soak.main(["--operations", "6000", "--seed", "1"]) == 1
    found = re.search(r"seed 1, world (\d+), operation (\d+)", capsys.readouterr().err)
    assert found is not None
    assert scheduler_soak.main(["--seed", "1", "--world", found[1]]) == 1
    assert found[0] in capsys.readouterr().err
