"""Beam groups over a simulated pool: every search ends as it would alone, whatever happens to memory around it."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxpaged.beam_group import BeamGroup
from jaxpaged.beam_params import BeamSearchParams
from jaxpaged.beam_search import BeamSearch
from jaxpaged.memory_monitor import MemoryMonitor
from jaxpaged.policies import SchedulingPolicy, policy_from
from jaxpaged.preemption import Preemption
from jaxpaged.request import Request, RequestStatus
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.scheduler import ScheduledStep
from tests.core.pool_model import PoolModel, make_request, make_scheduler
from tests.core.toy_language_model import VOCAB, log_probabilities

EOS = VOCAB - 1
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


@functools.cache
def candidates_after(tokens: tuple[int, ...]) -> list[tuple[int, float]]:
    """After many histories only one, so that beams become fewer and more again."""
    ranked = [(logprob, token) for token, logprob in enumerate(log_probabilities(7, tokens))]
    ranked.sort(reverse=True)
    return [(token, logprob) for logprob, token in ranked[: {0: 1, 1: 1}.get(sum(tokens) % 5, VOCAB)]]


def found_alone(prompt: Sequence[int], params: BeamSearchParams) -> Any:
    search = BeamSearch(params, [EOS])
    while not search.is_done:
        search.advance([candidates_after((*prompt, *beam.token_ids)) for beam in search.beams])
    return search.results()


class Drive:
    """Steps of a scheduler with beam groups and ordinary requests, everything checked after each."""

    def __init__(
        self,
        *,
        num_blocks: int = 12,
        block_size: int = 2,
        max_num_seqs: int = 4,
        budget: int = 8,
        caching: bool = True,
        watermark: float = 0.0,
        num_host_blocks: int = 0,
        memory_warning: float = 1.0,
        policy: str | SchedulingPolicy = "fcfs",
    ) -> None:
        logging.getLogger("jaxpaged").setLevel(logging.ERROR)  # thousands of preemptions
        self.scheduler = make_scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            budget=budget,
            watermark=watermark,
            caching=caching,
            num_host_blocks=num_host_blocks or None,
            policy=policy_from(policy),
            monitor=MemoryMonitor(memory_warning, 1.0, 0.01),
        )
        self.space = self.scheduler.space
        if num_host_blocks:
            self.scheduler.preemption = Preemption(self.space, "swap")
        self.pool = PoolModel(self.scheduler)
        self.groups: dict[str, tuple[BeamGroup, list[Request], list[int]]] = {}
        self.plain: dict[str, Request] = {}
        self.ended: dict[str, RequestStatus] = {}

    def add_search(self, name: str, prompt: list[int], params: BeamSearchParams) -> None:
        requests = [
            Request(name, prompt, GREEDY, block_size=self.space.block_size, max_tokens=99, index=index)
            for index in range(params.beam_width)
        ]
        for request in requests:
            request.is_beam = request.needs_tokens_on_host = True
        self.groups[name] = (BeamGroup(BeamSearch(params, [EOS]), requests), requests, prompt)
        self.scheduler.add(requests[0])

    def add_plain(self, name: str, prompt: list[int], max_tokens: int) -> None:
        (self.plain[name],) = make_request(
            name, prompt, block_size=self.space.block_size, max_tokens=max_tokens
        )
        self.scheduler.add(self.plain[name])

    def end(self, name: str, status: RequestStatus) -> None:
        requests = self.groups[name][1] if name in self.groups else [self.plain[name]]
        for request in requests:
            self.scheduler.finish(request, status)
        self.ended[name] = status

    def plan(self) -> ScheduledStep:
        active = [request for request in self.scheduler.running if not request.is_held]
        step = self.scheduler.schedule()
        if len(active) == 1 and active[0] in step.preempted:
            assert not self.scheduler.held.running, "the one that runs gives way to who has nothing to do"
        assert all(count > 0 for _, count in step.rows)
        assert not any(request.is_held for request, _ in step.rows), "computes what is computed"
        return step

    def run(self, step: ScheduledStep) -> list[int]:
        """What the device does; nothing of it stays on the way."""
        (sampled,) = self.pool.run(step, lambda: 0)
        self.pool.pending.clear()
        return sampled

    def step(self) -> ScheduledStep:
        step = self.plan()
        for request in self.scheduler.update(step, self.run(step)):
            if request.is_beam:
                group = self.groups[request.request_id][0]
                if group.take(self.scheduler, request, candidates_after(tuple(request.token_ids))):
                    self.end(request.request_id, RequestStatus.FINISHED_STOPPED)
            elif request.status.is_finished:
                self.ended[request.request_id] = request.status
        self.check()
        return step

    def fail(self, *, written: bool, lost: bool) -> None:
        step = self.plan()
        if written or not step.rows:
            self.run(step)
        if not step.rows:
            return
        names = {request.request_id for request in self.scheduler.fail(step)}
        if lost:
            self.pool.lose()
            self.scheduler.restart()
        for name in names:
            self.end(name, RequestStatus.FINISHED_ERROR)
        self.check()

    def finish_all(self) -> None:
        idle, limit = 0, 3000
        while self.scheduler.has_unfinished:
            limit -= 1
            assert limit, "requests push each other out for ever"
            idle = 0 if self.step().rows else idle + 1
            assert idle < 2, "somebody waits and nothing runs"
        for name, (group, requests, prompt) in self.groups.items():
            if self.ended[name] is RequestStatus.FINISHED_STOPPED:
                assert group.search.results() == found_alone(prompt, group.search.params)
            assert not any(request.table.ids or request.row for request in requests)
        assert self.ended.keys() == self.groups.keys() | self.plain.keys()
        assert self.space.num_free == self.space.allocator.num_usable
        if self.space.host is not None:
            assert self.space.host.num_held == 0

    def check(self) -> None:
        self.scheduler.check_invariants()
        self.pool.check()
        live = [group for name, (group, _, _) in self.groups.items() if name not in self.ended]
        for group in live:
            group.check_invariants()
        queued = {id(request) for request in self.scheduler.requests()}
        assert all(id(beam) in queued for group in live for beam in group.beams), "a beam was lost"


SIZES = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(9, 24),
        "block_size": st.integers(2, 3),
        "max_num_seqs": st.integers(1, 6),
        "budget": st.integers(1, 12),
        "caching": st.booleans(),
        "watermark": st.sampled_from([0.0, 0.2]),
        "num_host_blocks": st.sampled_from([0, 0, 3, 40]),
        "memory_warning": st.sampled_from([1.0, 0.5]),
        "policy": st.sampled_from(["fcfs", "shortest-prompt-first", "longest-prefix-match"]),
    }
)
PROMPTS = st.sampled_from([[1], [1, 2, 3, 4, 0], [1, 2, 3, 4, 1, 3], [2, 2]])


@st.composite
def searches(draw: st.DrawFn) -> tuple[list[int], BeamSearchParams]:
    num_groups = draw(st.sampled_from([1, 1, 2]))
    params = BeamSearchParams(
        beam_width=num_groups * draw(st.integers(1, 4)),
        max_tokens=draw(st.integers(1, 9)),
        length_penalty=draw(st.sampled_from([0.0, 1.0, 2.0])),
        early_stopping=draw(st.sampled_from([True, False, "never"])),
        num_beam_groups=num_groups,
        diversity_penalty=1.5 if num_groups > 1 else 0.0,
    )
    return draw(PROMPTS), params


EVENTS = st.one_of(
    st.tuples(st.just("search"), searches()),
    st.tuples(st.just("search"), searches()),
    st.tuples(st.just("plain"), st.tuples(PROMPTS, st.integers(1, 9))),
    st.tuples(st.just("steps"), st.integers(1, 12)),
    st.tuples(st.just("steps"), st.integers(1, 12)),
    st.tuples(st.just("abort"), st.integers(0, 9)),
    st.tuples(st.just("fail"), st.tuples(st.booleans(), st.booleans())),
)


@hypothesis.settings(max_examples=150)
@hypothesis.given(SIZES, st.lists(EVENTS, min_size=2, max_size=12))
def test_every_search_finds_what_it_finds_alone(sizes: dict[str, Any], events: list[tuple[str, Any]]) -> None:
    drive = Drive(**sizes)
    for number, (event, value) in enumerate(events):
        if event == "search":
            drive.add_search(f"s{number}", *value)
        elif event == "plain":
            drive.add_plain(f"p{number}", *value)
        elif event == "steps":
            for _ in range(value):
                drive.step()
        elif event == "abort":
            live = [name for name in (*drive.groups, *drive.plain) if name not in drive.ended]
            if live:
                drive.end(live[value % len(live)], RequestStatus.FINISHED_ABORTED)
                drive.check()
        else:
            drive.fail(written=value[0], lost=value[1])
    drive.finish_all()


def test_beams_become_fewer_and_more_again() -> None:
    drive = Drive(num_blocks=40, max_num_seqs=8)
    drive.add_search("s", [1, 2], BeamSearchParams(beam_width=2, max_tokens=9, early_stopping="never"))
    counts = []
    while drive.scheduler.has_unfinished:
        counts.append(len(drive.groups["s"][0].beams))
        drive.step()
    drive.finish_all()
    fewer = [at for at in range(1, len(counts)) if counts[at] < counts[at - 1]]
    assert fewer
    assert max(counts[fewer[0] :]) > counts[fewer[0]]


@pytest.mark.parametrize(
    "sizes",
    [
        {"max_num_seqs": 1},
        {"num_blocks": 8},
        {"num_blocks": 8, "num_host_blocks": 30},
    ],
)
def test_beams_that_do_not_fit_run_one_after_the_other(sizes: dict[str, int]) -> None:
    drive = Drive(**{"num_blocks": 60, "max_num_seqs": 8, **sizes})
    params = BeamSearchParams(beam_width=6, max_tokens=9, early_stopping="never")
    drive.add_search("s", [1, 2, 3, 4], params)
    paused, steps = 0, 0
    while drive.scheduler.has_unfinished:
        drive.step()
        steps += 1
        assert steps < 1000, "beams push each other out for ever"
        paused += len(drive.scheduler.held.paused)
    drive.finish_all()
    assert paused
    assert bool(drive.space.stats.swapped_in) == ("num_host_blocks" in sizes)


def test_who_runs_alone_gets_the_blocks_of_held_beams() -> None:
    """The request is older than the beams, and would itself be the first to go."""
    drive = Drive(num_blocks=7, max_num_seqs=2, budget=2, caching=False)
    drive.add_plain("p", [1, 2], 9)
    drive.add_search("s", [1, 2], BeamSearchParams(beam_width=2, max_tokens=9, early_stopping="never"))
    drive.finish_all()
    assert drive.plain["p"].num_preemptions == 0


def test_running_beams_need_no_copy_where_a_block_ends() -> None:
    """Blocks of one token are never partly filled: forks cost nothing but the new token's own block."""
    drive = Drive(num_blocks=60, block_size=1, max_num_seqs=8)
    drive.add_search("s", [1, 2, 3, 4], BeamSearchParams(beam_width=6, max_tokens=9))
    drive.finish_all()
    assert drive.space.stats.copied == 0
    assert drive.space.stats.allocated <= 4 + 6 * 8
