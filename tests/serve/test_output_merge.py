"""Outputs that nobody has read become one that says the same."""

from hypothesis import given
from hypothesis import strategies as st

from jaxpaged import CompletionOutput, Logprob, RequestOutput
from jaxpaged.serve.output_merge import merge


def delta(index: int, first: int, end: int, whole: int, has_logprobs: bool) -> CompletionOutput:
    """Tokens ``first .. end - 1`` of completion ``index``, which has ``whole`` of them."""
    tokens = list(range(first, end))
    return CompletionOutput(
        index,
        "".join(f"<{index}.{token}>" for token in tokens),
        tokens,
        -float(end) if has_logprobs else None,
        [{token: Logprob(-1.0, 1)} for token in tokens] if has_logprobs else None,
        "length" if end == whole else None,
        f"stop {index}" if end == whole else None,
    )


def output_of(completions: list[CompletionOutput], finished: bool) -> RequestOutput:
    return RequestOutput("name", "prompt", [1, 2], completions, finished, num_cached_tokens=1)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    steps=st.lists(st.dictionaries(st.integers(0, 2), st.integers(1, 3)), max_size=6),
    order=st.lists(st.integers(0, 6), min_size=6, max_size=6),
    has_logprobs=st.booleans(),
)
def test_however_they_are_merged_nothing_is_lost(
    lengths: list[int], steps: list[dict[int, int]], order: list[int], has_logprobs: bool
) -> None:
    """``steps`` say how many tokens each brings of which completion; one more brings the rest."""
    shown, outputs = [0] * len(lengths), []
    for step in [*steps, dict.fromkeys(range(3), 6)]:
        pieces = []
        for index, whole in enumerate(lengths):
            first, shown[index] = shown[index], min(whole, shown[index] + step.get(index, 0))
            if first < shown[index]:
                pieces.append(delta(index, first, shown[index], whole, has_logprobs))
        if pieces:
            outputs.append(output_of(pieces, shown == lengths))
    for place in order:
        if len(outputs) > 1:
            at = place % (len(outputs) - 1)
            outputs[at : at + 2] = [merge(outputs[at], outputs[at + 1])]
    wanted = [delta(index, 0, whole, whole, has_logprobs) for index, whole in enumerate(lengths)]
    assert outputs == [output_of(wanted, finished=True)]


def test_text_that_comes_after_the_tokens_is_kept_in_order() -> None:
    """A piece of text may wait for the next token, and the last one may bring text alone."""
    first = CompletionOutput(0, "ab", [1])
    then = CompletionOutput(0, "", [2])
    last = CompletionOutput(0, "cd", [], finish_reason="stop", stop_reason=7)
    merged = merge(merge(output_of([first], False), output_of([then], False)), output_of([last], True))
    assert merged.outputs == [CompletionOutput(0, "abcd", [1, 2], finish_reason="stop", stop_reason=7)]
    assert merged.finished


def test_a_completion_that_has_ended_keeps_its_end() -> None:
    ended = output_of([CompletionOutput(1, "x", [3], finish_reason="stop")], False)
    other = output_of([CompletionOutput(0, "y", [4])], False)
    merged = merge(ended, other)
    assert [completion.finish_reason for completion in merged.outputs] == [None, "stop"]
    assert not merged.finished
