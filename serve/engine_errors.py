"""What a request can meet at the door of an engine that serves, or when the engine ends under it.

* RuntimeError
  + EngineUnavailableError        the engine takes no requests now
    - EngineNotReadyError         it still loads or compiles
    - EngineDrainingError         it finishes what it has and then stops
    - EngineDeadError             it failed and will not come back, or was closed
  + QueueFullError                it has as many requests as it may; try again later
"""


class EngineUnavailableError(RuntimeError):
    """The engine takes no requests now."""


class EngineNotReadyError(EngineUnavailableError):
    """The engine still loads or compiles."""


class EngineDrainingError(EngineUnavailableError):
    """The engine finishes what it has, takes nothing new, and then stops."""


class EngineDeadError(EngineUnavailableError):
    """The engine failed and will not come back, or was closed; ``__cause__`` says why."""


class QueueFullError(RuntimeError):
    """The engine has as many requests as it may have; ``retry_after`` is a guess of when it will not, in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
