"""What stands for Ray's objects where there is no cluster."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any


class Parts:
    """Ray's stream of what a replica yields; an exception among them is raised, and None never comes."""

    def __init__(self, *parts: Any) -> None:
        self._parts, self.cancelled = self._play(parts), False

    async def _play(self, parts: tuple[Any, ...]) -> AsyncIterator[Any]:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            if part is None:
                await asyncio.sleep(3600)
            yield part

    def __aiter__(self) -> "Parts":
        return self

    async def __anext__(self) -> Any:
        return await anext(self._parts)

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment whose calls get ``answers`` one after the other; ``calls`` is what they were given."""

    def __init__(self, answers: Iterable[Parts] = (), whole: Iterable[Any] | Exception = ()) -> None:
        self.answers, self.whole = iter(answers), whole
        self.calls: list[dict[str, Any]] = []

    def options(self, **_: Any) -> "Handle":
        return self

    def remote(self, request: Any, **call: Any) -> Parts:
        self.calls.append({"request": request, **call})
        return next(self.answers)

    def broadcast(self, method: str, request: Any) -> "Handle":
        self.calls.append({"request": request, "method": method})
        return self

    async def results_async(self, **_: Any) -> list[Any]:
        if isinstance(self.whole, Exception):
            raise self.whole
        return list(self.whole)
