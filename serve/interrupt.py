"""Ctrl-C that ends what is running between two steps, rather than anywhere inside of one."""

import signal
from types import FrameType, TracebackType
from typing import Self


class CatchInterrupt:
    """While entered, the first Ctrl-C only sets ``caught``; a second one interrupts as ever.

    An exception at an arbitrary place could leave a step half done, so that blocks leak. For the main thread.
    """

    def __init__(self) -> None:
        self.caught = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = True
