"""What ``generate``, ``beam_search`` and ``stream`` take: one prompt or many, parameters for all or one each."""

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


def sampling_params_each(params: Any, count: int) -> Sequence[SamplingParams]:
    """``SamplingParams`` for each prompt, the defaults for None. Raises InvalidRequestError."""
    return one_each("sampling_params", SamplingParams() if params is None else params, count, SamplingParams)


def one_each[P](name: str, params: Any, count: int, kind: type[P]) -> Sequence[P]:
    """The parameters of each prompt, given as argument ``name``: one for all of them or one each.

    Raises InvalidRequestError when they are of another kind, or not so many.
    """
    if isinstance(params, kind):
        return [params] * count
    if isinstance(params, str | Mapping) or not isinstance(params, Iterable):
        raise InvalidRequestError(name, params, f"must be a {kind.__name__} or a sequence of them")
    params = list(params)
    if len(params) != count:
        raise InvalidRequestError(name, len(params), f"must be one, or one for each of {count} prompts")
    for each in params:
        if not isinstance(each, kind):
            raise InvalidRequestError(name, each, f"must be a {kind.__name__}")
    return params
