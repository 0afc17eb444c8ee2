"""Beam search in the engine finds what plain lists over full forward passes find, whatever happens to the blocks."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from jaxpaged import BeamSearchParams, Engine, RequestOutput, SamplingParams
from jaxpaged.detokenizer import IncrementalDetokenizer
from jaxpaged.errors import InvalidRequestError, PromptTooLongError
from jaxpaged.models import Decoder
from tests.core.beam_reference import Reference
from tests.engine.test_failures import Broken, break_step, fail, fail_and_lose_the_state, interrupt
from tests.engine.tiny import (
    CONFIG,
    EOS,
    GREEDY,
    VOCAB_SIZE,
    dense_greedy,
    dense_logprobs,
    drain,
    new_engine,
    prompt_of,
    tiny_decoder,
)
from tests.text.tokenizers_made_here import byte_level

WIDE = BeamSearchParams(beam_width=6, max_tokens=12, ignore_eos=True)


@functools.cache
def found_densely(
    prompt: tuple[int, ...], params: BeamSearchParams, model: Decoder | None = None
) -> list[tuple[float, tuple[int, ...]]]:
    """Scores and tokens of the hypotheses, best first."""

    @functools.cache
    def logprobs(tokens: tuple[int, ...]) -> list[float]:
        return dense_logprobs([*prompt, *tokens], model)[-1].tolist()

    stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else {EOS})
    reference = Reference(logprobs, params, stops)
    while any(reference.running):
        reference.advance()
    return reference.results()[: params.num_return_sequences]


@functools.cache
def likely_tokens(prompt: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens that beams of this prompt run into, to stop at."""
    unstopped = BeamSearchParams(beam_width=4, max_tokens=6, ignore_eos=True)
    (_, first), (_, second), *_ = found_densely(prompt, unstopped)
    return first[2], second[4], second[5]


def check(
    output: RequestOutput, prompt: Sequence[int], params: BeamSearchParams, model: Decoder | None = None
) -> None:
    """Against the dense search; of two beams that are as good as each other either may come first."""
    expected = found_densely(tuple(prompt), params, model)
    assert output.finished
    assert output.error is None
    assert [completion.index for completion in output.outputs] == list(range(len(expected)))
    assert [tuple(completion.token_ids) for completion in output.outputs] == [
        tokens for _, tokens in expected
    ]
    for completion, (score, tokens) in zip(output.outputs, expected, strict=True):
        logprobs = dense_logprobs([*prompt, *tokens], model)[len(prompt) - 1 : -1]
        total = sum(float(row[token]) for row, token in zip(logprobs, tokens, strict=True))
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)
        if params.diversity_penalty == 0:
            assert total / len(tokens) ** params.length_penalty == pytest.approx(score, abs=1e-3)
        stops = tokens[-1] in (params.stop_token_ids or ())
        assert completion.stop_reason == (tokens[-1] if stops else None)
        is_eos = tokens[-1] == EOS and not params.ignore_eos
        assert completion.finish_reason == ("stop" if stops or is_eos else "length")
        assert completion.logprobs is None


NUM_CASES = 10


@functools.cache
def cases() -> list[tuple[list[int], BeamSearchParams]]:
    """Widths, penalties, ends and groups, over prompts of several lengths, some of which share a prefix."""
    long = prompt_of(37)
    return [
        (prompt_of(5), BeamSearchParams(beam_width=1, max_tokens=9)),
        (prompt_of(1), BeamSearchParams(beam_width=2, max_tokens=1)),
        (long, WIDE),
        (
            long[:33],
            BeamSearchParams(beam_width=3, max_tokens=14, num_return_sequences=2, length_penalty=0.0),
        ),
        *[
            (
                prompt_of(10, seed=i),
                BeamSearchParams(
                    beam_width=4,
                    max_tokens=11,
                    stop_token_ids=likely_tokens(tuple(prompt_of(10, seed=i))),
                    length_penalty=length_penalty,
                    early_stopping=early_stopping,
                ),
            )
            for i, (length_penalty, early_stopping) in enumerate(
                [(1.0, True), (0.0, False), (2.0, "never"), (-1.0, False)]
            )
        ],
        (
            prompt_of(18),
            BeamSearchParams(beam_width=6, max_tokens=8, num_beam_groups=3, diversity_penalty=2.0),
        ),
        (prompt_of(7), BeamSearchParams(beam_width=12, max_tokens=6)),  # more beams than rows
    ]


@pytest.mark.parametrize("number", range(NUM_CASES))
def test_finds_what_a_dense_search_finds(engine: Engine, number: int) -> None:
    prompt, params = cases()[number]
    (output,) = engine.beam_search(prompt, params)
    check(output, prompt, params)
    (again,) = engine.beam_search([prompt], [params])  # with the prompt in the prefix cache
    assert [c.token_ids for c in again.outputs] == [c.token_ids for c in output.outputs]
    assert again.num_cached_tokens == (len(prompt) - 1) // 4 * 4
    assert output.prompt_token_ids == prompt


def test_the_cases_are_of_all_kinds() -> None:
    assert len(cases()) == NUM_CASES
    found = [(params, found_densely(tuple(prompt), params)) for prompt, params in cases()]
    lengths = [{len(tokens) for _, tokens in hypotheses} for _, hypotheses in found]
    assert any(len(each) > 2 for each in lengths), "hypotheses of one search end at different lengths"
    ends_early = [max(each) < params.max_tokens for (params, _), each in zip(found, lengths, strict=True)]
    assert any(ends_early)
    assert not all(ends_early)


VARIANTS: dict[str, dict[str, Any]] = {
    "several steps": {"num_scheduler_steps": 4},
    "without prefix cache": {"enable_prefix_caching": False, "memory_warning": 0.5},
    "swap": {"num_host_blocks": 200, "preemption_mode": "swap", "enable_prefix_caching": False},
    "ahead": {
        "async_scheduling": True,
        "num_host_blocks": 20,
        "preemption_mode": "swap",
        "scheduling_policy": "longest-prefix-match",
    },
}


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
def test_many_searches_beside_other_requests(arguments: dict[str, Any]) -> None:
    """All at once in a pool for one or two of them: beams are pushed out and come back, none is lost."""
    with new_engine(**{"num_scheduler_steps": 1} | arguments) as engine:
        before = engine.stats()
        for i, (prompt, params) in enumerate(cases()):
            engine.add_request(f"beams {i}", prompt, params)
            engine.add_request(f"greedy {i}", prompt_of(9 + i, seed=9), GREEDY.clone(n=1 + i % 3))
        outputs = drain(engine)
        for i, (prompt, params) in enumerate(cases()):
            check(outputs[f"beams {i}"], prompt, params)
            greedy = [completion.token_ids for completion in outputs[f"greedy {i}"].outputs]
            assert greedy == [dense_greedy(prompt_of(9 + i, seed=9), 16)] * (1 + i % 3)
        stats = engine.stats()
        assert stats.num_preemptions > before.num_preemptions
        assert sum(o.metrics.num_preemptions for n, o in outputs.items() if n[0] == "b" and o.metrics) > 0
        swapped = engine._core.scheduler.space.stats.swapped_in  # type: ignore[union-attr]
        assert bool(swapped) == ("num_host_blocks" in arguments)
        assert stats.num_free_blocks == stats.num_blocks
        assert stats.num_requests_running == stats.num_requests_waiting == 0


def test_windows_and_full_attention_in_one_model() -> None:
    config = replace(CONFIG, sliding_windows=(6, None))
    model, prompt = tiny_decoder(config), prompt_of(19)
    with new_engine(config) as engine:
        (output,) = engine.beam_search(prompt, WIDE)
        check(output, prompt, WIDE, model)
        assert engine.stats().num_free_blocks == engine.stats().num_blocks
        engine.check_invariants()


def test_beams_share_what_they_have_in_common(engine: Engine) -> None:
    prompt, params = prompt_of(41), BeamSearchParams(beam_width=6, max_tokens=24, ignore_eos=True)
    before, most = engine.stats(), 0
    engine.add_request("s", prompt, params)
    while engine.has_unfinished_requests:
        engine.step()
        most = max(most, engine.stats().num_blocks - engine.stats().num_free_blocks)
    after = engine.stats()
    # 16 blocks for 64 computed tokens of one beam, 96 for six of them.
    assert most <= 10 + 6 * (1 + 24 // 4)
    allocated = after.blocks_allocated - before.blocks_allocated
    assert allocated <= 11 + 6 * 24
    copied = after.blocks_copied - before.blocks_copied
    assert 0 < copied <= 5 * 23, "a fork copies at most the block that is partly filled"
    assert allocated - copied <= 11 + 6 * 6
    assert after.num_preemptions == before.num_preemptions


def test_an_end_frees_everything_at_every_step(engine: Engine) -> None:
    prompt = prompt_of(20)
    for steps in range(0, 12, 3):
        engine.add_request("beams", prompt, WIDE)
        engine.add_request("other", prompt, GREEDY)
        for _ in range(steps):
            engine.step()
        engine.abort_request("beams")
        engine.check_invariants()
        outputs = drain(engine)
        assert outputs["other"].outputs[0].token_ids == dense_greedy(prompt, 16)
        assert {completion.finish_reason for completion in outputs["beams"].outputs} == {"abort"}
        lengths = {len(completion.token_ids) for completion in outputs["beams"].outputs}
        assert lengths == {steps}, "the beams as they are: the prompt is cached, or nothing has run"
        assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_what_is_cut_short_is_ranked_with_what_has_ended(engine: Engine) -> None:
    prompt = prompt_of(10, seed=3)
    stops = likely_tokens(tuple(prompt))
    params = BeamSearchParams(beam_width=4, max_tokens=60, stop_token_ids=stops, length_penalty=0.0)
    before = dict(engine.stats().finished)
    engine.add_request("s", prompt, params)
    for _ in range(9):
        engine.step()
    engine.abort_request("s")
    (output,) = engine.step()
    reasons = [completion.finish_reason for completion in output.outputs]
    assert set(reasons) == {"stop", "abort"}
    scores = [completion.cumulative_logprob or 0.0 for completion in output.outputs]
    assert scores == sorted(scores, reverse=True)
    after = engine.stats().finished
    assert {name: after[name] - before.get(name, 0) for name in ("stop", "abort")} == {
        name: reasons.count(name) for name in ("stop", "abort")
    }


def test_a_search_whose_time_is_over_gives_what_it_has(engine: Engine) -> None:
    engine.add_request("s", prompt_of(10), replace(WIDE, max_tokens=100), deadline=1e-9)
    (output,) = engine.step()
    assert [(c.finish_reason, c.token_ids) for c in output.outputs] == [("timeout", [])]


@pytest.mark.parametrize("failure", [fail, fail_and_lose_the_state])
def test_a_step_that_raises_ends_the_whole_search(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, failure: Any
) -> None:
    struck, late = prompt_of(9), prompt_of(40)
    engine.add_request("struck", struck, WIDE)
    for _ in range(5):
        engine.step()
    engine.add_request("late", late, WIDE)
    with monkeypatch.context() as patch:
        patch.setattr(engine._core.scheduler, "max_num_batched_tokens", 6)  # type: ignore[union-attr]
        break_step(monkeypatch, engine, failure)
        (output,) = engine.step()
    assert (output.request_id, type(output.error)) == ("struck", Broken)
    assert {completion.finish_reason for completion in output.outputs} == {"error"}
    assert {len(completion.token_ids) for completion in output.outputs} == {5}
    engine.check_invariants()
    check(drain(engine)["late"], late, WIDE)
    check(engine.beam_search(struck, WIDE)[0], struck, WIDE)


def test_an_interrupt_costs_no_beam(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = {"a": prompt_of(9), "b": prompt_of(14)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, WIDE)
    for _ in range(3):
        for _ in range(4):
            engine.step()
        break_step(monkeypatch, engine, interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        engine.check_invariants()
    outputs = drain(engine)
    for name, prompt in prompts.items():
        check(outputs[name], prompt, WIDE)


def test_text_of_hypotheses(engine: Engine) -> None:
    prompt, tokenizer = prompt_of(10, seed=3), byte_level()
    stops = likely_tokens(tuple(prompt))
    params = BeamSearchParams(beam_width=4, max_tokens=11, stop_token_ids=stops, length_penalty=0.0)
    (bare,) = engine.beam_search(prompt, params)
    (whole,) = engine.beam_search(prompt, replace(params, include_stop_str_in_output=True))
    assert {completion.finish_reason for completion in bare.outputs} == {"stop", "length"}
    for short, full in zip(bare.outputs, whole.outputs, strict=True):
        assert short.token_ids == full.token_ids
        assert full.text == tokenizer.decode(full.token_ids)
        end = -1 if short.finish_reason == "stop" else None
        assert short.text == tokenizer.decode(short.token_ids[:end])
    assert bare.prompt is None
    (output,) = engine.beam_search("the cat", params)
    assert output.prompt == "the cat"


def test_a_text_that_cannot_be_had_is_an_error_of_its_search(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, token_id: int) -> str:
        raise Broken("no text today")

    engine.add_request("a", prompt_of(5), replace(WIDE, max_tokens=2))
    monkeypatch.setattr(IncrementalDetokenizer, "append", broken)
    output = drain(engine)["a"]
    assert isinstance(output.error, Broken)
    assert {completion.finish_reason for completion in output.outputs} == {"error"}
    with pytest.raises(Broken):
        engine.beam_search(prompt_of(5), WIDE)


def test_one_output_at_the_end_and_many_at_once(engine: Engine) -> None:
    prompts = [prompt_of(length) for length in (3, 21, 8)]
    params = [BeamSearchParams(beam_width=width, max_tokens=12) for width in (1, 3, 5)]
    outputs = engine.beam_search(prompts, params)
    for output, prompt, each in zip(outputs, prompts, params, strict=True):
        check(output, prompt, each)
    engine.add_request("s", prompts[0], params[1])
    shown = []
    while engine.has_unfinished_requests:
        shown += engine.step()
    (only,) = shown
    check(only, prompts[0], params[1])
    assert only.metrics is not None
    assert only.metrics.first_token_time is not None
    assert only.metrics.last_token_time is not None
    assert only.metrics.first_token_time < only.metrics.last_token_time


def test_a_live_request_branches_into_a_beam_search(engine: Engine) -> None:
    engine.add_request("trunk", prompt_of(13), GREEDY)
    for _ in range(6):
        engine.step()
    engine.fork("trunk", "beams", append_token_ids=[7], params=WIDE)
    outputs = drain(engine)
    prompt = outputs["beams"].prompt_token_ids
    assert prompt == [*prompt_of(13), *dense_greedy(prompt_of(13), len(prompt) - 14), 7]
    assert outputs["beams"].num_cached_tokens == len(prompt) - 2
    check(outputs["beams"], prompt, WIDE)


def test_room_ends_a_search(engine: Engine) -> None:
    prompt = prompt_of(124)
    (output,) = engine.beam_search(prompt, BeamSearchParams(beam_width=2, max_tokens=50, ignore_eos=True))
    assert [len(completion.token_ids) for completion in output.outputs] == [4, 4]
    check(output, prompt, BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True))


BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "no parameters": ([1], None, InvalidRequestError, "params"),
    "other parameters": ([1], SamplingParams(), InvalidRequestError, "params"),
    "too few": ([[1], [2]], [WIDE], InvalidRequestError, "params"),
    "too wide": (
        [1],
        BeamSearchParams(beam_width=20, max_tokens=3),
        InvalidRequestError,
        "beam_width=20: needs the 21 .* max_logprobs=20",
    ),
    "too wide with stops": (
        [1],
        BeamSearchParams(beam_width=10, max_tokens=3, stop_token_ids=range(2, 12)),
        InvalidRequestError,
        "beam_width=10: needs the 21",
    ),
    "no such token": ([1], replace(WIDE, stop_token_ids=[VOCAB_SIZE]), InvalidRequestError, "stop_token_ids"),
    "empty prompt": ([[]], WIDE, InvalidRequestError, "prompt"),
    "long prompt": (prompt_of(128), WIDE, PromptTooLongError, "prompt"),
    "bad prompt": ([1, VOCAB_SIZE], WIDE, InvalidRequestError, "prompt_token_ids"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_refuses_what_is_wrong(engine: Engine, bad: tuple[Any, Any, type[Exception], str]) -> None:
    prompts, params, kind, match = bad
    with pytest.raises(kind, match=match):
        engine.beam_search(prompts, params)
    assert not engine.has_unfinished_requests
    assert engine.block_tables() == {}


def test_beam_searches_are_not_sampled_streamed_or_branched_from(engine: Engine) -> None:
    parameters: Any = WIDE
    with pytest.raises(InvalidRequestError, match="sampling_params"):
        engine.generate([1], parameters)
    with pytest.raises(InvalidRequestError, match="sampling_params"):
        engine.stream([1], parameters)
    engine.add_request("s", prompt_of(5), WIDE)
    with pytest.raises(InvalidRequestError, match="request_id='s': is a beam search"):
        engine.fork("s", "t")
    with pytest.raises(InvalidRequestError, match="request_id='s': is in use"):
        engine.add_request("s", prompt_of(5), WIDE)
    check(drain(engine)["s"], prompt_of(5), WIDE)
