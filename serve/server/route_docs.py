"""Which answers the routes declare in the OpenAPI schema, besides the one of success."""

from typing import Any

from jaxpaged.serve.server.responses import ErrorResponse


def _errors(**statuses: str) -> dict[int | str, dict[str, Any]]:
    return {
        int(status.removeprefix("s")): {"model": ErrorResponse, "description": text}
        for status, text in statuses.items()
    }


# What the server before the routes may answer to anything.
COMMON_RESPONSES = _errors(
    s400="Malformed, or asks for what is not there.",
    s401="No API key, or a wrong one.",
    s403="Not under this name or from this origin.",
    s404="There is no such thing.",
    s405="Not with this method.",
    s408="The body did not arrive in time.",
    s413="The body is too large.",
    s414="The URL is too long.",
    s415="The body is not JSON.",
    s431="The headers are too large.",
    s500="A failure inside.",
    s501="A transfer encoding other than chunked.",
    s503="Starting, shutting down or dead; Retry-After says when to ask again.",
)
GENERATION_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or a stream of events that ends with [DONE].",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    **_errors(
        s429="The queue is full; Retry-After says when to ask again.", s504="It took longer than it may."
    ),
}
