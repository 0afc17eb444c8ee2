"""The whole server over a tiny engine, in a thread, with its clients and what it is like inside."""

import asyncio
import contextlib
import copy
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx

from jaxpaged import Engine, SamplingParams
from jaxpaged.chat_template import ChatTemplate
from jaxpaged.serve.async_engine import AsyncEngine
from jaxpaged.serve.engine_thread import MakeEngine
from jaxpaged.serve.server.app import Application, build_app
from jaxpaged.serve.server.options import ServerOptions
from jaxpaged.serve.server.run import Server, listening_socket
from tests.serve.asynchronous import TIMEOUT, wait_until
from tests.serve.served_engines import assert_clean, check, tiny

# Both say who speaks and repeat what was said.
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
MODEL = "tiny"


class LiveServer:
    """A server that listens at ``port``."""

    def __init__(self, application: Application, server: Server, port: int) -> None:
        self.application, self.server, self.port = application, server, port
        self.engine = application.service.engine
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT)

    def post(self, path: str, **fields: Any) -> httpx.Response:
        return self.client.post(path, json=fields)

    def complete(self, prompt: Any = "the cat", **fields: Any) -> dict[str, Any]:
        """The answer to a completion that must succeed."""
        response = self.post("/v1/completions", prompt=prompt, **{"temperature": 0, **fields})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def events(self, path: str, **fields: Any) -> list[Any]:
        """The events of a stream that must end with [DONE], without it, comments left out."""
        with self.client.stream("POST", path, json={"stream": True, **fields}) as response:
            lines = [line for line in response.iter_lines() if line]
            assert response.status_code == 200, lines
        data = [line.removeprefix("data: ") for line in lines if not line.startswith(":")]
        assert data[-1] == "[DONE]"
        return [json.loads(line) for line in data[:-1]]

    def raw(self, payload: bytes) -> socket.socket:
        """A connection on which ``payload`` was sent."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT)
        sock.sendall(payload)
        return sock

    def stats(self) -> Any:
        """The engine's, after a check of its invariants in its thread."""
        return self.engine._thread.call(check).result(TIMEOUT)

    def settle(self) -> None:
        """Waits until nothing is under way; then nothing may be held."""
        wait_until(lambda: self.engine.num_unfinished == 0)
        assert_clean(self.stats())

    def offline(self, prompt: Any, **params: Any) -> Any:
        """What the engine itself answers, asked between two steps."""
        asked = SamplingParams(**{"temperature": 0.0, **params})
        return self.engine._thread.call(lambda engine: engine.generate(prompt, asked)).result(TIMEOUT)


def chatting(**switches: Any) -> Engine:
    """A tiny engine whose tokenizer has a chat template."""
    engine = tiny(**switches)
    assert engine.tokenizer is not None
    engine.tokenizer = copy.copy(engine.tokenizer)  # others use it, too
    engine.tokenizer._chat_template = ChatTemplate(CHAT_TEMPLATE, "a test")
    return engine


@contextlib.contextmanager
def live_server(
    make_engine: MakeEngine | Engine | None = None, *, ready: bool = True, **options: Any
) -> Iterator[LiveServer]:
    """Serves until the block ends; nothing may be held then."""
    settings = ServerOptions(**{"port": 0, **options})
    sock = listening_socket(settings.host, settings.port)
    engine = AsyncEngine(
        chatting() if make_engine is None else make_engine, max_queue_length=settings.max_queue_length
    )
    application = build_app(engine, settings, [MODEL, "alias"])
    server = Server(application, settings)
    thread = threading.Thread(target=lambda: server.run(sockets=[sock]), name="server")
    thread.start()
    live = LiveServer(application, server, sock.getsockname()[1])
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        if ready:
            wait_until(lambda: engine.state.value != "starting")
        yield live
        if engine.state.value == "ready":
            live.settle()
    finally:
        live.client.close()
        server.should_exit = True
        thread.join(TIMEOUT)
        asyncio.run(engine.close())
    assert not thread.is_alive()
