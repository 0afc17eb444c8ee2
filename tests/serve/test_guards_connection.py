"""Headers that do not come, and too many connections: nobody holds the server for nothing."""

import asyncio
import contextlib
import time
from collections.abc import Iterator

import pytest

from jaxpaged.serve.server.guards.connection_limits import ConnectionLimits
from jaxpaged.serve.server.guards.open_connections import OpenConnections, client_of
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

# Long enough for a client on a busy machine to send its request in.
HASTY = ConnectionLimits(header_timeout=0.5, linger_timeout=0.3)


@pytest.fixture(scope="module")
def hasty() -> Iterator[GuardServer]:
    with serving(limits=HASTY, loop="uvloop") as running:
        yield running


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 0),
        (b"GET /fast HT", 408),
        (b"GET /fast HTTP/1.1\r\nHost: loc", 408),
        (b"\r\n", 0),
    ],
    ids=["nothing", "request-line", "header", "blank-line"],
)
def test_headers_that_do_not_come_are_not_waited_for(hasty: GuardServer, data: bytes, status: int) -> None:
    async def test() -> None:
        start = time.monotonic()
        async with wire(hasty) as connection:
            await connection.send(data)
            answer = await connection.read_to_end()
        assert status_of(answer) == status
        assert time.monotonic() - start >= 0.4
        await check_still_serves(hasty)

    run(test())


def test_headers_in_single_bytes_are_not_waited_for(hasty: GuardServer) -> None:
    async def test() -> None:
        async with wire(hasty) as connection:
            reading = asyncio.ensure_future(connection.read_to_end())
            for byte in b"GET /fast HTTP/1.1\r\nX: " + b"a" * 10_000:
                if reading.done():
                    break
                await connection.send(bytes([byte]))
                await asyncio.sleep(0.01)
            assert status_of(await reading) == 408

    run(test())


@pytest.mark.parametrize("data", [b"GET /f", b"\r\n"], ids=["partial", "blank-line"])
def test_a_further_request_has_the_same_time(hasty: GuardServer, data: bytes) -> None:
    async def test() -> None:
        async with wire(hasty) as connection:
            await connection.send(get("/fast"))
            assert status_of(await connection.read_response()) == 200
            await connection.send(data)
            assert status_of(await connection.read_to_end()) == (408 if data.strip() else 0)

    run(test())


def test_a_long_request_is_no_late_header(hasty: GuardServer) -> None:
    async def test() -> None:
        before = len(hasty.toy.ended)
        async with wire(hasty) as connection:
            await connection.send(get("/wait"))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(connection.reader.read(1), 1.0)
            assert len(hasty.toy.ended) == before
        await until(lambda: hasty.toy.ended[before:] == ["/wait disconnected"])

    run(test())


def test_the_rest_of_a_body_that_was_answered_is_not_taken_forever(hasty: GuardServer) -> None:
    async def test() -> None:
        async with wire(hasty) as connection:
            await connection.send(post("/fast", b"x" * 1000)[:-900])
            assert status_of(await connection.read_response()) == 200
            reading = asyncio.ensure_future(connection.read_to_end())
            for _ in range(800):
                if reading.done():
                    break
                await connection.send(b"x")
                await asyncio.sleep(0.01)
            assert await reading == b""

    run(test())


def test_after_the_rest_of_an_answered_body_the_connection_may_be_idle(hasty: GuardServer) -> None:
    async def test() -> None:
        async with wire(hasty) as connection:
            await connection.send(post("/fast", b"x" * 1000)[:-900])
            assert status_of(await connection.read_response()) == 200
            await connection.send(b"x" * 900)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(connection.reader.read(1), 1.0)
            await connection.send(get("/fast"))
            assert status_of(await connection.read_response()) == 200

    run(test())


@pytest.mark.parametrize("loop", LOOPS)
def test_200_idle_connections_do_not_keep_others_out(loop: str) -> None:
    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(200):
                await stack.enter_async_context(wire(server))
            await until(lambda: server.num_open == 200)
            answer = await exchange(server, get("/fast", "Connection: close"))
            assert answer.endswith(b"fine")
        await check_still_serves(server)

    with serving(loop=loop) as server:
        run(test())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "limits",
    [ConnectionLimits(max_connections=3), ConnectionLimits(max_connections_per_client=3)],
    ids=["all", "client"],
)
def test_a_connection_too_many_is_told_to_come_back(loop: str, limits: ConnectionLimits) -> None:
    async def test(server: GuardServer) -> None:
        async with wire(server) as first, wire(server), wire(server):
            await until(lambda: server.num_open == 3)
            answer = await exchange(server, get("/fast"))
            assert status_of(answer) == 503
            assert b"\r\nretry-after: 1\r\n" in answer
            assert error_of(answer)["type"] == "service_unavailable_error"
            await first.send(get("/fast", "Connection: close"))
            assert (await first.read_to_end()).endswith(b"fine")
            await until(lambda: server.num_open == 2)
            await check_serves_once(server)

    async def check_serves_once(server: GuardServer) -> None:
        assert status_of(await exchange(server, get("/fast", "Connection: close"))) == 200

    with serving(limits=limits, loop=loop) as server:
        run(test(server))
        assert server.protocol.open_connections.num_refused == 1


@pytest.mark.parametrize("loop", LOOPS)
def test_a_flood_of_connections_is_cut_off(loop: str) -> None:
    async def test(server: GuardServer) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(exchange(server, b"")) for _ in range(150)]
        answers = [status_of(task.result()) for task in tasks]
        assert set(answers) <= {0, 503}
        assert 503 in answers
        await check_still_serves(server)

    limits = ConnectionLimits(max_connections=4, header_timeout=1.0, linger_timeout=1.0)
    with serving(limits=limits, loop=loop) as server:
        run(test(server))


def test_clients_are_told_apart_by_what_one_host_has() -> None:
    assert client_of("192.0.2.7") == "192.0.2.7"
    assert client_of("::ffff:192.0.2.7") == "192.0.2.7"
    assert client_of("2001:db8:1:2:3::4") == client_of("2001:db8:1:2::9") == "2001:db8:1:2::"
    assert client_of("2001:db8:1:3::9") != client_of("2001:db8:1:2::9")
    assert client_of("fe80::1%eth0") == "fe80::"
    assert client_of("unknown") == "unknown"
    assert client_of(None) is None


class Still:
    def check(self, now: float) -> None:
        raise AssertionError("not looked at")


def test_connections_are_counted_by_client() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        table = OpenConnections(ConnectionLimits(max_connections=3, max_connections_per_client=1))
        first, second, third, fourth = Still(), Still(), Still(), Still()
        assert table.add(first, "192.0.2.1", loop) is None
        assert "from this address" in (table.add(second, "192.0.2.1", loop) or "")
        table.remove(first)
        assert table.add(third, "192.0.2.2", loop) is None
        assert table.add(first, None, loop) is None
        assert "too many connections" in (table.add(fourth, None, loop) or "")
        table.check_invariants()
        for connection in (first, second, third, fourth):
            table.remove(connection)
        table.check_invariants()
        assert len(table) == 0

    run(test())


@pytest.mark.parametrize("name", ["header_timeout", "max_connections", "write_buffer_bytes"])
def test_bounds_are_above_zero(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 has to be above zero"):
        ConnectionLimits(**{name: 0})
