"""Branching live requests, and prefixes that are kept: shared memory under the user's control."""

from collections.abc import Iterator
from typing import Any

import pytest

from jaxpaged import Engine, SamplingParams
from jaxpaged.errors import InvalidRequestError, PromptTooLongError, UnknownRequestError
from tests.engine.family import FULL, PARAMS, PROMPTS, Clock, core_of, sibling, unburdened
from tests.engine.test_bad_input import Call, check_refused
from tests.engine.test_failures import break_step, fail_and_lose_the_state
from tests.engine.tiny import (
    GREEDY,
    VOCAB_SIZE,
    dense_greedy,
    dense_logprobs,
    drain,
    prompt_of,
    tokens_of,
)

PROMPT = prompt_of(22)
LONG = GREEDY.clone(max_tokens=40)


@pytest.fixture(scope="module", params=[False, True], ids=["in step", "ahead"])
def engine_for_all(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with sibling(async_scheduling=request.param, **FULL) as engine:
        yield engine


@pytest.fixture
def engine(engine_for_all: Engine) -> Iterator[Engine]:
    with unburdened(engine_for_all) as found:
        yield found


def run_until(engine: Engine, name: str, count: int) -> None:
    """Steps until a live request has so many output tokens, or a few more."""
    while live(engine, name).num_output_tokens < count:
        engine.step()


def live(engine: Engine, name: str, index: int = 0) -> Any:
    return core_of(engine).generations[name].completions[index].request


# Forks.


@pytest.mark.parametrize("appended", [[], [7], [9, 8, 7, 6, 5, 4]], ids=len)
@pytest.mark.parametrize("at", [1, 2, 4, 5, 21, 22, 23, 24, 25, None])
def test_a_fork_goes_on_from_where_it_branched(engine: Engine, at: int | None, appended: list[int]) -> None:
    """Inside of a block and at its end, in the prompt and in the output; while the parent's next step is under way."""
    engine.add_request("parent", PROMPT, LONG)
    run_until(engine, "parent", 6)
    known = list(live(engine, "parent").token_ids)
    prompt = known[:at] + appended
    computed = live(engine, "parent").num_computed_tokens
    copied = engine.stats().blocks_copied
    engine.fork("parent", "child", at=at, append_token_ids=appended, params=GREEDY)
    engine.check_invariants()
    last = drain(engine)
    assert last["child"].prompt_token_ids == prompt
    assert tokens_of([last["child"], last["parent"]]) == [dense_greedy(prompt, 16), dense_greedy(PROMPT, 40)]
    # What both have computed is shared but for a block that is not full, of which one has to take a copy.
    shared = min(len(known) if at is None else at, len(prompt) - 1, computed)
    assert last["child"].num_cached_tokens == shared
    assert engine.stats().blocks_copied - copied == (shared % 4 > 0)


def test_shared_blocks_are_held_not_copied(engine: Engine) -> None:
    engine.add_request("parent", PROMPT, LONG)
    run_until(engine, "parent", 6)
    free = engine.stats().num_free_blocks
    for i in range(5):
        engine.fork("parent", str(i), at=24, append_token_ids=[i + 3])
    tables = engine.block_tables()
    assert [tables[str(i)] for i in range(5)] == [[tables["parent"][0][:6]]] * 5
    assert engine.stats().num_free_blocks == free
    before = engine.stats()
    engine.step()
    after = engine.stats()
    # One token for each child, and the parent's next; that eight times, where that is one program.
    assert after.num_tokens - before.num_tokens == (5 + 1) * (after.num_steps - before.num_steps)
    last = drain(engine)
    known = PROMPT + dense_greedy(PROMPT, 2)
    for i in range(5):
        assert last[str(i)].outputs[0].token_ids == dense_greedy([*known, i + 3], 40)


@pytest.mark.parametrize("index", [0, 2])
def test_a_fork_of_one_of_several_completions(engine: Engine, index: int) -> None:
    params = LONG.clone(n=3, temperature=1.0, seed=5)
    engine.add_request("parent", PROMPT, params)
    run_until(engine, "parent", 5)
    run_until(engine, "parent", 5)
    known = list(live(engine, "parent", index).token_ids)
    engine.fork("parent", "child", index=index, params=GREEDY.clone(n=2))
    last = drain(engine)
    assert last["child"].prompt_token_ids == known
    assert [c.token_ids for c in last["child"].outputs] == [dense_greedy(known, 16)] * 2
    (alone,) = engine.generate(PROMPT, params)
    assert [c.token_ids for c in last["parent"].outputs] == [c.token_ids for c in alone.outputs]
    assert alone.outputs[0].token_ids != alone.outputs[2].token_ids


def test_a_fork_inherits_what_it_is_not_given(engine: Engine) -> None:
    params = SamplingParams(temperature=0.8, seed=3, n=2, max_tokens=9, ignore_eos=True)
    engine.add_request("parent", PROMPT, params, tenant="t", priority=3, cache_salt="salt")
    engine.step()
    engine.step()
    engine.fork("parent", "child", at=20)
    child = live(engine, "child")
    assert (child.tenant, child.priority, child.cache_salt) == ("t", 3, "salt")
    last = drain(engine)
    (wanted,) = engine.generate({"prompt_token_ids": PROMPT[:20], "cache_salt": "salt"}, params)
    assert [c.token_ids for c in last["child"].outputs] == [c.token_ids for c in wanted.outputs]
    (stranger,) = engine.generate(PROMPT, GREEDY)
    assert stranger.num_cached_tokens == 0


@pytest.mark.parametrize("steps", range(4))
def test_a_fork_of_a_request_that_has_not_computed_its_prompt(engine: Engine, steps: int) -> None:
    """It waits, or is in the middle of its prompt: what is computed is shared, the rest each computes."""
    prompt = prompt_of(45)
    engine.add_request("parent", prompt, GREEDY)
    for _ in range(steps):
        engine.step()
    engine.fork("parent", "child", at=43)
    engine.fork("parent", "all")
    last = drain(engine)
    assert last["parent"].outputs[0].token_ids == dense_greedy(prompt, 16)
    assert last["child"].outputs[0].token_ids == dense_greedy(prompt[:43], 16)
    assert last["all"].outputs[0].token_ids == dense_greedy(last["all"].prompt_token_ids, 16)
    assert last["child"].num_cached_tokens >= min(42, 16 * steps) // 4 * 4


def test_a_fork_outlives_its_parent(engine: Engine) -> None:
    engine.add_request("0", PROMPT, LONG)
    run_until(engine, "0", 3)
    prompt = list(live(engine, "0").token_ids)
    for i in range(1, 6):  # a chain of forks, each parent aborted at once
        prompt = [*live(engine, str(i - 1)).token_ids, i + 2]
        engine.fork(str(i - 1), str(i), append_token_ids=[i + 2])
        engine.abort_request(str(i - 1))
        engine.check_invariants()
        for _ in range(i % 3):
            engine.step()
    assert drain(engine)["5"].outputs[0].token_ids == dense_greedy(prompt, 40)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_forks_under_pressure(mode: str) -> None:
    """Parents and children are preempted, and branched from while they are."""
    with sibling(async_scheduling=True, num_host_blocks=60, preemption_mode=mode, **FULL) as engine:
        for i in range(6):
            engine.add_request(str(i), prompt_of(16, seed=i), GREEDY.clone(max_tokens=30))
        wanted = {str(i): (prompt_of(16, seed=i), 30) for i in range(6)}
        outputs = {}
        for turn in range(500):
            if turn % 6 == 5 and len(wanted) < 16:
                name = list(core_of(engine).generations)[turn % len(core_of(engine).generations)]
                known = live(engine, name).token_ids
                child = f"{name}.{turn}"
                wanted[child] = ([*known[: len(known) - turn % 3], 5], 8)
                engine.fork(
                    name,
                    child,
                    at=len(known) - turn % 3,
                    append_token_ids=[5],
                    params=GREEDY.clone(max_tokens=8),
                )
            outputs |= {output.request_id: output for output in engine.step()}
            engine.check_invariants()
            if not engine.has_unfinished_requests:
                break
        assert engine.stats().num_preemptions > 0
        assert {name: output.outputs[0].token_ids for name, output in outputs.items()} == {
            name: dense_greedy(*each) for name, each in wanted.items()
        }


def test_log_probabilities_of_a_forks_prompt(engine: Engine) -> None:
    """They need logits of tokens that its parent computed; so these are not shared."""
    engine.add_request("parent", PROMPT, LONG)
    run_until(engine, "parent", 3)
    engine.fork("parent", "child", at=20, params=GREEDY.clone(prompt_logprobs=0, logprobs=0))
    child = drain(engine)["child"]
    reference = dense_logprobs([*PROMPT[:20], *child.outputs[0].token_ids])
    assert child.prompt_logprobs is not None
    assert len(child.prompt_logprobs) == 20
    for row, token, found in zip(reference, PROMPT[1:20], child.prompt_logprobs[1:], strict=False):
        assert found is not None
        assert found[token].logprob == pytest.approx(row[token], abs=1e-4)


def test_search_in_a_tree_by_forks(engine: Engine) -> None:
    """Beam search out of public calls: each node is a live request, its children are forks, losers are aborted."""
    width, depth = 3, 5
    before = engine.stats().num_tokens

    def candidates_of(names: list[str]) -> dict[str, dict[int, float]]:
        """For each node the most likely tokens that follow it."""
        found: dict[str, dict[int, float]] = {}
        while len(found) < len(names):
            for output in engine.step():
                if output.request_id in names and not output.finished:
                    (first, *_) = output.outputs[0].logprobs or []
                    found[output.request_id] = {token: each.logprob for token, each in first.items()}
        return found

    engine.add_request("root", PROMPT, GREEDY.clone(logprobs=width, max_tokens=8))
    beams = {"root": (PROMPT, 0.0)}
    for level in range(depth):
        grown = [
            (score + logprob, tokens, token, name)
            for name, found in candidates_of(list(beams)).items()
            for token, logprob in found.items()
            for tokens, score in [beams[name]]
        ]
        best, old, beams = sorted(grown, reverse=True)[:width], beams, {}
        for i, (score, tokens, token, name) in enumerate(best):
            child = f"{level}.{i}"
            engine.fork(name, child, at=len(tokens), append_token_ids=[token])
            beams[child] = ([*tokens, token], score)
        for name in old:
            engine.abort_request(name)
        engine.check_invariants()
    for name in beams:
        engine.abort_request(name)
    engine.step()
    found = {tuple(tokens): score for tokens, score in beams.values()}
    wanted = beams_by_full_passes(PROMPT, width, depth)
    assert found.keys() == wanted.keys()
    assert all(found[tokens] == pytest.approx(wanted[tokens], abs=1e-3) for tokens in wanted)
    # A node costs the one token it adds, and one more that it is ahead of its abort.
    assert engine.stats().num_tokens - before <= len(PROMPT) + 2 * 2 * width * depth


def beams_by_full_passes(prompt: list[int], width: int, depth: int) -> dict[tuple[int, ...], float]:
    beams = {tuple(prompt): 0.0}
    for _ in range(depth):
        grown = {}
        for tokens, score in beams.items():
            row = dense_logprobs(list(tokens))[-1]
            for token in row.argsort()[-width:]:
                grown[*tokens, int(token)] = score + float(row[token])
        beams = dict(sorted(grown.items(), key=lambda each: -each[1])[:width])
    return beams


BAD_FORKS: dict[str, tuple[Call, type[ValueError], str]] = {
    "unknown": (lambda e: e.fork("nobody", "new"), UnknownRequestError, "request_id='nobody'"),
    "taken": (lambda e: e.fork("live", "live"), InvalidRequestError, "request_id='live'"),
    "empty": (lambda e: e.fork("live", ""), InvalidRequestError, "request_id=''"),
    "at 0": (lambda e: e.fork("live", "new", at=0), InvalidRequestError, r"at=0: must be in \[1, "),
    "negative": (lambda e: e.fork("live", "new", at=-1), InvalidRequestError, "at=-1"),
    "beyond": (lambda e: e.fork("live", "new", at=10**6), InvalidRequestError, "at=1000000"),
    "float": (lambda e: e.fork("live", "new", at=2.0), InvalidRequestError, r"at=2\.0"),
    "bool": (lambda e: e.fork("live", "new", at=True), InvalidRequestError, "at=True"),
    "index": (lambda e: e.fork("live", "new", index=2), InvalidRequestError, r"index=2: must be in \[0, 1\]"),
    "index below": (lambda e: e.fork("live", "new", index=-1), InvalidRequestError, "index=-1"),
    "index bool": (lambda e: e.fork("live", "new", index=True), InvalidRequestError, "index=True"),
    "text": (
        lambda e: e.fork("live", "new", append_token_ids="ab"),
        InvalidRequestError,
        "append_token_ids='ab'",
    ),
    "number": (
        lambda e: e.fork("live", "new", append_token_ids=5),
        InvalidRequestError,
        "append_token_ids=5",
    ),
    "foreign id": (
        lambda e: e.fork("live", "new", append_token_ids=[VOCAB_SIZE]),
        InvalidRequestError,
        f"token_ids={VOCAB_SIZE}",
    ),
    "float id": (
        lambda e: e.fork("live", "new", append_token_ids=[1.5]),
        InvalidRequestError,
        r"token_ids=1\.5",
    ),
    "too long": (
        lambda e: e.fork("live", "new", append_token_ids=[3] * 120),
        PromptTooLongError,
        "max_model_len=128",
    ),
    "params": (lambda e: e.fork("live", "new", params={}), InvalidRequestError, r"params=\{\}"),
}

BAD_PINS: dict[str, tuple[Call, type[ValueError], str]] = {
    "no name": (lambda e: e.pin_prefix(PROMPT, pin_id=""), InvalidRequestError, "pin_id=''"),
    "name": (lambda e: e.pin_prefix(PROMPT, pin_id=5), InvalidRequestError, "pin_id=5"),
    "salt": (lambda e: e.pin_prefix(PROMPT, pin_id="x", cache_salt=5), InvalidRequestError, "cache_salt=5"),
    "prompt": (lambda e: e.pin_prefix([-3], pin_id="x"), InvalidRequestError, "prompt_token_ids=-3"),
    "too many": (
        lambda e: e.pin_prefix(prompt_of(80), pin_id="x"),
        InvalidRequestError,
        "prompt='20 blocks': all pins may take 19 blocks",
    ),
    "unknown": (lambda e: e.unpin_prefix("nobody"), InvalidRequestError, "pin_id='nobody'"),
    **{
        f"ttl {ttl!r}": (
            lambda e, ttl=ttl: e.pin_prefix(PROMPT, pin_id="x", ttl=ttl),
            InvalidRequestError,
            f"ttl={ttl!r}",
        )
        for ttl in (0, -1.0, float("nan"), float("inf"), "1", True)
    },
}


def test_mistakes_change_nothing(engine: Engine) -> None:
    engine.add_request("live", PROMPT, GREEDY.clone(n=2))
    engine.step()
    engine.step()
    for call, error, message in [*BAD_FORKS.values(), *BAD_PINS.values()]:
        check_refused(engine, call, message, error)
    assert [c.token_ids for c in drain(engine)["live"].outputs] == [dense_greedy(PROMPT, 16)] * 2
    with pytest.raises(UnknownRequestError, match="request_id='live'"):
        engine.fork("live", "new")


# Pins.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


SYSTEM = prompt_of(30)  # seven full blocks
QUESTION = [*SYSTEM, 17, 18]


def ask(engine: Engine) -> int:
    """How many tokens of the question are found in the cache; the answer is checked."""
    (output,) = engine.generate(QUESTION, GREEDY)
    assert output.outputs[0].token_ids == dense_greedy(QUESTION, 16)
    engine.check_invariants()
    return output.num_cached_tokens


def push_out(engine: Engine) -> None:
    """Others take all the memory there is, one after the other."""
    for seed in range(4):
        prompt = prompt_of(40, seed)
        assert tokens_of(engine.generate(prompt, GREEDY)) == [dense_greedy(prompt, 16)]


def test_a_pinned_prefix_is_found_after_any_pressure(engine: Engine) -> None:
    assert ask(engine) == 0
    push_out(engine)
    assert ask(engine) == 0  # unless it is pinned
    push_out(engine)
    assert engine.pin_prefix(SYSTEM, pin_id="system") == 0  # before it is computed
    ask(engine)
    for _ in range(2):
        push_out(engine)
        assert ask(engine) == 28
    assert engine.stats().num_blocks - engine.stats().num_free_blocks == 7
    assert engine.pin_prefix(SYSTEM, pin_id="system") == 7  # again, now that it is there
    engine.unpin_prefix("system")
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert ask(engine) == 28  # until it is pushed out
    push_out(engine)
    assert ask(engine) == 0


def test_a_pin_ends_when_its_time_is_over(engine: Engine, clock: Clock) -> None:
    engine.pin_prefix(SYSTEM, pin_id="short", ttl=10.0)
    ask(engine)
    clock.ahead = 9.0
    push_out(engine)
    assert ask(engine) == 28
    engine.pin_prefix(SYSTEM, pin_id="short", ttl=10.0)  # its time begins anew
    clock.ahead = 18.0
    push_out(engine)
    assert ask(engine) == 28
    clock.ahead = 20.0
    push_out(engine)
    assert ask(engine) == 0
    with pytest.raises(InvalidRequestError, match="pin_id='short'"):
        engine.unpin_prefix("short")


def test_pins_give_way_to_a_request_that_needs_all_memory(engine: Engine) -> None:
    engine.pin_prefix(SYSTEM, pin_id="first", ttl=100.0)
    engine.pin_prefix(prompt_of(40, seed=9), pin_id="last")
    ask(engine)
    engine.generate(prompt_of(40, seed=9), GREEDY)
    assert engine.stats().num_blocks - engine.stats().num_free_blocks == 17
    prompt = prompt_of(60)
    (output,) = engine.generate(prompt, GREEDY.clone(max_tokens=56))  # 29 of 39 blocks
    assert output.outputs[0].token_ids == dense_greedy(prompt, 56)
    with pytest.raises(InvalidRequestError):
        engine.unpin_prefix("first")
    engine.unpin_prefix("last")


def test_all_pins_together_take_half_of_the_pool_at_most(engine: Engine) -> None:
    engine.pin_prefix(prompt_of(40), pin_id="a")
    engine.pin_prefix(prompt_of(40), pin_id="b")  # the same blocks count once
    with pytest.raises(InvalidRequestError, match="prompt='10 blocks'"):
        engine.pin_prefix(prompt_of(40, seed=1), pin_id="c")
    engine.pin_prefix(prompt_of(36, seed=1), pin_id="c")
    engine.generate(prompt_of(40), GREEDY.clone(max_tokens=1))
    engine.unpin_prefix("a")
    assert engine.stats().num_blocks - engine.stats().num_free_blocks == 10  # those of b
    engine.unpin_prefix("b")
    engine.unpin_prefix("c")


def test_a_pin_outlasts_what_its_blocks_held(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the cache was reset, or the pool was lost, it takes hold again of what is computed anew."""
    engine.pin_prefix(SYSTEM, pin_id="system")
    ask(engine)
    engine.reset_prefix_cache()
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert ask(engine) == 0
    push_out(engine)
    assert ask(engine) == 28
    engine.add_request("struck", prompt_of(5), GREEDY)
    break_step(monkeypatch, engine, fail_and_lose_the_state)
    drain(engine)
    assert ask(engine) == 0
    push_out(engine)
    assert ask(engine) == 28
    engine.unpin_prefix("system")


def test_a_step_that_fails_unpins_what_it_did_not_write(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(runner: Any) -> None:
        raise RuntimeError("no step today")

    engine.pin_prefix(SYSTEM, pin_id="system")
    engine.add_request("struck", QUESTION, GREEDY)
    break_step(monkeypatch, engine, fail)
    assert drain(engine)["struck"].error is not None
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert ask(engine) == 0
    assert ask(engine) == 28
    engine.unpin_prefix("system")


def test_salts_keep_pins_apart(engine: Engine) -> None:
    engine.pin_prefix({"prompt_token_ids": SYSTEM, "cache_salt": "a"}, pin_id="a")
    engine.pin_prefix(SYSTEM, pin_id="b", cache_salt="b")
    ask(engine)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    for salt in "ab":
        engine.generate({"prompt_token_ids": QUESTION, "cache_salt": salt}, GREEDY)
    assert engine.stats().num_blocks - engine.stats().num_free_blocks == 14
    for name in "ab":
        engine.unpin_prefix(name)


def test_without_a_prefix_cache_nothing_can_be_pinned() -> None:
    refusal = pytest.raises(InvalidRequestError, match=r"pin_id='x'.*enable_prefix_caching")
    with sibling(enable_prefix_caching=False) as engine, refusal:
        engine.pin_prefix(SYSTEM, pin_id="x")


def test_pins_beside_preempted_requests() -> None:
    """Their blocks go to the host and come back, or are found where they are pinned."""
    for mode in ("swap", "recompute"):
        with sibling(async_scheduling=True, num_host_blocks=60, preemption_mode=mode, **FULL) as engine:
            engine.pin_prefix(PROMPTS[0], pin_id="x")
            engine.pin_prefix(PROMPTS[4], pin_id="y", ttl=1e-3)
            for n in (1, 2):
                outputs = engine.generate(PROMPTS, [params.clone(n=n) for params in PARAMS])
                for output, prompt, params in zip(outputs, PROMPTS, PARAMS, strict=True):
                    wanted = dense_greedy(prompt, params.max_tokens or 0)
                    assert [c.token_ids for c in output.outputs] == [wanted] * n
                engine.check_invariants()
            assert engine.stats().num_preemptions > 0
            core_of(engine).scheduler.space.pins.remove("x")
