"""Every error that jaxpaged raises on purpose.

* ValueError
  + InvalidRequestError          a request or sampling argument is wrong; nothing has changed
    - PromptTooLongError         the prompt leaves no room within ``max_model_len``
    - RequestTooLargeError       the request could never fit the KV pool, even alone
    - UnknownRequestError        no live request has this id
  + CheckpointError              a model or tokenizer file is missing, truncated or malformed
  + UnsupportedModelError        a well-formed checkpoint needs something that is not implemented
* RuntimeError
  + EngineClosedError            the engine was closed, or stopped after a fatal error
  + RecompileError               a shape that warm-up did not compile, with compiling forbidden

``assert`` is for mistakes of this package itself and appears nowhere in this tree.
"""

import reprlib

from jaxpaged.models.errors import CheckpointError, UnsupportedModelError

__all__ = [
    "CheckpointError",
    "EngineClosedError",
    "InvalidRequestError",
    "PromptTooLongError",
    "RecompileError",
    "RequestTooLargeError",
    "UnknownRequestError",
    "UnsupportedModelError",
]

# A message must stay readable (and a log line short) when the bad value is a megabyte of text.
_MAX_CHARS = 160
_SHORT = reprlib.Repr(maxstring=80, maxother=80, maxlist=8, maxtuple=8, maxdict=8, maxset=8, maxlong=80)


class InvalidRequestError(ValueError):
    """A request or sampling argument is wrong: ``argument`` has ``value``, and ``reason`` says why not.

    ``str()`` reads ``temperature=-1.0: must be at least 0``; long values are shortened.
    The three parts stay available as attributes, so that a server can name the field in its reply.
    """

    def __init__(self, argument: str, value: object, reason: str) -> None:
        super().__init__(argument, value, reason)
        self.argument = argument
        self.value = value
        self.reason = reason

    def __str__(self) -> str:
        value = _SHORT.repr(self.value)
        value = value if len(value) <= _MAX_CHARS else value[:_MAX_CHARS] + "..."
        return f"{self.argument}={value}: {self.reason}"


class PromptTooLongError(InvalidRequestError):
    """The prompt leaves no room for a single new token within ``max_model_len``."""


class RequestTooLargeError(InvalidRequestError):
    """The request needs more KV blocks than the whole pool has, so it could never run."""


class UnknownRequestError(InvalidRequestError):
    """No live request has this id: it never existed, has finished or was aborted."""


class EngineClosedError(RuntimeError):
    """The engine was closed, or stopped after a fatal error; it accepts no further calls."""


class RecompileError(RuntimeError):
    """A step needs a shape that warm-up did not compile while compiling is forbidden."""
