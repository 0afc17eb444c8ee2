"""A server for tests of the page: its routes over an engine that steps when told to, and made-up answers."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from jaxpaged import Engine
from jaxpaged.serve.engine_thread import EngineState, StartProgress
from jaxpaged.serve.page.block_feed import BlockFeed
from jaxpaged.serve.page.routes import page_routes

END = object()


class SteppedEngine:
    """As much of an AsyncEngine as the feed uses; the engine behind it steps only in ``step``."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.state = EngineState.READY
        self.progress = StartProgress("ready")
        self._lock = threading.Lock()

    @property
    def num_unfinished(self) -> int:
        return len(self.engine.block_tables())

    def add_listener(self, listener: Any) -> None:
        self.engine.add_listener(listener)

    async def run(self, function: Callable[[Engine], Any]) -> Any:
        with self._lock:
            return function(self.engine)

    def step(self, count: int = 1) -> None:
        with self._lock:
            for _ in range(count):
                self.engine.step()

    def change(self, function: Callable[[Engine], Any]) -> Any:
        with self._lock:
            return function(self.engine)


class PageServer:
    """What the browser sees: the page, its feed, and an API that says what the test puts into it."""

    def __init__(self, engine: Engine) -> None:
        self.stepped = SteppedEngine(engine)
        self.bodies: list[dict[str, Any]] = []  # of requests to the API
        self.keys: list[str | None] = []
        self.num_gone = 0  # streams whose reader went away
        self.refusal: tuple[int, str] | None = None
        self.url = ""
        self._chunks: asyncio.Queue[Any] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        fed: Any = self.stepped
        self.feed = BlockFeed(fed, min_interval=0.02, max_share=1.0)

    def say(self, *chunks: Any) -> None:
        """Sends chunks over the stream that was asked for last; ``END`` ends it."""
        assert self._loop is not None
        for chunk in chunks:
            self._loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(page_routes(self.feed))

        @app.get("/health")
        def health() -> dict[str, Any]:
            return {"status": "ready"}

        @app.get("/v1/models")
        def models() -> dict[str, Any]:
            return {"object": "list", "data": [{"id": "tiny<model>", "object": "model"}]}

        @app.post("/v1/chat/completions")
        @app.post("/v1/completions")
        async def complete(request: Request) -> Response:
            body = await request.json()
            self._chunks = asyncio.Queue()
            self.bodies.append(body)
            self.keys.append(request.headers.get("authorization"))
            if self.refusal is not None:
                status, message = self.refusal
                error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
                return JSONResponse({"error": error}, status)
            return StreamingResponse(self._stream(), media_type="text/event-stream")

        return app

    async def _stream(self) -> AsyncIterator[str]:
        try:
            yield ": keep-alive\n\n"
            while (chunk := await self._chunks.get()) is not END:
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.num_gone += 1
            raise

    @contextmanager
    def running(self) -> Iterator["PageServer"]:
        with listening(self.app()) as (loop, url):
            self._loop, self.url = loop, url
            try:
                yield self
            finally:
                loop.call_soon_threadsafe(self.feed.close)


@contextmanager
def listening(app: Any) -> Iterator[tuple[asyncio.AbstractEventLoop, str]]:
    """An application behind uvicorn in a thread: its event loop and its address."""
    config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1, loop="asyncio")
    server, loop = uvicorn.Server(config), asyncio.new_event_loop()

    def serve() -> None:
        loop.run_until_complete(server.serve())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        yield loop, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def text_chunk(text: str, index: int = 0, finish: str | None = None) -> dict[str, Any]:
    """A chunk of a completion."""
    return {
        "id": "cmpl-1",
        "choices": [{"index": index, "text": text, "logprobs": None, "finish_reason": finish}],
    }


def chat_chunk(text: str, finish: str | None = None) -> dict[str, Any]:
    """A chunk of a chat."""
    return {"id": "chat-1", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


def usage_chunk(prompt: int, sampled: int) -> dict[str, Any]:
    """The chunk with the usage, which comes last."""
    usage = {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}
    return {"id": "cmpl-1", "choices": [], "usage": usage}
