"""Garbage, floods of headers and odd requests: answered, closed, and the server goes on serving others."""

from collections.abc import Iterator

import pytest

from jaxpaged.serve.server.guards.connection_limits import ConnectionLimits
from tests.serve.guard_server import (
    LOOPS,
    GuardServer,
    check_still_serves,
    error_of,
    exchange,
    get,
    post,
    run,
    serving,
    status_of,
    until,
    wire,
)

LIMITS = ConnectionLimits(header_timeout=60.0, max_pipelined=4, linger_timeout=1.0)


@pytest.fixture(scope="module", params=LOOPS)
def server(request: pytest.FixtureRequest) -> Iterator[GuardServer]:
    with serving(limits=LIMITS, loop=request.param) as running:
        yield running


GARBAGE = {
    "text": b"hello, is there anybody?\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    "nul": b"\0" * 4096,
    "nul-in-url": b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n",
    "nul-in-header": b"GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
    "binary": bytes(range(256)) * 16,
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "version": b"GET / HTTP/7.3\r\nHost: a\r\n\r\n",
    "no-colon": b"GET / HTTP/1.1\r\nHost\r\n\r\n",
    "space-before-colon": b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    "folded": b"GET / HTTP/1.1\r\nHost: a\r\n b\r\nX Y: 1\r\n\r\n",
    "bare-cr": b"GET / HTTP/1.1\rHost: a\r\r",
    "raw-utf8-url": "GET /ü HTTP/1.1\r\nHost: a\r\n\r\n".encode(),
    "connect": b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n",
    "absurd-url": b"GET http://[::1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "bad-chunk": b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n0\r\n\r\n",
    "negative-chunk": b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n0\r\n\r\n",
    "huge-chunk": b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"F" * 40
    + b"\r\na",
    "unended-chunk": b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabcdef\r\n",
    "length-negative": b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    "length-text": b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: many\r\n\r\n",
    "length-overflow": b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\n",
    "length-twice": b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "length-and-chunked": (
        b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_answered_with_400(server: GuardServer, name: str) -> None:
    async def test() -> None:
        answer = await exchange(server, GARBAGE[name])
        assert status_of(answer) == 400
        assert error_of(answer)["type"] == "invalid_request_error"
        await check_still_serves(server)

    run(test())


def test_a_body_longer_than_its_length_does_not_disturb_others(server: GuardServer) -> None:
    async def test() -> None:
        answer = await exchange(server, post("/echo", b"12345").replace(b": 5", b": 2"))
        assert status_of(answer) in (200, 400)
        await check_still_serves(server)

    run(test())


TOO_LARGE = {
    "one-header-of-10-MB": (b"GET /fast HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 10_000_000 + b"\r\n\r\n", 431),
    "unfinished-header": (b"GET /fast HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 3_000_000, 431),
    "100000-lines": (b"GET /fast HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 100_000 + b"\r\n", 431),
    "large-lines": (
        b"GET /fast HTTP/1.1\r\nHost: a\r\n" + (b"X: " + b"y" * 4000 + b"\r\n") * 20 + b"\r\n",
        431,
    ),
    "endless-blank-lines": (b"\r\n" * 500_000, 431),
    "url": (b"GET /" + b"a" * 2_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    "unfinished-url": (b"GET /" + b"a" * 2_000_000, 414),
    "query": (b"GET /?" + b"a=b&" * 5000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    "trailers": (
        b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * 1000,
        431,
    ),
    "one-trailer": (
        b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"y" * 3_000_000,
        431,
    ),
    "chunk-extension": (
        b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;a=" + b"y" * 3_000_000,
        431,
    ),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_is_too_large_is_refused(server: GuardServer, name: str) -> None:
    async def test() -> None:
        data, status = TOO_LARGE[name]
        answer = await exchange(server, data)
        assert status_of(answer) == status
        assert error_of(answer)["type"] == "invalid_request_error"
        await check_still_serves(server)

    run(test())


def test_trailers_do_not_become_headers(server: GuardServer) -> None:
    async def test() -> None:
        head = b"POST /echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        answer = await exchange(server, head + b"3\r\nabc\r\n0\r\nAuthorization: Bearer k\r\n\r\n")
        assert answer.endswith(b"\r\n\r\n3")
        names = [name for name, _ in server.toy.scopes[-1]["headers"]]
        assert names == [b"host", b"connection", b"transfer-encoding"]

    run(test())


@pytest.mark.parametrize(
    "protocol", ["h2c", "websocket", "TLS/1.0"], ids=lambda protocol: protocol.replace("/", "")
)
def test_a_wish_to_upgrade_is_served_as_it_is(server: GuardServer, protocol: str) -> None:
    async def test() -> None:
        lines = ["Connection: Upgrade, HTTP2-Settings", f"Upgrade: {protocol}", "HTTP2-Settings: AAMAAABk"]
        lines += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"]
        async with wire(server) as connection:
            # What follows it, here in the same packet, is HTTP as before.
            await connection.send(get("/fast", *lines) + get("/fast", "Connection: close"))
            answer = await connection.read_to_end()
        assert answer.count(b"HTTP/1.1 200 OK") == 2
        assert answer.endswith(b"fine")

    run(test())


def test_pipelined_requests_are_answered_in_order(server: GuardServer) -> None:
    async def test() -> None:
        async with wire(server) as connection:
            await connection.send(post("/echo", b"1") + post("/echo", b"22") + get("/fast"))
            answers = [await connection.read_response() for _ in range(3)]
            assert [answer[-1:] for answer in answers] == [b"1", b"2", b"e"]
            await connection.send(get("/fast"))
            assert status_of(await connection.read_response()) == 200

    run(test())


def test_endless_pipelining_ends_the_connection(server: GuardServer) -> None:
    async def test() -> None:
        before = len(server.toy.ended)
        answer = await exchange(server, get("/wait") + get("/fast") * 1000)
        assert status_of(answer) == 400
        await until(lambda: server.toy.ended[before:] == ["/wait disconnected"])
        await check_still_serves(server)

    run(test())


def test_garbage_behind_a_stream_does_not_get_into_it(server: GuardServer) -> None:
    async def test() -> None:
        before = len(server.toy.ended)
        async with wire(server) as connection:
            await connection.send(get("/drip"))
            await connection.reader.readuntil(b"data: x")
            await connection.send(b"\0\0\0\0")
            rest = await connection.read_to_end()
        assert b"400" not in rest
        await until(lambda: server.toy.ended[before:] == ["/drip disconnected"])

    run(test())


def test_a_body_that_ends_after_its_answer_leaves_the_connection_usable(server: GuardServer) -> None:
    async def test() -> None:
        async with wire(server) as connection:
            await connection.send(post("/fast", b"x" * 1000)[:-900])
            assert status_of(await connection.read_response()) == 200
            await connection.send(b"x" * 900 + get("/fast"))
            assert status_of(await connection.read_response()) == 200

    run(test())
