"""What ``generate`` and ``stream`` take: one prompt or many, one ``SamplingParams`` or one each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxpaged.errors import InvalidRequestError
from jaxpaged.intake import is_one_prompt
from jaxpaged.sampling_params import SamplingParams


def listed_prompts(prompts: Any) -> list[Any]:
    """The prompts as a list. Raises InvalidRequestError when it is neither a prompt nor a sequence."""
    if is_one_prompt(prompts):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise InvalidRequestError("prompts", prompts, "must be a prompt or a sequence of them")
    return list(prompts)


def one_each(params: Any, count: int) -> Sequence[SamplingParams]:
    """The parameters of each prompt. Raises InvalidRequestError when they are not so many."""
    if params is None or isinstance(params, SamplingParams):
        return [SamplingParams() if params is None else params] * count
    if isinstance(params, str | Mapping) or not isinstance(params, Iterable):
        raise InvalidRequestError("sampling_params", params, "must be a SamplingParams or a sequence of them")
    params = list(params)
    if len(params) != count:
        raise InvalidRequestError(
            "sampling_params", len(params), f"must be one, or one for each of {count} prompts"
        )
    for each in params:
        if not isinstance(each, SamplingParams):
            raise InvalidRequestError("sampling_params", each, "must be a SamplingParams")
    return params
