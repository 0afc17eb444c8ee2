"""The benchmark's HTTP client: framing cut anywhere, connections kept and lost, failures by kind, and what it costs."""

import asyncio
import dataclasses
import json
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxpaged.serve.bench_serve.address import Address
from jaxpaged.serve.bench_serve.answer import read_answer
from jaxpaged.serve.bench_serve.client import Client, Failure, allow_connections
from jaxpaged.serve.bench_serve.collector import Collector
from jaxpaged.serve.bench_serve.connection import Connection, Exchange, MalformedResponseError
from jaxpaged.serve.bench_serve.dataset import BenchItem
from jaxpaged.serve.bench_serve.load import new_event_loop, run_load
from jaxpaged.serve.bench_serve.options import BenchServeOptions, Endpoint
from jaxpaged.serve.bench_serve.session import request_body
from tests.serve.fake_openai import (
    DEADLINE,
    STREAM_HEAD,
    FakeServer,
    Request,
    Script,
    chunked,
    completion_events,
    event,
    whole,
)
from tests.support.repository import ROOT

EVENTS = completion_events(3, usage={"prompt_tokens": 2, "completion_tokens": 3})
LENGTH = len(b"".join(EVENTS))
SIZED_HEAD = (
    f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {LENGTH}\r\n\r\n".encode()
)
FRAMINGS = {
    "chunks": STREAM_HEAD + b"".join(map(chunked, [*EVENTS, b""])),
    "one chunk": STREAM_HEAD + chunked(b"".join(EVENTS)) + chunked(b""),
    "trailers": STREAM_HEAD + chunked(b"".join(EVENTS)) + b"0\r\nX-Trailer: yes\r\n\r\n",
    "length": SIZED_HEAD + b"".join(EVENTS),
    "100 first": b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED_HEAD + b"".join(EVENTS),
}


def says(*steps: bytes | float | bool) -> Script:
    """A script that says this, whatever is asked."""

    async def script(request: Request) -> AsyncIterator[bytes | float | bool]:
        for step in steps:
            yield step

    return script


def with_client(url: str, use: Callable[[Client, Address], Awaitable[Any]], **more: Any) -> Any:
    """What ``use`` returns, with a client of a server."""

    async def main() -> Any:
        address = Address.parse(url)
        client = Client(address, await address.resolve(), **({"timeout": DEADLINE} | more))
        try:
            return await use(client, address)
        finally:
            client.close()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main())


def ask(url: str, **more: Any) -> tuple[Exchange, Failure | None]:
    """One request to a server."""
    return with_client(url, lambda client, address: client.send(address.post("/v1/x", b"{}", "id")), **more)


def told(exchange: Exchange) -> str:
    answer = read_answer(exchange)
    assert answer.failure is None, answer.failure
    return answer.text


@pytest.mark.parametrize("framing", FRAMINGS)
def test_responses_cut_at_every_byte(framing: str) -> None:
    data = FRAMINGS[framing]
    for cut in range(1, len(data)):
        exchange = Exchange(0.0)
        for part in (data[:cut], data[cut:]):
            exchange.feed(memoryview(part))
        assert exchange.is_complete
        assert exchange.is_reusable
        assert told(exchange) == "t0 t1 t2 "
    byte_by_byte = Exchange(0.0)
    for at in range(len(data)):
        assert not byte_by_byte.is_complete
        byte_by_byte.feed(memoryview(data[at : at + 1]))
    assert told(byte_by_byte) == "t0 t1 t2 "
    assert byte_by_byte.times == sorted(byte_by_byte.times)


def test_a_body_may_last_until_the_connection_ends() -> None:
    head = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    with FakeServer(says(head, *EVENTS, False)) as server:
        exchange, failure = ask(server.url)
    assert failure is None
    assert told(exchange) == "t0 t1 t2 "
    assert not exchange.is_reusable


def test_what_is_no_http_is_refused() -> None:
    with pytest.raises(MalformedResponseError):
        Exchange(0.0).feed(memoryview(b"SSH-2.0-OpenSSH\r\n"))
    with FakeServer(says(b"SSH-2.0-OpenSSH\r\n")) as server:
        _, failure = ask(server.url)
    assert failure is not None
    assert failure.kind == "malformed response"


EARLY_ENDS: dict[str, tuple[Script, str]] = {
    "at once": (says(False), "without a response"),
    "in a header": (says(b"HTTP/1.1 200", False), "in the middle"),
    "between chunks": (says(STREAM_HEAD, chunked(EVENTS[0]), False), "in the middle"),
    "before the length": (says(SIZED_HEAD, EVENTS[0], False), "in the middle"),
}


@pytest.mark.parametrize("name", EARLY_ENDS)
def test_connections_that_end_too_early(name: str) -> None:
    script, message = EARLY_ENDS[name]
    with FakeServer(script) as server:
        exchange, failure = ask(server.url)
    assert failure is not None
    assert failure.kind == "broken connection"
    assert message in failure.message
    assert exchange.ended >= exchange.sent


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def test_refused_connections() -> None:
    _, failure = ask(f"http://127.0.0.1:{free_port()}")
    assert failure == Failure("no connection", "connection refused")


def test_a_response_that_does_not_end_in_time() -> None:
    with FakeServer(says(STREAM_HEAD, chunked(EVENTS[0]), DEADLINE)) as server:
        exchange, failure = ask(server.url, timeout=0.3)
    assert failure is not None
    assert failure.kind == "timeout"
    assert exchange.ended - exchange.sent > 0.29  # a timer may be a tick of its clock early


def test_connections_are_kept_for_the_next_request() -> None:
    async def thrice(client: Client, address: Address) -> list[bytes]:
        return [(await client.send(address.get("/x")))[0].body for _ in range(3)]

    with FakeServer(says(whole(200, b"hello"))) as server:
        assert with_client(server.url, thrice) == [b"hello"] * 3
        assert server.num_connections == 1
    with FakeServer(says(whole(200, b"hello", "text/plain", "Connection: close"), False)) as server:
        assert with_client(server.url, thrice) == [b"hello"] * 3
        assert server.num_connections == 3


def test_a_kept_connection_that_was_closed_is_replaced() -> None:
    async def with_a_pause(client: Client, address: Address) -> list[Failure | None]:
        _, first = await client.send(address.get("/x"))
        kept = client._idle[0]
        async with asyncio.timeout(DEADLINE):
            while kept.is_open:
                await asyncio.sleep(0.001)
        return [first, (await client.send(address.get("/x")))[1]]

    with FakeServer(says(whole(200, b"hello"), False)) as server:
        assert with_client(server.url, with_a_pause) == [None, None]
        assert server.num_connections == 2


def test_a_kept_connection_that_closes_when_it_is_used_is_replaced() -> None:
    count = iter(range(9))

    async def script(request: Request) -> AsyncIterator[bytes | float | bool]:
        # The second request comes over the connection of the first, and over another one once more.
        yield False if next(count) == 1 else whole(200, b"hello")

    async def twice(client: Client, address: Address) -> list[Failure | None]:
        return [(await client.send(address.get("/x")))[1] for _ in range(2)]

    with FakeServer(script) as server:
        assert with_client(server.url, twice) == [None, None]
        assert (server.num_connections, next(count)) == (2, 3)


def test_a_connection_says_nothing_unasked() -> None:
    class Transport:
        aborted = False

        def abort(self) -> None:
            self.aborted = True

    connection, transport = Connection(), Transport()
    connection.connection_made(transport)  # type: ignore[arg-type]
    connection.get_buffer(-1)[:4] = b"HTTP"
    connection.buffer_updated(4)
    assert transport.aborted
    assert not connection.is_idle


def test_what_is_sent() -> None:
    address = Address.parse("http://127.0.0.1:7/base/v1/", "key")
    head, _, body = address.post("/v1/completions", b'{"a": 1}', "name").partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /base/v1/completions HTTP/1.1"
    assert {
        "Host: 127.0.0.1:7",
        "Authorization: Bearer key",
        "Content-Length: 8",
        "X-Request-Id: name",
    } <= set(lines)
    assert body == b'{"a": 1}'
    assert Address.parse("http://h").port == 80
    assert Address.parse("https://h").port == 443
    assert Address.parse("http://[::1]:80/").host == "::1"


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "ftp://h", "http://", "http://h:x", "http://u@h", "http://h/?a=1", "http://h/a b"],
)
def test_urls_that_are_none_are_named(url: str) -> None:
    with pytest.raises(ValueError, match="--base-url"):
        Address.parse(url)


def test_the_fields_of_a_request() -> None:
    def fields(item: BenchItem, **values: Any) -> dict[str, Any]:
        return json.loads(request_body(item, "m", BenchServeOptions(**values)))

    fixed, free = BenchItem([5, 6], 3), BenchItem("hi", None)
    assert fields(fixed) == {
        "model": "m",
        "prompt": [5, 6],
        "max_tokens": 3,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    assert "ignore_eos" not in fields(free)
    assert "ignore_eos" not in fields(fixed, ignore_eos=False)
    assert fields(free, ignore_eos=True)["ignore_eos"] is True
    assert fields(free, endpoint=Endpoint.CHAT)["messages"] == [{"role": "user", "content": "hi"}]
    changed = fields(fixed, extra_body='{"stream_options": null, "temperature": 1, "top_p": 0.5}')
    assert "stream_options" not in changed
    assert (changed["temperature"], changed["top_p"]) == (1, 0.5)


def test_at_most_so_many_are_in_flight_and_waiting_is_told() -> None:
    async def load(client: Client, address: Address) -> tuple[Any, Collector]:
        collector = Collector([None] * 6)
        messages = [address.post("/v1/completions", b"{}", str(at)) for at in range(6)]
        run = await run_load(client, messages, [0.0] * 6, collector.take, max_concurrency=2)
        return run, collector

    with FakeServer(says(STREAM_HEAD, chunked(EVENTS[0]), 0.05, *map(chunked, [*EVENTS[1:], b""]))) as server:
        run, collector = with_client(server.url, load)
        assert server.num_connections == 2
    outcomes = collector.outcomes()
    assert [one.at for one in outcomes] == list(range(6))
    assert outcomes[4].wait >= 0.1  # two rounds of at least 50 ms were before it
    assert all(one.e2el >= 0.05 and one.ttft < one.e2el for one in outcomes)
    assert run.seconds >= 0.15
    assert run.num_unfinished == 0
    assert 0 < run.cpu_seconds < run.seconds


def test_answers_beyond_what_may_be_held_are_read_at_once() -> None:
    async def load(client: Client, address: Address) -> Collector:
        collector = Collector([None] * 4, max_held_bytes=LENGTH)
        await run_load(client, [address.post("/x", b"{}", "a")] * 4, [0.0] * 4, collector.take)
        return collector

    with FakeServer(says(FRAMINGS["chunks"])) as server:
        collector = with_client(server.url, load)
    assert collector.num_read_early == 3
    assert [one.output_len for one in collector.outcomes()] == [3] * 4


def test_cancelling_keeps_what_has_ended() -> None:
    async def script(request: Request) -> AsyncIterator[bytes | float | bool]:
        if request.path == "/v1/slow":
            yield DEADLINE
        yield FRAMINGS["chunks"]

    async def load(client: Client, address: Address) -> tuple[Any, Collector]:
        collector = Collector([None] * 3)
        messages = [address.post(path, b"{}", "a") for path in ("/v1/slow", "/v1/fast", "/v1/fast")]
        task = asyncio.create_task(run_load(client, messages, [0.0, 0.0, DEADLINE], collector.take))
        async with asyncio.timeout(DEADLINE):
            while not collector.num_ended:
                await asyncio.sleep(0.001)
        task.cancel()
        return await task, collector

    with FakeServer(script) as server:
        run, collector = with_client(server.url, load)
    assert run.num_unfinished == 2
    assert [one.at for one in collector.outcomes()] == [1]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A key and a certificate for 127.0.0.1 that it signs itself."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the program openssl, to make a certificate")
    path = tmp_path / "both.pem"
    command = f"{openssl} req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=fake -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [*command.split(), "-keyout", path, "-out", tmp_path / "cert.pem"], check=True, capture_output=True
    )
    path.write_text(path.read_text() + (tmp_path / "cert.pem").read_text())
    return path


def test_tls_is_checked_and_works(certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(FRAMINGS["chunks"])
        await writer.drain()
        writer.close()

    async def main() -> tuple[Failure | None, str]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        address = Address.parse(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        _, refused = await Client(address, ["127.0.0.1"], timeout=DEADLINE).send(address.get("/x"))
        trusting = dataclasses.replace(address, tls=ssl.create_default_context(cafile=str(certificate)))
        client = Client(trusting, ["127.0.0.1"], timeout=DEADLINE)
        exchange, failure = await client.send(address.get("/x"))
        client.close()
        server.close()
        assert failure is None
        return refused, told(exchange)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        refused, text = runner.run(main())
    assert refused is not None
    assert "certificate is not trusted" in refused.message
    assert text == "t0 t1 t2 "


def test_more_open_files_are_allowed_where_the_system_lets_us() -> None:
    program = """
import resource
from jaxpaged.serve.bench_serve.client import allow_connections
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
allow_connections(10)
assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 100
allow_connections(60)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert int(shown) > 100
    allow_connections(1)


@pytest.fixture
def other_process() -> Iterator[str]:
    """The URL of a server in a process of its own, whose streams get a token every 20 ms."""
    command = [sys.executable, "-m", "tests.serve.fake_openai", "--interval", "0.02"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


def test_a_chunk_costs_microseconds(other_process: str) -> None:
    async def load(client: Client, address: Address) -> float:
        collector = Collector([None] * 64)
        options = BenchServeOptions()
        body = request_body(BenchItem([5] * 16, 40), "m", options)
        messages = [address.post("/v1/completions", body, str(at)) for at in range(64)]
        run = await run_load(client, messages, [0.0] * 64, collector.take)
        assert [one.output_len for one in collector.outcomes()] == [40] * 64
        return run.cpu_seconds / collector.num_chunks

    # About 15 us of CPU time on a machine that is not busy, connecting included; the bound leaves room for one that is.
    assert min(with_client(other_process, load) for _ in range(3)) < 60e-6


def test_stream_events_do_not_need_their_own_pieces() -> None:
    data = FRAMINGS["one chunk"]
    exchange = Exchange(0.0)
    exchange.feed(memoryview(data))
    assert len(exchange.pieces) == 1
    assert len(read_answer(exchange).token_times) == 3
    assert event("x") == b"data: x\n\n"
