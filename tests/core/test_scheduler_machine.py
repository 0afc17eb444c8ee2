"""The scheduler under arbitrary use, over a simulated pool (``pool_model``)."""

import logging
from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxpaged.request import Request, RequestStatus
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.scheduler import ScheduledStep
from tests.core.pool_model import PoolModel, make_request, make_scheduler

VOCAB = 3  # so small that outputs of different requests often agree, and prompts repeat outputs
EOS = 2
TOKENS = st.integers(0, VOCAB - 1)
PROMPTS = st.fixed_dictionaries(
    {
        "stem": st.integers(0, 1),
        "cut": st.sampled_from([0, 0, 0, 1, 3]),
        "own": st.lists(TOKENS, max_size=3),
        "max_tokens": st.integers(1, 9),
        "n": st.sampled_from([1, 1, 1, 2, 3]),
        "kind": st.sampled_from(["plain", "plain", "plain", "stops", "salted", "all_logits"]),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, steps, aborts, failures; tiny pools, so that everything is short."""

    @initialize(
        num_blocks=st.integers(2, 20),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 16),
        watermark=st.sampled_from([0.0, 0.2]),
        caching=st.booleans(),
        stems=st.lists(st.lists(TOKENS, min_size=2, max_size=14), min_size=1, max_size=2),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        budget: int,
        watermark: float,
        caching: bool,
        stems: list[list[int]],
    ) -> None:
        self.scheduler = make_scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            budget=budget,
            watermark=watermark,
            caching=caching,
        )
        logging.getLogger("jaxpaged").setLevel(logging.ERROR)  # thousands of preemptions
        self.pool = PoolModel(self.scheduler)
        self.stems = stems
        self.all: list[Request] = []
        self.capacity = (num_blocks - 1) * block_size

    @rule(newcomers=st.lists(PROMPTS, min_size=1, max_size=4))
    def add(self, newcomers: list[dict[str, Any]]) -> None:
        for wanted in newcomers:
            self.add_one(**wanted)

    def add_one(self, stem: int, cut: int, own: list[int], max_tokens: int, n: int, kind: str) -> None:
        stem_ids = self.stems[stem % len(self.stems)]
        prompt = (stem_ids[: len(stem_ids) - cut] + own)[: self.capacity] or [0]
        max_tokens = min(max_tokens, self.capacity - len(prompt) + 1)
        params = SamplingParams(
            n=n, temperature=1.0, max_tokens=max_tokens, prompt_logprobs=0 if kind == "all_logits" else None
        )
        requests = make_request(
            str(len(self.all)),
            prompt,
            block_size=self.scheduler.space.block_size,
            max_tokens=max_tokens,
            n=n,
            salt="x" if kind == "salted" else None,
            eos=frozenset({EOS} if kind == "stops" else ()),
            params=params,
        )
        self.all += requests
        self.scheduler.add(requests[0])

    def plan(self) -> ScheduledStep:
        self.pool.before()
        step = self.scheduler.schedule()
        self.pool.check_plan(step)
        return step

    @rule(tokens=st.lists(TOKENS, min_size=1, max_size=25))
    def steps(self, tokens: list[int]) -> None:
        for at in range(0, len(tokens), 3):
            self.complete(self.plan(), (tokens[at : at + 3] * 5)[:5])
            self.all_is_well()

    def complete(self, step: ScheduledStep, sampled: list[int]) -> None:
        self.pool.run(step)
        behind = {id(r): (r.num_tokens - r.num_computed_tokens, r.num_tokens) for r, _ in step.rows}
        sampled = sampled[: len(step.rows)]
        advanced = self.scheduler.update(step, sampled)
        caught_up = [r for r, count in step.rows if behind[id(r)][0] == count]
        assert advanced == caught_up, "a token for a request that has not caught up, or none for one that has"
        for (request, _), token in zip(step.rows, sampled, strict=True):
            if request in advanced:
                assert request.num_tokens == behind[id(request)][1] + 1
                assert request.token_ids[-1] == token
                self.check_ending(request)
        self.pool.forget(r for r in advanced if r.status.is_finished)

    def check_ending(self, request: Request) -> None:
        stopped = request.token_ids[-1] in request.eos_token_ids
        assert (request.status is RequestStatus.FINISHED_STOPPED) == stopped
        full = request.num_output_tokens == request.max_tokens and not stopped
        assert (request.status is RequestStatus.FINISHED_LENGTH) == full

    @rule(state=st.sampled_from(["untouched", "written", "lost"]))
    def failing_step(self, state: str) -> None:
        step = self.plan()
        if not step.rows:
            return
        if state == "written":
            self.pool.run(step)
        failed = self.scheduler.fail(step)
        assert failed == [r for r, _ in step.rows]
        assert all(r.status is RequestStatus.FINISHED_ERROR for r in failed)
        self.pool.forget(failed)
        if state == "lost":
            self.scheduler.restart()
            self.pool.lose()

    @precondition(lambda self: self.scheduler.has_unfinished)
    @rule(
        data=st.data(),
        status=st.sampled_from([RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_STOPPED]),
    )
    def finish_one(self, data: st.DataObject, status: RequestStatus) -> None:
        """Any request in any state: running, waiting, preempted, or a fork whose prompt is not computed."""
        request = data.draw(st.sampled_from([r for r in self.all if not r.status.is_finished]))
        self.scheduler.finish(request, status)
        assert request.status is status
        self.pool.forget([request])

    @precondition(lambda self: self.scheduler.has_unfinished)
    @rule(data=st.data())
    def abort_generation(self, data: st.DataObject) -> None:
        """The way the engine does it: all completions of one prompt."""
        chosen = data.draw(st.sampled_from([r for r in self.all if not r.status.is_finished]))
        group = [r for r in self.all if r.request_id == chosen.request_id]
        for request in group:
            request.forks = []
        for request in group:
            if not request.status.is_finished:
                self.scheduler.finish(request, RequestStatus.FINISHED_ABORTED)
        self.pool.forget(group)

    @invariant()
    def all_is_well(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_invariants()
        self.pool.check()
        live = sorted(id(r) for r in self.all if not r.status.is_finished)
        assert sorted(id(r) for r in self.scheduler.requests()) == live, "a request was lost"
        assert self.scheduler.has_unfinished == bool(live)

    def teardown(self) -> None:
        """Whatever has happened, everybody who is left finishes."""
        if not hasattr(self, "scheduler"):
            return
        idle = 0
        # Each step computes a token for the eldest, who is never pushed out by others but for one step.
        limit = 4 * sum(len(r.token_ids) + r.max_tokens for r in self.all) + 4
        while self.scheduler.has_unfinished:
            step = self.plan()
            idle = 0 if step.rows else idle + 1
            assert idle < 2, "requests wait and nothing runs"
            self.complete(step, [limit % VOCAB] * 5)
            limit -= 1
            assert limit > 0, "requests push each other out for ever"
        self.all_is_well()
        assert self.scheduler.space.num_free == self.scheduler.space.allocator.num_usable
        assert all(r.status.is_finished for r in self.all)


TestScheduler: Any = SchedulerMachine.TestCase
TestScheduler.settings = hypothesis.settings(max_examples=100, stateful_step_count=40)
