"""What the engine's methods take: one prompt or many, one ``SamplingParams`` or one each, where to branch off."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxpaged.errors import InvalidRequestError
from jaxpaged.generation import Generation
from jaxpaged.intake import is_one_prompt
from jaxpaged.request import Request
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


def branched_off(generation: Generation, index: Any, at: Any, more: Any) -> tuple[Request, list[Any]]:
    """The completion to branch off from, and the tokens of the branch: its first ``at``, None for all, and ``more``.

    Raises InvalidRequestError when there is no such completion or place, or ``more`` is no sequence.
    """
    completions = generation.completions
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(completions):
        raise InvalidRequestError("index", index, f"must be in [0, {len(completions) - 1}]")
    parent = completions[index].request
    at = parent.num_tokens if at is None else at
    if isinstance(at, bool) or not isinstance(at, int) or not 1 <= at <= parent.num_tokens:
        raise InvalidRequestError("at", at, f"must be in [1, {parent.num_tokens}], the tokens there are")
    if isinstance(more, str | bytes) or not isinstance(more, Sequence):
        raise InvalidRequestError("append_token_ids", more, "must be token ids")
    return parent, [*parent.token_ids[:at], *more]
