"""Blocks that go to the host and come back: of preempted requests and of evicted prefixes."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
import pytest

from jaxpaged import Engine, RequestOutput, SamplingParams
from jaxpaged.block_space import BlockStats
from jaxpaged.config import EngineConfig
from tests.engine.family import FULL, LENGTHS, PARAMS, PROMPTS, core_of, sibling, unburdened
from tests.engine.test_variants import SIZES as TWO_ROWS
from tests.engine.test_workloads import scaled
from tests.engine.tiny import (
    CONFIG,
    GREEDY,
    dense_greedy,
    dense_logprobs,
    drain,
    is_dense_greedy,
    prompt_of,
    tiny_decoder,
    tokens_of,
)

SWAP: dict[str, Any] = {"num_host_blocks": 200, "preemption_mode": "swap", **FULL}
NUM_TOKENS = sum(prompt + output - 1 for prompt, output in LENGTHS)  # the last token is never computed


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [dense_greedy(prompt, count) for prompt, (_, count) in zip(PROMPTS, LENGTHS, strict=True)]


@pytest.fixture(scope="module", params=[False, True], ids=["in step", "ahead"])
def swapping_for_all(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with sibling(async_scheduling=request.param, **SWAP) as engine:
        yield engine


@pytest.fixture
def swapping(swapping_for_all: Engine) -> Iterator[Engine]:
    with unburdened(swapping_for_all) as engine:
        yield engine


def moved(engine: Engine) -> BlockStats:
    return core_of(engine).scheduler.space.stats


def ways(engine: Engine) -> dict[str, int]:
    """How often requests were preempted, by what became of their blocks."""
    return dict(core_of(engine).scheduler.preemption.counts)


def test_swapped_out_and_in(swapping: Engine, expected: list[list[int]]) -> None:
    for n in (1, 3):
        before = ways(swapping).get("swap", 0)
        outputs = swapping.generate(PROMPTS, [params.clone(n=n) for params in PARAMS])
        for output, tokens in zip(outputs, expected, strict=True):
            assert [completion.token_ids for completion in output.outputs] == [tokens] * n
        assert ways(swapping)["swap"] > before


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_what_comes_back_is_what_went(expected: list[list[int]], ahead: bool, mode: str) -> None:
    """Without a prefix cache nothing is found on the device, and the number of tokens tells what was computed anew."""
    arguments = {**SWAP, "preemption_mode": mode, "enable_prefix_caching": False, "num_scheduler_steps": 1}
    with sibling(async_scheduling=ahead, **arguments) as engine:
        assert tokens_of(engine.generate(PROMPTS, PARAMS)) == expected
        assert list(ways(engine)) == [mode]
        if mode == "swap":
            assert moved(engine).swapped_in == moved(engine).swapped_out > 0
            assert engine.stats().num_tokens == NUM_TOKENS
        else:
            assert moved(engine).swapped_out == 0
            assert engine.stats().num_tokens > NUM_TOKENS


@pytest.mark.parametrize("num_host_blocks", [1, 12])
def test_where_the_host_is_full_it_is_computed_again(expected: list[list[int]], num_host_blocks: int) -> None:
    with sibling(**{**SWAP, "num_host_blocks": num_host_blocks}) as engine:
        for _ in range(2):
            assert tokens_of(engine.generate(PROMPTS, PARAMS)) == expected
        assert ways(engine)["recompute"] > 0
        assert moved(engine).demoted > 0
        if num_host_blocks > 1:
            assert ways(engine)["swap"] > 0


@pytest.mark.parametrize("ahead", [False, True])
def test_the_cheaper_way_is_chosen_by_what_was_seen(expected: list[list[int]], ahead: bool) -> None:
    """By default; which one it is does not matter to the tokens."""
    with sibling(async_scheduling=ahead, **{**SWAP, "preemption_mode": "auto"}) as engine:
        for _ in range(3):
            assert tokens_of(engine.generate(PROMPTS, PARAMS)) == expected
        assert sum(ways(engine).values()) > 0
        cost = core_of(engine).scheduler.preemption.cost
        assert cost is not None
        assert cost.seconds_to_recompute(100) is not None


def test_a_seed_draws_the_same_across_a_swap(swapping: Engine) -> None:
    """Penalties count what was generated before, log-probabilities go on where they were."""
    sampled = GREEDY.clone(temperature=0.9, repetition_penalty=1.3, logprobs=1)
    params = [sampled.clone(seed=i, max_tokens=30) for i in range(8)]
    prompts = [prompt_of(12 + i, seed=i) for i in range(8)]
    alone = [swapping.generate(prompt, each)[0] for prompt, each in zip(prompts, params, strict=True)]
    swapping.reset_prefix_cache()
    before = ways(swapping).get("swap", 0)
    outputs = swapping.generate(prompts, params)
    assert ways(swapping)["swap"] > before
    assert tokens_of(outputs) == tokens_of(alone)
    for one, other in zip(outputs, alone, strict=True):
        found, wanted = (
            [next(iter(each.values())).logprob for each in output.outputs[0].logprobs or []]
            for output in (one, other)
        )
        assert len(found) == 30
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_evicted_prefixes_come_back(swapping: Engine, expected: list[list[int]]) -> None:
    others = [prompt_of(60, seed=i) for i in range(10, 14)]

    def push_out(engine: Engine) -> None:
        for prompt in others:
            engine.generate(prompt, GREEDY.clone(max_tokens=40))

    with sibling(**FULL) as without:
        without.generate(PROMPTS[0], PARAMS[0])
        push_out(without)
        (output,) = without.generate(PROMPTS[0], PARAMS[0])
        assert output.num_cached_tokens == 0  # else nothing was pushed out
    swapping.generate(PROMPTS[0], PARAMS[0])
    push_out(swapping)
    before = moved(swapping).promoted
    assert moved(swapping).demoted > 0
    tokens = swapping.stats().num_tokens
    (output,) = swapping.generate(PROMPTS[0], PARAMS[0])
    assert output.num_cached_tokens == 36
    assert moved(swapping).promoted - before == 36 // 4
    assert swapping.stats().num_tokens - tokens == 4 + LENGTHS[0][1] - 1
    assert output.outputs[0].token_ids == expected[0]


def test_abort_of_the_swapped(swapping: Engine) -> None:
    names = [str(i) for i in range(8)]
    for i, name in enumerate(names):
        swapping.add_request(name, prompt_of(20, seed=i), GREEDY.clone(max_tokens=30))
    before = ways(swapping).get("swap", 0)
    while ways(swapping).get("swap", 0) == before:
        swapping.step()
    tier = core_of(swapping).scheduler.space.host
    assert tier is not None
    assert tier.num_held > 0
    waiting = [name for name, tables in swapping.block_tables().items() if not tables[0]]
    for name in waiting:
        swapping.abort_request(name)
        swapping.check_invariants()
    assert tier.num_held == 0
    outputs = drain(swapping)
    for i, name in enumerate(names):
        if name not in waiting:
            assert outputs[name].outputs[0].token_ids == dense_greedy(prompt_of(20, seed=i), 30)


def test_low_precision_blocks_come_back_unchanged() -> None:
    """bfloat16: what is said after a swap is what is said without."""
    prompts = [prompt_of(13), prompt_of(9)]
    params = GREEDY.clone(max_tokens=24, logprobs=0)
    arguments = {**TWO_ROWS, "enable_prefix_caching": False, **FULL}
    found: list[list[RequestOutput]] = []
    model = tiny_decoder(CONFIG, "bfloat16")
    programs: dict[Any, Any] = {}
    for switches in ({"num_blocks": 14}, SWAP):
        with Engine(model, **{**arguments, **switches}) as engine, unburdened(engine):
            core_of(engine).runner._programs.update(programs)
            found.append(engine.generate(prompts, params))
            programs |= core_of(engine).runner._programs
            if "preemption_mode" in switches:
                assert moved(engine).swapped_in > 0
                assert core_of(engine).runner.state.pool.k.dtype == "bfloat16"
            else:
                assert ways(engine)["recompute"] > 0
    assert tokens_of(found[0]) == tokens_of(found[1])
    reference = dense_logprobs([*prompts[1], *found[1][1].outputs[0].token_ids])[len(prompts[1]) - 1 : -1]
    for row, each in zip(reference, found[1][1].outputs[0].logprobs or [], strict=True):
        ((token, candidate),) = list(each.items())[:1]
        assert candidate.logprob == pytest.approx(row[token], abs=0.3)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_quarter_of_the_memory_gives_the_same_tokens(
    full_pool: tuple[int, list[list[int]]], monkeypatch: pytest.MonkeyPatch, mode: str, ahead: bool
) -> None:
    peak, wanted = full_pool
    switches = {"preemption_mode": mode, "async_scheduling": ahead, "num_host_blocks": 200, **FULL}
    with one_program(monkeypatch), sibling(num_blocks=peak // 4 + 1, **MIX, **switches) as engine:
        assert tokens_of(engine.generate(*mixed_requests())) == wanted
        assert ways(engine)[mode] > 10
        assert moved(engine).swapped_in > 0 or mode == "recompute"


MIX: dict[str, Any] = {"max_num_seqs": 32, "max_num_batched_tokens": 32, "num_scheduler_steps": 1}


def mixed_requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """W1 at an eighth of its lengths: 64 requests of up to 90 tokens."""
    requests = scaled("W1")
    return [prompt for prompt, _ in requests], [GREEDY.clone(max_tokens=out) for _, out in requests]


@contextlib.contextmanager
def one_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(EngineConfig, "buckets", property(lambda self: (self.max_num_batched_tokens,)))
        yield


@pytest.fixture(scope="module")
def full_pool() -> tuple[int, list[list[int]]]:
    """Blocks that the mix uses where there are enough, and its tokens."""
    with pytest.MonkeyPatch.context() as patch, one_program(patch), sibling(num_blocks=400, **MIX) as engine:
        for i, (prompt, params) in enumerate(zip(*mixed_requests(), strict=True)):
            engine.add_request(str(i), prompt, params)
        last: dict[str, RequestOutput] = {}
        peak = 0
        while engine.has_unfinished_requests:
            last |= {output.request_id: output for output in engine.step()}
            peak = max(peak, engine.stats().num_blocks - engine.stats().num_free_blocks)
        assert engine.stats().num_preemptions == 0
    outputs = [last[str(i)] for i in range(len(last))]
    for output in outputs[::8]:
        assert is_dense_greedy(output.prompt_token_ids, output.outputs[0].token_ids)
    return peak, tokens_of(outputs)


# Copies that fail.


def until_swapped(engine: Engine) -> str:
    """Adds requests and steps until one is swapped out; its name."""
    for i in range(8):
        engine.add_request(str(i), prompt_of(20, seed=i), GREEDY.clone(max_tokens=30))
    for _ in range(200):
        engine.step()
        for request in core_of(engine).scheduler.waiting:
            if request.host_tables is not None:
                return request.request_id
    raise AssertionError("nobody was swapped out")


def the_one_that_ended(engine: Engine, message: str) -> str:
    """Lets the rest finish; the name of the only one that ends with an error, which the message is a cause of."""
    outputs = drain(engine)
    ((victim, found),) = [
        (name, output.error) for name, output in outputs.items() if output.error is not None
    ]
    error: BaseException | None = found
    while error is not None and message not in str(error):
        error = error.__cause__
    assert error is not None, found
    for name, output in outputs.items():
        wanted = dense_greedy(prompt_of(20, seed=int(name)), 30)
        tokens = output.outputs[0].token_ids
        assert tokens == (wanted[: len(tokens)] if name == victim else wanted)
    assert tokens_of(engine.generate(prompt_of(20), GREEDY)) == [dense_greedy(prompt_of(20), 16)]
    return victim


def test_a_store_that_fails_ends_the_request_that_needs_it(
    swapping: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = core_of(swapping).runner
    gather = runner._small_program("gather_blocks")

    def lost(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        k, v = gather(*arguments)
        jax.block_until_ready(k)
        k.delete()
        return k, v

    monkeypatch.setitem(runner._small, "gather_blocks", lost)
    victim = until_swapped(swapping)
    monkeypatch.setitem(runner._small, "gather_blocks", gather)
    assert the_one_that_ended(swapping, "deleted") == victim


def test_a_load_that_fails_ends_the_request_that_needs_it(
    swapping: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = core_of(swapping).runner
    load = runner._load

    def lost(blocks: tuple[int, ...]) -> Any:
        load(blocks)
        monkeypatch.setattr(runner, "_load", load)
        failed: Future[Any] = Future()
        failed.set_exception(MemoryError("no memory left"))
        return failed

    monkeypatch.setattr(runner, "_load", lost)
    until_swapped(swapping)
    the_one_that_ended(swapping, "no memory left")


# The thread.


def host_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("host-pool")]


@pytest.mark.parametrize("when", ["idle", "while it swaps"])
def test_close_stops_the_thread(when: str, expected: list[list[int]]) -> None:
    before = len(host_threads())
    with sibling(async_scheduling=True, **SWAP) as engine:
        assert tokens_of(engine.generate(PROMPTS, PARAMS)) == expected
        assert len(host_threads()) == before + 1
        if when != "idle":
            for i in range(8):
                engine.add_request(str(i), PROMPTS[i], PARAMS[i])
            swaps = ways(engine)["swap"]
            while ways(engine)["swap"] == swaps:
                engine.step()
            for name in list(engine.block_tables()):
                engine.abort_request(name)
            engine.step()
    assert len(host_threads()) == before
