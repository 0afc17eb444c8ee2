"""From parameters to rows of arrays, and from rules to biases."""

import numpy as np
import pytest

from jaxpaged import sampler
from jaxpaged.errors import InvalidRequestError
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.sampling_rows import (
    SamplingTable,
    bad_word_token_ids,
    bias_rules,
    needs_state,
    output_counts_row,
    prompt_mask_row,
    row_flags,
)
from tests.text.tokenizers_made_here import byte_level

VOCAB = byte_level().vocab_size


def banned(row: np.ndarray | None) -> set[int]:
    assert row is not None
    return set(np.flatnonzero(np.isneginf(row)).tolist())


@pytest.mark.parametrize(
    ("params", "flags", "state"),
    [
        (SamplingParams(temperature=0.0), 0, False),
        (SamplingParams(temperature=0.0, top_p=0.5, top_k=3), 0, False),
        (SamplingParams(), sampler.RANDOM, False),
        (SamplingParams(top_k=3), sampler.RANDOM | sampler.FILTER, False),
        (SamplingParams(min_p=0.1, logprobs=0), sampler.RANDOM | sampler.FILTER | sampler.LOGPROBS, False),
        (SamplingParams(temperature=0.0, logprobs=2), sampler.LOGPROBS | sampler.TOP_LOGPROBS, False),
        (SamplingParams(temperature=0.0, presence_penalty=0.1), sampler.PENALTY, True),
        (SamplingParams(temperature=0.0, min_tokens=2), 0, True),
        (SamplingParams(temperature=0.0, logit_bias={1: 1.0}), 0, True),
    ],
)
def test_flags_and_need_of_state(params: SamplingParams, flags: int, state: bool) -> None:
    assert row_flags(params) == flags
    assert needs_state(params) == state


def test_table_rows() -> None:
    table = SamplingTable(4)
    table.set(2, SamplingParams(temperature=0.5, top_p=0.25, top_k=7, min_p=0.125), -2)
    table.set(3, SamplingParams(temperature=0.0, repetition_penalty=1.5), 1)
    table.set_bias(3, True)
    table.check_invariants()
    batch = table.batch(np.array([3, 2, 0], np.int32), np.array([10, 11, 0], np.int32))
    assert batch.rows.tolist() == [3, 0, 0]
    assert batch.floats[1].tolist() == [0.5, 0.25, 0.125, 1.0, 0.0, 0.0]
    assert batch.ints.tolist() == [[0, 1, 0, 10], [7, -2, -1, 11], [0, 0, 0, 0]]
    assert batch.flags == sampler.RANDOM | sampler.FILTER | sampler.PENALTY | sampler.BIAS
    assert [array.dtype for array in batch] == [np.int32, np.float32, np.int32, np.int32]
    table.set_bias(3, False)
    table.clear(2)
    assert table.batch(np.array([2, 3], np.int32), np.zeros(2, np.int32)).flags == sampler.PENALTY
    for row in (0, 4, -1):
        with pytest.raises(ValueError, match=f"row={row}"):
            table.set(row, SamplingParams(), 0)


def test_no_rules_no_bias() -> None:
    assert bias_rules(SamplingParams(), VOCAB, [1], byte_level()) is None
    assert bias_rules(SamplingParams(min_tokens=3), VOCAB) is None  # nothing to ban


def test_bias_and_allowed_ids() -> None:
    rules = bias_rules(SamplingParams(logit_bias={3: 1.5, 4: -2.0}, allowed_token_ids=[3, 5]), 8)
    assert rules is not None
    row = rules.row([])
    assert row is not None
    assert row.tolist() == [-np.inf, -np.inf, -np.inf, 1.5, -np.inf, 0.0, -np.inf, -np.inf]
    assert rules.key([]) == rules.key([1, 2, 3])


def test_min_tokens_ban_the_ends() -> None:
    rules = bias_rules(SamplingParams(min_tokens=2, stop_token_ids=[6]), 8, [1])
    assert rules is not None
    assert banned(rules.row([4])) == {1, 6}
    assert rules.key([]) == rules.key([4]) != rules.key([4, 4])
    assert rules.key([4, 4]) is None
    assert rules.row([4, 4]) is None


def test_allowed_ids_win_over_min_tokens() -> None:
    rules = bias_rules(SamplingParams(min_tokens=2, allowed_token_ids=[1]), 8, [1])
    assert rules is not None
    assert banned(rules.row([])) == set(range(8)) - {1}


def test_bad_words_of_one_and_several_tokens() -> None:
    tokenizer = byte_level()
    words = bad_word_token_ids(tokenizer, ["the", "zq"])
    assert {tokenizer.decode(word) for word in words} == {"the", " the", "zq", " zq"}
    rules = bias_rules(SamplingParams(bad_words=["the", "zq"]), VOCAB, [], tokenizer)
    assert rules is not None
    z, q = tokenizer.encode("zq", add_special_tokens=False)
    single = {word[0] for word in words if len(word) == 1}
    assert single
    assert banned(rules.row([])) == single
    assert banned(rules.row([5, z])) == single | {q}
    assert banned(rules.row([z, 5])) == single
    assert rules.key([5, z]) != rules.key([z, 5]) == rules.key([])


def test_only_bad_words_allowed() -> None:
    token = bad_word_token_ids(byte_level(), ["the"])[0][0]
    with pytest.raises(InvalidRequestError, match="allowed_token_ids"):
        bias_rules(SamplingParams(bad_words=["the"], allowed_token_ids=[token]), VOCAB, [], byte_level())


def test_rows_of_the_state() -> None:
    assert output_counts_row([1, 3, 1], 5).tolist() == [0, 2, 0, 1, 0]
    assert prompt_mask_row([1, 3, 1], 5).tolist() == [False, True, False, True, False]
    assert output_counts_row([], 3).tolist() == [0, 0, 0]
    assert not prompt_mask_row([], 3).any()
