"""Two outputs of one request that nobody has read yet, as one."""

from jaxpaged import RequestOutput
from jaxpaged.outputs import CompletionOutput


def merge(before: RequestOutput, after: RequestOutput) -> RequestOutput:
    """The output that says what both say, in order; both hold what is new (``RequestOutputKind.DELTA``)."""
    outputs = {completion.index: completion for completion in before.outputs}
    for completion in after.outputs:
        known = outputs.get(completion.index)
        outputs[completion.index] = completion if known is None else _merge_completions(known, completion)
    after.outputs = sorted(outputs.values(), key=lambda completion: completion.index)
    return after


def _merge_completions(before: CompletionOutput, after: CompletionOutput) -> CompletionOutput:
    logprobs = after.logprobs if before.logprobs is None else before.logprobs + (after.logprobs or [])
    return CompletionOutput(
        after.index,
        before.text + after.text,
        before.token_ids + after.token_ids,
        after.cumulative_logprob,
        logprobs,
        after.finish_reason,
        after.stop_reason,
    )
