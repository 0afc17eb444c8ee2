"""Branching live requests: shared blocks, the right tokens, search in a tree."""

from typing import Any

import pytest

from jaxpaged import Engine, SamplingParams
from jaxpaged.errors import InvalidRequestError, PromptTooLongError, UnknownRequestError
from tests.engine.family import FULL, core_of, sibling
from tests.engine.test_bad_input import Call, check_refused
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


@pytest.fixture
def engine(either: Engine) -> Engine:
    return either


def run_until(engine: Engine, name: str, count: int) -> None:
    """Steps until a live request has so many output tokens, or a few more."""
    while live(engine, name).num_output_tokens < count:
        engine.step()


def live(engine: Engine, name: str, index: int = 0) -> Any:
    return core_of(engine).generations[name].completions[index].request


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


def test_a_wrong_fork_changes_nothing(engine: Engine) -> None:
    engine.add_request("live", PROMPT, GREEDY.clone(n=2))
    engine.step()
    engine.step()
    for call, error, message in BAD_FORKS.values():
        check_refused(engine, call, message, error)
    assert [c.token_ids for c in drain(engine)["live"].outputs] == [dense_greedy(PROMPT, 16)] * 2
    with pytest.raises(UnknownRequestError, match="request_id='live'"):
        engine.fork("live", "new")
