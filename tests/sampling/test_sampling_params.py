"""Every wrong argument is refused, by name and value."""

import copy
import pickle
from itertools import repeat
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged.errors import InvalidRequestError
from jaxpaged.sampling_params import MAX_STOP_STRINGS, RequestOutputKind, SamplingParams

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", bad) for bad in (-0.1, NAN, INF, "1", None, True, 10**400)],
        *[("top_p", bad) for bad in (0, -1, 1.01, NAN)],
        *[("min_p", bad) for bad in (-0.1, 1.1, NAN)],
        *[("top_k", bad) for bad in (-2, 1.5, "3", True, 2**31)],
        *[("n", bad) for bad in (0, -1, 10**6, None, 1.0)],
        *[("presence_penalty", bad) for bad in (-2.1, 2.1, NAN)],
        *[("frequency_penalty", bad) for bad in (-2.1, 2.1, NAN)],
        *[("repetition_penalty", bad) for bad in (0, -1, INF, NAN)],
        *[("seed", bad) for bad in (2**64, -(2**63) - 1, 1.0)],
        *[("max_tokens", bad) for bad in (0, -1, 2**31)],
        *[("min_tokens", bad) for bad in (-1, 17)],
        *[("logprobs", bad) for bad in (-2, True)],
        *[("prompt_logprobs", bad) for bad in (-2, 0.5)],
        *[
            ("stop", bad)
            for bad in ([""], [1], 5, ["a"] * 65, "a" * 1025, ["a" * 1024] * 9, b"x", repeat("a"))
        ],
        *[("stop_token_ids", bad) for bad in ([-1], ["a"], 5, [1.0], range(129), repeat(1))],
        *[("bad_words", bad) for bad in ([""], [1], ["a"] * 129, "a" * 257)],
        *[("logit_bias", bad) for bad in ({1: 101}, {-1: 0}, {"x": 0}, {1: NAN}, [1], {1: "a"}, {1.5: 0})],
        *[("allowed_token_ids", bad) for bad in ([], [-1], "abc", repeat(1))],
        *[("ignore_eos", bad) for bad in (1, None, "yes")],
        *[("output_kind", bad) for bad in (7, "DELTA", None)],
    ],
)
def test_bad_values_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{name}=") as caught:
        SamplingParams(**{name: value})
    assert caught.value.argument == name
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 400


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (16, 0, None, None)
    assert params.output_kind is RequestOutputKind.CUMULATIVE


def test_values_are_normalised() -> None:
    params = SamplingParams(
        top_k=-1,
        temperature=np.float32(1e-7),
        n=np.int64(2),
        stop="a",
        seed=-1,
        stop_token_ids=iter([3, 3]),
        allowed_token_ids=[4, 2, 4],
        logit_bias={"12": 1},
        bad_words="no",
        output_kind=1,
    )
    assert params.is_greedy
    assert (params.top_k, params.seed, params.n, params.temperature) == (0, None, 2, 0.0)
    assert (params.stop, params.stop_token_ids, params.allowed_token_ids) == (("a",), (3, 3), (2, 4))
    assert (params.logit_bias, params.bad_words) == ({12: 1.0}, ("no",))
    assert params.output_kind is RequestOutputKind.DELTA
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params.clone() == params


@given(st.integers(-(2**63), 2**64 - 1))
def test_every_64_bit_seed_is_taken(seed: int) -> None:
    assert SamplingParams(seed=seed).seed == (None if seed == -1 else seed)


def test_from_dict_names_unknown_keys() -> None:
    assert SamplingParams.from_dict({"n": 2, "stop": ["x"]}) == SamplingParams(n=2, stop="x")
    with pytest.raises(InvalidRequestError, match="use_beam_search=True"):
        SamplingParams.from_dict({"use_beam_search": True})


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidRequestError, match="stop"):
        SamplingParams(stop="a", detokenize=False)
    assert len(SamplingParams(stop=["a"] * MAX_STOP_STRINGS).stop) == MAX_STOP_STRINGS


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"stop_token_ids": [100]}, "stop_token_ids"),
        ({"allowed_token_ids": [1, 100]}, "allowed_token_ids"),
        ({"logit_bias": {100: 1.0}}, "logit_bias"),
        ({"logprobs": 6}, "logprobs"),
        ({"prompt_logprobs": 6}, "prompt_logprobs"),
        ({"min_tokens": 51, "max_tokens": None}, "min_tokens"),
        ({"stop": "a"}, "stop"),
        ({"bad_words": "a"}, "bad_words"),
    ],
)
def test_what_depends_on_the_model(values: dict[str, Any], name: str) -> None:
    params = SamplingParams(**values)
    with pytest.raises(InvalidRequestError, match=f"^{name}="):
        params.validate_for(vocab_size=100, max_logprobs=5, max_model_len=50, has_tokenizer=False)
    params.validate_for(vocab_size=101, max_logprobs=6, max_model_len=51, has_tokenizer=True)


def test_messages_stay_short() -> None:
    assert len(str(InvalidRequestError("prompt", "x" * 10**6, "is too long"))) < 200
    error = pickle.loads(pickle.dumps(InvalidRequestError("a", 1, "is wrong")))
    assert str(error) == "a=1: is wrong"
