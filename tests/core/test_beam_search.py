"""Beam search against an exhaustive reference, against transformers, and by hand."""

import functools
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxpaged.beam_params import BeamSearchParams
from jaxpaged.beam_search import Beam, BeamHypothesis, BeamSearch, Move
from jaxpaged.errors import InvalidRequestError
from tests.core.beam_reference import Model, Reference
from tests.core.toy_language_model import VOCAB, log_probabilities

GOLDENS = json.loads((Path(__file__).parent / "beam_goldens.json").read_text(encoding="utf-8"))
EOS = VOCAB - 1


def toy(seed: int, vocab_size: int = VOCAB) -> Model:
    return lambda history: log_probabilities(seed, history, vocab_size)


def candidates_of(model: Model, beam: Beam, count: int) -> list[tuple[int, float]]:
    return sorted(enumerate(model(beam.token_ids)), key=lambda entry: -entry[1])[:count]


def step(search: BeamSearch, model: Model) -> list[Move]:
    """One step with no more candidates than the search asks for; checks what holds of every step."""
    before = search.beams
    moves = search.advance([candidates_of(model, beam, search.candidates_needed) for beam in before])
    search.check_invariants()
    assert search.num_beams == len(moves) <= search.params.beam_width
    assert search.is_done == (not moves)
    for move, beam in zip(moves, search.beams, strict=True):
        parent = before[move.parent]
        assert beam.token_ids == (*parent.token_ids, move.token)
        assert parent.group in (beam.group, None)
        assert beam.cumulative_logprob == pytest.approx(total(model, beam.token_ids))
    return moves


def run(model: Model, eos: Sequence[int] = (EOS,), **options: Any) -> list[BeamHypothesis]:
    search = BeamSearch(BeamSearchParams(**options), eos)
    while not search.is_done:
        step(search, model)
    return search.results()


def total(model: Model, tokens: Sequence[int]) -> float:
    return sum(model(tuple(tokens[:i]))[token] for i, token in enumerate(tokens))


@st.composite
def searches(draw: st.DrawFn) -> tuple[Model, BeamSearchParams, list[int]]:
    num_groups = draw(st.sampled_from([1, 1, 2, 3]))
    options = {
        "beam_width": num_groups * draw(st.integers(1, 3)),
        "max_tokens": draw(st.integers(1, 7)),
        "ignore_eos": draw(st.sampled_from([False, False, True])),
        "length_penalty": draw(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])),
        "early_stopping": draw(st.sampled_from([True, False, "never"])),
        "stop_token_ids": draw(st.sampled_from([(), (), (0,), (0, 1, 2, EOS)])),
        "num_beam_groups": num_groups,
        "diversity_penalty": draw(st.sampled_from([0.0, 0.4, 3.0])) if num_groups > 1 else 0.0,
    }
    seed, forbidden = draw(st.integers(0, 999)), draw(st.sampled_from([(), (), (1,), (0, 3), (0, 1, 3, 4)]))

    @functools.cache
    def model(history: tuple[int, ...]) -> list[float]:
        logprobs = log_probabilities(seed, history)
        return [-math.inf if token in forbidden else lp for token, lp in enumerate(logprobs)]

    return model, BeamSearchParams(**options), draw(st.sampled_from([[EOS], [EOS, 4]]))


@hypothesis.settings(max_examples=300)
@hypothesis.given(searches())
def test_every_step_is_that_of_the_reference(case: tuple[Model, BeamSearchParams, list[int]]) -> None:
    model, params, eos = case
    stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else set(eos))
    search, reference = BeamSearch(params, eos), Reference(model, params, stops)
    while not search.is_done:
        step(search, model)
        reference.advance()
        expected = {(group, tokens) for group, beams in enumerate(reference.running) for _, tokens in beams}
        assert {(beam.group, beam.token_ids) for beam in search.beams} == expected
    expected_results = reference.results()
    results = search.results()
    assert [found.token_ids for found in results] == [tokens for _, tokens in expected_results]
    assert [found.score for found in results] == pytest.approx([score for score, _ in expected_results])
    for found in results:
        stopped = found.token_ids[-1] in stops
        assert found.finish_reason == ("stop" if stopped else "length")
        is_eos = found.token_ids[-1] in eos and not params.ignore_eos
        assert found.stop_reason == (found.token_ids[-1] if stopped and not is_eos else None)
        assert found.cumulative_logprob == pytest.approx(total(model, found.token_ids))


@hypothesis.settings(max_examples=100)
@hypothesis.given(searches())
def test_each_parents_best_child_stays_in_its_place(
    case: tuple[Model, BeamSearchParams, list[int]],
) -> None:
    model, params, eos = case
    search = BeamSearch(params, eos)
    while not search.is_done:
        moves = step(search, model)
        first_of = {move.parent: index for index, move in reversed(list(enumerate(moves)))}
        for parent in first_of:
            if parent < len(moves):
                assert moves[parent].parent == parent
                best = max(
                    (
                        beam.score
                        for beam, move in zip(search.beams, moves, strict=True)
                        if move.parent == parent
                    )
                )
                assert search.beams[parent].score == best


@pytest.mark.parametrize("case", GOLDENS, ids=map(str, range(len(GOLDENS))))
def test_finds_what_transformers_finds(case: dict[str, Any]) -> None:
    options = {name: case[name] for name in case if name not in ("seed", "eos", "hypotheses")}
    results = run(toy(case["seed"]), case["eos"], **options)
    assert [list(found.token_ids) for found in results] == [tokens for tokens, _ in case["hypotheses"]]
    # transformers adds in float32.
    scores = [score for _, score in case["hypotheses"]]
    assert [found.score for found in results] == pytest.approx(scores, abs=2e-5)


def test_goldens_tell_the_three_kinds_of_early_stopping_apart() -> None:
    found: dict[str, dict[str, Any]] = {}
    for case in GOLDENS:
        if "early_stopping" in case:
            same = json.dumps(
                {name: case[name] for name in case if name not in ("early_stopping", "hypotheses")}
            )
            found.setdefault(same, {})[str(case["early_stopping"])] = case["hypotheses"]
    for one, other in itertools.combinations(("True", "False", "never"), 2):
        assert any(by_kind[one] != by_kind[other] for by_kind in found.values())


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_beams_for_every_sequence_find_the_best_of_all(seed: int, length_penalty: float) -> None:
    vocab_size, length = 4, 3
    model, eos = toy(seed, vocab_size), vocab_size - 1
    sequences = [
        tokens
        for n in range(1, length + 1)
        for tokens in itertools.product(range(vocab_size), repeat=n)
        if eos not in tokens[:-1] and (tokens[-1] == eos or n == length)
    ]
    options = {"beam_width": vocab_size**length, "max_tokens": length, "length_penalty": length_penalty}
    results = run(model, [eos], early_stopping="never", **options)
    ranked = sorted(sequences, key=lambda tokens: -total(model, tokens) / len(tokens) ** length_penalty)
    assert [found.token_ids for found in results] == ranked


@pytest.mark.parametrize("seed", range(8))
def test_one_beam_is_greedy(seed: int) -> None:
    model, tokens = toy(seed), ()
    while len(tokens) < 9 and EOS not in tokens:
        logprobs = model(tokens)
        tokens = (*tokens, logprobs.index(max(logprobs)))
    (found,) = run(model, beam_width=1, max_tokens=9)
    assert found.token_ids == tokens
    assert found.score == pytest.approx(total(model, tokens) / len(tokens))


def scripted(rows: dict[tuple[int, ...], dict[int, float]], vocab_size: int) -> Model:
    """A model that says what is written; -9 for tokens that are not, -8 for token 0 after what is not."""
    return lambda history: [rows.get(history, {0: -8.0}).get(token, -9.0) for token in range(vocab_size)]


A, B, C, D, END = range(5)
LONG_RUN = {(A, C, *[D] * n): {D: -0.001, END: -5.0} for n in range(1, 12)}
STORY = scripted(
    {
        (): {A: -0.4, END: -1.2, B: -3.0},
        (A,): {C: -0.6, END: -0.8},
        (A, C): {END: -0.1, D: -3.0},
        **LONG_RUN,
    },
    5,
)


@pytest.mark.parametrize(
    ("early_stopping", "expected"),
    [
        # Two are finished: enough.
        (True, {(A, END): -1.2 / 2, (END,): -1.2}),
        # A C has -1.0 / 2, better than -1.2, and leads to a third one; A C D has -4 / 3, which is worse than both.
        (False, {(A, C, END): -1.1 / 3, (A, END): -1.2 / 2}),
        # Ten tokens of -4 in all would have -0.4.
        ("never", {(A, C, END): -1.1 / 3, (A, C, *[D] * 8): -4.007 / 10}),
    ],
)
def test_when_the_search_ends(early_stopping: bool | str, expected: dict[tuple[int, ...], float]) -> None:
    results = run(STORY, [END], beam_width=2, max_tokens=10, early_stopping=early_stopping)
    assert {found.token_ids: found.score for found in results} == pytest.approx(expected)


def test_a_negative_length_penalty_never_hopes_for_length() -> None:
    model = scripted(
        {(): {A: -0.4, END: -1.2, B: -3.0}, (A,): {C: -0.6, END: -2.0}, (A, C): {END: -0.1, D: -3.0}}, 5
    )
    options = {"beam_width": 2, "max_tokens": 10, "length_penalty": -1.0, "early_stopping": "never"}
    # A C has -1.0 * 2 when A END is finished with -2.4 * 2; at ten tokens it would have -10.
    found = {found.token_ids: found.score for found in run(model, [END], **options)}
    assert found == pytest.approx({(END,): -1.2, (A, C, END): -3.3})


def test_stop_tokens_do_not_take_the_place_of_beams() -> None:
    row = {0: -3.0, 1: -2.0, 2: -1.0, 3: -0.5, 4: -0.4}
    params = BeamSearchParams(beam_width=2, max_tokens=5, stop_token_ids=[3, 2], early_stopping="never")
    search = BeamSearch(params, [4])
    assert search.candidates_needed == 2 + 3
    assert step(search, scripted({(): row}, 5)) == [Move(0, 1), Move(0, 0)]
    # Only the two best of all continuations are finished, though a third one stops as well.
    assert [(found.token_ids, found.stop_reason) for found in search.results()] == [((4,), None), ((3,), 3)]


def test_groups_without_penalty_are_searches_of_their_own() -> None:
    options = {"max_tokens": 6, "length_penalty": 0.5}
    grouped = run(toy(3), beam_width=6, num_beam_groups=3, **options)
    alone = run(toy(3), beam_width=2, **options)
    for group in range(3):
        of_group = [found for found in grouped if found.group == group]
        assert [(f.token_ids, f.score) for f in of_group] == [(f.token_ids, f.score) for f in alone]


def test_a_penalty_drives_groups_apart_and_stays_in_the_score() -> None:
    model = scripted({(): {0: -0.1, 1: -1.0, 2: -3.0}}, 3)
    options = {"beam_width": 3, "max_tokens": 1, "num_beam_groups": 3}
    results = run(model, (), diversity_penalty=0.5, **options)
    # Token 0 costs the second group 0.5 and the third one 1.0, which leaves it behind 1 there.
    assert [found.token_ids for found in results] == [(0,), (0,), (1,)]
    assert [found.score for found in results] == pytest.approx([-0.1, -0.6, -1.0])
    assert [found.cumulative_logprob for found in results] == pytest.approx([-0.1, -0.1, -1.0])
    results = run(model, (), diversity_penalty=5.0, **options)
    assert [found.token_ids for found in results] == [(0,), (1,), (2,)]


@pytest.mark.parametrize("seed", range(5))
def test_a_high_penalty_gives_every_group_a_token_of_its_own(seed: int) -> None:
    params = BeamSearchParams(beam_width=6, max_tokens=4, num_beam_groups=6, diversity_penalty=50.0)
    search = BeamSearch(params)
    while not search.is_done:
        tokens = [move.token for move in step(search, toy(seed))]
        assert sorted(tokens) == sorted(range(VOCAB)) or search.is_done
    assert len({found.token_ids[-1] for found in search.results()}) == VOCAB


def test_a_search_without_continuations_ends() -> None:
    nothing = [-math.inf] * 3
    search = BeamSearch(BeamSearchParams(beam_width=3, max_tokens=9))
    assert step(search, lambda _: [-1.0, -math.inf, -0.5]) == [Move(0, 2), Move(0, 0)]
    assert step(search, lambda _: [math.nan, *nothing[1:]]) == []
    assert (search.is_done, search.num_beams, search.results()) == (True, 0, [])


def test_the_first_step_is_the_prompts_and_the_last_one_leaves_no_beam() -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=50, num_beam_groups=2, num_return_sequences=3)
    search = BeamSearch(params, max_tokens=3)
    counts = []
    while not search.is_done:
        counts.append(search.num_beams)
        step(search, toy(1))
    assert counts == [1, 4, 4]
    assert search.num_beams == 0
    assert [found.finish_reason for found in search.results()] == ["length"] * 3
    with pytest.raises(AssertionError, match="done"):
        search.advance([])


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("beam_width", {"beam_width": 0}),
        ("beam_width", {"beam_width": 65}),
        ("beam_width", {"beam_width": True}),
        ("beam_width", {"beam_width": 2.0}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": None}),
        ("ignore_eos", {"ignore_eos": 1}),
        ("length_penalty", {"length_penalty": math.nan}),
        ("length_penalty", {"length_penalty": 11}),
        ("length_penalty", {"length_penalty": "1"}),
        ("include_stop_str_in_output", {"include_stop_str_in_output": None}),
        ("stop_token_ids", {"stop_token_ids": [-1]}),
        ("stop_token_ids", {"stop_token_ids": "12"}),
        ("early_stopping", {"early_stopping": "always"}),
        ("early_stopping", {"early_stopping": 1}),
        ("num_return_sequences", {"num_return_sequences": 5}),
        ("num_return_sequences", {"num_return_sequences": 0}),
        ("num_beam_groups", {"num_beam_groups": 3}),
        ("num_beam_groups", {"num_beam_groups": 8}),
        ("diversity_penalty", {"num_beam_groups": 2, "diversity_penalty": -0.1}),
        ("diversity_penalty", {"num_beam_groups": 2, "diversity_penalty": math.inf}),
        ("diversity_penalty", {"diversity_penalty": 0.5}),
    ],
)
def test_refuses_what_makes_no_search(argument: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as error:
        BeamSearchParams(**{"beam_width": 4, "max_tokens": 9} | options)
    assert error.value.argument == argument


def test_parameters_are_stored_checked() -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=9, length_penalty=2, stop_token_ids=iter([7, 3]))
    assert (params.num_return_sequences, params.group_width, params.stop_token_ids) == (4, 4, (7, 3))
    assert isinstance(params.length_penalty, float)
    params.validate_for(vocab_size=8)
    with pytest.raises(InvalidRequestError, match="stop_token_ids=7"):
        params.validate_for(vocab_size=7)
