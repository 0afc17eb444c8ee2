"""What a streamed chunk costs the server, without an engine that computes: CPU time of its event loop.

    python benchmarks/chunk_cost.py --streams 64 --tokens 650

The server runs over an engine that gives every request a token each 6 ms and computes nothing; a client in another
process reads all streams. Two loads with the same requests and different lengths tell apart what a chunk and what a
request costs (the slope, and the rest). Counted is the CPU time of the thread with the event loop
(``time.thread_time``), the kernel's part of each write included.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import uvloop

from jaxpaged import EngineStats, RequestOutput
from jaxpaged.outputs import CompletionOutput, RequestMetrics
from jaxpaged.serve.async_engine import AsyncEngine
from jaxpaged.serve.server.app import build_app
from jaxpaged.serve.server.options import ServerOptions
from jaxpaged.serve.server.run import Server, listening_socket

STEP_SECONDS = 0.006
SHORT = 50  # tokens of the shorter load
PROMPT = [5] * 100


class TokenMill:
    """As much of an ``Engine`` as serving needs: a token for each request and step, out of nothing."""

    tokenizer = None
    config = SimpleNamespace(max_num_seqs=1024, max_model_len=4096, max_logprobs=20)
    model_config = SimpleNamespace(vocab_size=4096)

    def __init__(self) -> None:
        self.live: dict[str, tuple[list[int], RequestMetrics]] = {}

    def add_request(self, request_id: str, prompt: Any, params: Any, **_: Any) -> None:
        self.live[request_id] = [params.max_tokens], RequestMetrics(time.monotonic())

    def abort_request(self, request_id: str) -> None:
        self.live.pop(request_id, None)

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.live)

    def step(self) -> list[RequestOutput]:
        time.sleep(STEP_SECONDS)
        outputs, now = [], time.monotonic()
        for name, (left, metrics) in list(self.live.items()):
            left[0] -= 1
            metrics.last_token_time = now
            reason = None if left[0] else "length"
            if reason:
                del self.live[name]
            new = CompletionOutput(0, " token", [5], finish_reason=reason)
            outputs.append(RequestOutput(name, None, PROMPT, [new], bool(reason), metrics=metrics))
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats()

    def add_listener(self, listener: Any) -> None: ...
    def memory_report(self) -> None: ...
    def measure_attention(self) -> None: ...
    def close(self) -> None: ...


class Reader(asyncio.Protocol):
    """A client that reads one stream to its end and looks at nothing in it."""

    def __init__(self, body: bytes, done: asyncio.Future[None]) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self._request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        self._done = done

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if b"[DONE]" in data and not self._done.done():
            self._done.set_result(None)


async def read_all(port: int, streams: int, tokens: int) -> None:
    """The client: all streams at once."""
    loop = asyncio.get_running_loop()
    fields = {"prompt": PROMPT, "max_tokens": tokens, "stream": True, "temperature": 0}
    ends = [loop.create_future() for _ in range(streams)]
    body = json.dumps(fields).encode()
    pairs = [
        await loop.create_connection(lambda end=end: Reader(body, end), "127.0.0.1", port) for end in ends
    ]  # type: ignore[misc]
    await asyncio.gather(*ends)
    for transport, _ in pairs:
        transport.close()


async def measure(server: Server, port: int, arguments: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds of the loop's thread for the short and the long load, several times."""

    async def load(tokens: int) -> float:
        begun = time.thread_time()
        command = [sys.executable, __file__, "--client", str(port), str(arguments.streams), str(tokens)]
        process = await asyncio.create_subprocess_exec(*command)
        if await process.wait():
            raise subprocess.CalledProcessError(process.returncode or 1, command)
        return time.thread_time() - begun

    serving = asyncio.create_task(server.serve(sockets=[listening_socket("127.0.0.1", port)]))
    while not server.started:
        await asyncio.sleep(0.01)
    await load(SHORT)
    found = [(await load(SHORT), await load(arguments.tokens)) for _ in range(arguments.repeats)]
    server.should_exit = True
    await serving
    return found


def main() -> None:
    """Prints medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=650)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=8765)
    arguments = parser.parse_args()
    options = ServerOptions(port=arguments.port)
    engine = AsyncEngine(lambda _: TokenMill())  # type: ignore[arg-type,return-value]
    server = Server(build_app(engine, options, ["mill"]), options)
    found = uvloop.run(measure(server, arguments.port, arguments))
    asyncio.run(engine.close())
    chunks = arguments.streams * (arguments.tokens - SHORT)
    slopes = [(long - short) / chunks for short, long in found]
    rest = [
        (short / arguments.streams - slope * SHORT) for (short, _), slope in zip(found, slopes, strict=True)
    ]
    middle, low, high = (1e6 * value for value in (statistics.median(slopes), min(slopes), max(slopes)))
    print(f"a chunk:   {middle:6.1f} us  (min {low:.1f}, max {high:.1f})")
    print(f"a request: {1e3 * statistics.median(rest):6.2f} ms, connecting and the client's start included")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        uvloop.run(read_all(*map(int, sys.argv[2:5])))
    else:
        main()
