"""From a request's fields to ``SamplingParams``."""

from typing import Any

from jaxpaged import RequestOutputKind, SamplingParams
from jaxpaged.serve.server.failures import RequestFailure
from jaxpaged.serve.server.options import ServerOptions
from jaxpaged.serve.server.protocol import ChatCompletionRequest, CompletionRequest, SamplingRequest


def refuse_unsupported(body: SamplingRequest, options: ServerOptions) -> None:
    """Raises RequestFailure for a field that asks for what is not there, or not for everybody."""
    if body.priority < 0 and not options.trust_priority:
        raise RequestFailure(
            400, f"priority={body.priority}: must be at least 0 on this server", param="priority"
        )
    for name, harmless in body.REFUSED.items():
        value = getattr(body, name)
        if value not in harmless:
            raise RequestFailure(
                400, f"{name}={value!r:.80}: is not supported", param=name, code="unsupported_parameter"
            )
    if body.stream_options is not None and not body.stream:
        raise RequestFailure(400, "stream_options: only with stream=true", param="stream_options")


def completion_params(body: CompletionRequest) -> SamplingParams:
    """The parameters of a completion."""
    if body.max_tokens == 0 and not body.echo:
        raise RequestFailure(400, "max_tokens=0: must be at least 1 without echo", param="max_tokens")
    if body.stream and body.best_of is not None and body.best_of > body.n:
        raise RequestFailure(400, f"best_of={body.best_of}: cannot be streamed", param="best_of")
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    return _params(
        body,
        best_of=body.best_of,
        # One token that is thrown away: the engine scores a prompt on its way to it.
        max_tokens=max(1, body.max_tokens) if body.max_tokens is not None else None,
        logprobs=body.logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def chat_params(body: ChatCompletionRequest) -> SamplingParams:
    """The parameters of an answer in a chat."""
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestFailure(400, "top_logprobs: only with logprobs=true", param="top_logprobs")
    limits = (body.max_completion_tokens, body.max_tokens)
    return _params(
        body,
        max_tokens=next((limit for limit in limits if limit is not None), None),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def _params(body: SamplingRequest, **own: Any) -> SamplingParams:
    given = {name: getattr(body, name) for name in body.SAMPLING_FIELDS}
    values = {name: value for name, value in (given | own).items() if value is not None}
    values.setdefault("max_tokens", None)
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    return SamplingParams(output_kind=kind, **values)
