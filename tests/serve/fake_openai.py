"""An OpenAI-compatible server that does what a test says, byte for byte; in a thread, or in a process of its own."""

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

DEADLINE = 20.0
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: fake\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


@dataclass
class Request:
    """What a client sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any] = field(default_factory=dict)


# Yields the bytes to write, each on its own; a float is a pause in seconds. Ends with False to close the connection.
Script = Callable[[Request], AsyncIterator[bytes | float | bool]]


def event(value: object) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"data: {text}\n\n".encode()


def chunked(data: bytes) -> bytes:
    """One chunk of the chunked transfer encoding."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def whole(status: int, body: object, kind: str = "application/json", *headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Type: {kind}", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + data


def completion_events(
    num_tokens: int, *, chat: bool = False, usage: dict[str, int] | None = None
) -> list[bytes]:
    """The events of an answer of so many chunks, and one for the usage."""
    found: list[object] = []
    if chat:
        found.append({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    for at in range(num_tokens):
        finish = "length" if at == num_tokens - 1 else None
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        choice |= {"delta": {"content": f"t{at} "}} if chat else {"text": f"t{at} "}
        found.append({"id": "x", "choices": [choice]})
    if usage is not None:
        found.append({"choices": [], "usage": usage})
    return [event(value) for value in [*found, "[DONE]"]]


async def well_behaved(request: Request) -> AsyncIterator[bytes | float | bool]:
    """Answers as many tokens as were asked for, and counts a prompt's words or ids."""
    if request.path == "/v1/models":
        yield whole(200, {"object": "list", "data": [{"id": "fake-model"}]})
    elif request.method == "GET":
        yield whole(404, {"detail": "Not Found"})
    else:
        chat = request.path.endswith("chat/completions")
        prompt = request.body["messages"][0]["content"] if chat else request.body["prompt"]
        num_prompt = len(prompt.split() if isinstance(prompt, str) else prompt)
        num = request.body["max_tokens"]
        yield STREAM_HEAD
        for data in completion_events(
            num, chat=chat, usage={"prompt_tokens": num_prompt, "completion_tokens": num}
        ):
            yield chunked(data)
        yield chunked(b"")


class FakeServer:
    """Serves a script until the ``with`` ends; ``requests`` are those to generate, in their order of arrival."""

    def __init__(self, script: Script = well_behaved, port: int = 0) -> None:
        self.requests: list[Request] = []
        self.num_connections = 0
        self.url = ""
        self._script, self._port = script, port
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(DEADLINE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", self._port, backlog=2048)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._started.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.num_connections += 1
        try:
            while (request := await read_request(reader)) is not None:
                if request.method == "POST":
                    self.requests.append(request)
                if not await play(self._script(request), writer.write, writer.drain):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort() if writer.transport.is_closing() else writer.close()


async def play(
    script: AsyncIterator[bytes | float | bool],
    write: Callable[[bytes], None],
    drain: Callable[[], Awaitable[None]],
) -> bool:
    """Writes what a script yields; False when it wants the connection closed."""
    async for step in script:
        if step is False:
            return False
        if isinstance(step, bytes):
            write(step)
            await drain()
        await asyncio.sleep(step if isinstance(step, float) else 0)
    return True


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """The next request of a connection; None when there is none."""
    head = await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b""
    if not head:
        return None
    first, *lines = head.decode().rstrip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    method, path, _ = first.split(" ")
    return Request(method, path, headers, json.loads(body) if body else {})


def paced(interval: float) -> Script:
    """Like ``well_behaved``, with a token at every multiple of ``interval`` seconds: to all streams, as an engine."""

    async def script(request: Request) -> AsyncIterator[bytes | float | bool]:
        async for step in well_behaved(request):
            if request.method == "POST":
                yield interval - time.monotonic() % interval
            yield step

    return script


def main() -> None:
    """Serves until standard input ends; the first line of output is the URL."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--interval", type=float, default=0.02)
    with FakeServer(paced(parser.parse_args().interval)) as server:
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
