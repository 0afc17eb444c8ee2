"""Clients that stop reading, leave, or vanish: the request's task sees it, and others do not feel it."""

import asyncio
import socket
from collections.abc import Iterator

import pytest
import uvicorn
from uvicorn.server import ServerState

from jaxpaged.serve.server.guards.connection import limited_protocol
from jaxpaged.serve.server.guards.connection_limits import ConnectionLimits
from jaxpaged.serve.server.guards.socket_options import set_socket_options
from tests.serve.guard_server import (
    LOOPS,
    GuardServer,
    ToyApp,
    check_still_serves,
    exchange,
    get,
    post,
    run,
    serving,
    status_of,
    until,
    wire,
)

LIMITS = ConnectionLimits(send_timeout=0.5)


@pytest.fixture(scope="module", params=LOOPS)
def server(request: pytest.FixtureRequest) -> Iterator[GuardServer]:
    with serving(limits=LIMITS, loop=request.param) as running:
        yield running


def test_a_reader_that_stops_is_cut_off(server: GuardServer) -> None:
    async def test() -> None:
        before, sent = len(server.toy.ended), server.toy.num_sent
        stalled = server.protocol.open_connections.num_stalled
        async with wire(server, receive_buffer=4096) as connection:
            await connection.send(get("/stream"))
            await until(lambda: server.toy.num_sent > sent)
            assert (await exchange(server, get("/fast", "Connection: close"))).endswith(b"fine")
            await until(lambda: server.toy.ended[before:] == ["/fast complete", "/stream disconnected"])
        # What was taken for a reader that takes nothing: the transport's, the kernel's, and the client's buffers.
        assert (server.toy.num_sent - sent) * 16384 < 1 << 20
        assert server.protocol.open_connections.num_stalled == stalled + 1
        await check_still_serves(server)

    run(test())


def test_a_slow_reader_is_served() -> None:
    async def test() -> None:
        async with wire(server, receive_buffer=4096) as connection:
            await connection.send(get("/stream"))
            for _ in range(50):  # twice the send timeout, or longer
                await connection.reader.readexactly(8192)
                await asyncio.sleep(0.05)
            assert server.toy.ended == []
        await until(lambda: server.toy.ended == ["/stream disconnected"])
        assert server.protocol.open_connections.num_stalled == 0

    with serving(limits=ConnectionLimits(send_timeout=1.25), loop="uvloop") as server:
        run(test())


def test_a_closed_connection_does_not_wait_for_its_reader_forever(server: GuardServer) -> None:
    async def test() -> None:
        before = len(server.toy.ended)
        async with wire(server, receive_buffer=4096) as connection:
            await connection.send(get("/stream"))
            await until(lambda: server.toy.started[-1] == "/stream")
            assert server.num_open == 1
            connection.writer.write_eof()  # to the server, that is a client that has left
            await until(lambda: server.toy.ended[before:] == ["/stream disconnected"])
            await until(lambda: server.num_open == 0)

    run(test())


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("path", ["/wait", "/drip", "/stream"])
def test_a_client_that_leaves_is_noticed(server: GuardServer, path: str, how: str) -> None:
    async def test() -> None:
        before, started = len(server.toy.ended), len(server.toy.started)
        async with wire(server, receive_buffer=4096) as connection:
            await connection.send(get(path))
            await until(lambda: len(server.toy.started) > started)
            if how == "reset":
                connection.reset()
            elif how == "half-close":
                connection.writer.write_eof()
            else:
                connection.writer.close()
            await until(lambda: server.toy.ended[before:] == [f"{path} disconnected"])
        await check_still_serves(server)

    run(test())


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_leaves_with_requests_waiting_is_noticed(server: GuardServer, how: str) -> None:
    async def test() -> None:
        before, started = len(server.toy.ended), len(server.toy.started)
        async with wire(server) as connection:
            await connection.send(get("/wait"))
            await until(lambda: len(server.toy.started) > started)
            await connection.send(post("/echo", b"abc") + get("/fast"))
            if how == "reset":
                connection.reset()
            else:
                connection.writer.close()
            await until(lambda: server.toy.ended[before:] == ["/wait disconnected"])
        await check_still_serves(server)
        assert server.toy.ended[before:] == ["/wait disconnected", "/fast complete"]

    run(test())


def test_a_client_that_leaves_within_its_body_is_noticed(server: GuardServer) -> None:
    async def test() -> None:
        before, started = len(server.toy.ended), len(server.toy.started)
        async with wire(server) as connection:
            await connection.send(post("/echo", b"x" * 1000)[:-1])
            await until(lambda: len(server.toy.started) > started)
        await until(lambda: server.toy.ended[before:] == ["/echo disconnected"])
        await check_still_serves(server)

    run(test())


def test_100_clients_that_leave_within_a_stream_leave_nothing(server: GuardServer) -> None:
    async def leave(number: int) -> None:
        async with wire(server) as connection:
            await connection.send(get("/drip"))
            await asyncio.wait_for(connection.reader.readuntil(b"data: x"), 20)
            if number % 2:
                connection.reset()

    async def test() -> None:
        before = len(server.toy.ended)
        async with asyncio.TaskGroup() as group:
            for number in range(100):
                group.create_task(leave(number))
        await until(lambda: server.toy.ended[before:] == ["/drip disconnected"] * 100)
        await check_still_serves(server)

    run(test())


def test_kept_connections_are_reused(server: GuardServer) -> None:
    async def test() -> None:
        async with wire(server) as connection:
            for _ in range(3):
                await connection.send(post("/echo", b"x" * 100_000))
                answer = await connection.read_response()
                assert status_of(answer) == 200
                assert answer.endswith(b"100000")

    run(test())


class FakeTransport(asyncio.Transport):
    """A transport whose client takes what the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting, self.is_aborted = 0, False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        self.is_aborted = True


@pytest.mark.parametrize(
    ("story", "is_aborted"),
    [
        ([("at", 0.0), ("at", 0.9)], False),
        ([("at", 0.0), ("at", 1.0)], True),
        ([("at", 0.0), ("takes", 1), ("at", 0.9), ("takes", 1), ("at", 1.8), ("at", 2.7)], False),
        ([("at", 0.0), ("takes", 1), ("at", 0.9), ("at", 2.0)], True),
        ([("at", 0.0), ("takes", 99), ("gets", 99), ("at", 0.9), ("at", 1.8)], False),
        ([("at", 0.0), ("takes", 99), ("gets", 99), ("at", 0.9), ("at", 2.0)], True),
    ],
)
def test_only_a_reader_that_takes_nothing_is_cut_off(
    story: list[tuple[str, float]], is_aborted: bool
) -> None:
    async def test() -> None:
        protocol = limited_protocol(ConnectionLimits(send_timeout=1.0))
        config = uvicorn.Config(ToyApp(), http=protocol, ws="none", log_config=None)
        connection, transport = protocol(config, ServerState(), {}), FakeTransport()
        connection.connection_made(transport)
        connection._head_deadline = None
        transport.waiting = 100
        connection.pause_writing()
        for what, value in story:
            if what == "at":
                connection.check(value)
            elif what == "takes":
                transport.waiting -= int(value)
                if transport.waiting < 16:
                    connection.resume_writing()
            else:
                transport.waiting += int(value)
                connection.pause_writing()
        assert transport.is_aborted == is_aborted
        connection.connection_lost(OSError("the end"))

    run(test())


def test_the_kernel_looks_for_peers_that_are_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        limits = ConnectionLimits(
            keepalive_idle=7, keepalive_interval=3, keepalive_probes=2, send_timeout=5.5
        )
        set_socket_options(sock, limits)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        expected = {
            "TCP_KEEPIDLE": 7,
            "TCP_KEEPINTVL": 3,
            "TCP_KEEPCNT": 2,
            "TCP_USER_TIMEOUT": 10500,
            "TCP_NOTSENT_LOWAT": limits.write_buffer_bytes,
        }
        options = {name: getattr(socket, name) for name in expected if hasattr(socket, name)}
        assert {n: sock.getsockopt(socket.IPPROTO_TCP, option) for n, option in options.items()} == {
            name: expected[name] for name in options
        }


def test_the_options_of_tcp_are_left_away_on_other_sockets() -> None:
    class Refusing:
        family = socket.AF_UNIX

        def setsockopt(self, level: int, option: int, value: int | bytes, /) -> None:
            raise AssertionError(option)

    class Gone(Refusing):
        family = socket.AF_INET

        def setsockopt(self, level: int, option: int, value: int | bytes, /) -> None:
            raise OSError("bad file descriptor")

    assert set_socket_options(Refusing(), LIMITS) is None
    assert set_socket_options(Gone(), LIMITS) is None


@pytest.mark.parametrize("loop", LOOPS)
def test_accepted_sockets_have_these_options(loop: str) -> None:
    async def test(server: GuardServer) -> None:
        async with wire(server) as connection:
            await connection.send(get("/fast"))
            await connection.read_response()
            (open_connection,) = server.server.server_state.connections
            accepted = open_connection.transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    with serving(loop=loop) as server:
        run(test(server))
