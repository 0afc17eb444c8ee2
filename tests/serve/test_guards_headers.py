"""Request ids, hosts, origins and error objects: what headers may bring in, and what goes out."""

import json
import re
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxpaged.serve.server.guards.cors import Cors
from jaxpaged.serve.server.guards.errors import (
    MAX_MESSAGE,
    error_body,
    error_json,
    error_response,
    openai_error,
    send_error,
)
from jaxpaged.serve.server.guards.host_check import HostCheck, hosts_to_allow
from jaxpaged.serve.server.guards.request_id import RequestId, new_request_id
from tests.serve.guard_server import ToyApp, call, exchange, get, run, serving, status_of

ORIGIN = "https://app.example"


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError(f"called with {scope['type']}")


@pytest.mark.parametrize("given", ["a", "req-1234", "~!@#$%^&*()_+{}|:<>?", "x" * 128])
def test_a_well_formed_id_is_kept(given: str) -> None:
    async def test() -> None:
        toy = ToyApp()
        _, lines, _ = await call(RequestId(toy), headers=[("X-Request-Id", given)])
        assert lines["x-request-id"] == given
        assert toy.scopes[-1]["state"]["request_id"] == given

    run(test())


@pytest.mark.parametrize(
    "given",
    [
        [],
        [""],
        ["a b"],
        ["x" * 129],
        ["a\r\nSet-Cookie: x=y"],
        ["a\nb"],
        ["a\0b"],
        ["a\x7f"],
        ["\u00fc"],
        ["a", "b"],
    ],
    ids=range(10),
)
def test_another_one_is_replaced(given: list[str]) -> None:
    async def test() -> None:
        toy = ToyApp()
        _, lines, _ = await call(RequestId(toy), headers=[("X-Request-Id", value) for value in given])
        assert re.fullmatch(r"req-[0-9a-f]{32}", lines["x-request-id"])
        assert toy.scopes[-1]["state"]["request_id"] == lines["x-request-id"]

    run(test())


@pytest.mark.parametrize(
    ("value", "status"),
    [(b"a\rSet-Cookie: x=y", 400), (b"a\r\nSet-Cookie: x=y", 200), (b"a\nSet-Cookie: x=y", 400)],
)
def test_no_header_comes_back_that_the_id_brought(value: bytes, status: int) -> None:
    async def test() -> None:
        with serving(RequestId) as server:
            request = get("/fast", "Connection: close").replace(
                b"\r\n\r\n", b"\r\nX-Request-Id: " + value + b"\r\n\r\n"
            )
            answer = await exchange(server, request)
            assert status_of(answer) == status
            assert b"set-cookie" not in answer.lower()

    run(test())


def test_ids_are_never_the_same() -> None:
    assert len({new_request_id() for _ in range(1000)}) == 1000


def test_an_id_that_the_application_sets_stands() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Request-Id", b"its own")]})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def test() -> None:
        assert (await call(RequestId(app)))[1] == {"X-Request-Id": "its own"}

    run(test())


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "localhost.",
        "127.0.0.1",
        "127.0.0.1:80",
        "127.9.9.9",
        "[::1]",
        "[::1]:8000",
        "box.example",
        "Box.Example:99",
        "a.cluster.example",
        "a.b.cluster.example:1",
    ],
)
def test_hosts_of_this_machine_and_allowed_ones_are_served(host: str) -> None:
    async def test() -> None:
        app = HostCheck(ToyApp(), ["box.example", "*.cluster.example"])
        assert (await call(app, headers=[("host", host)]))[0] == 200

    run(test())


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "evil.example:80",
        "192.168.1.4",
        "0.0.0.0",
        "[2001:db8::1]",
        "",
        ":80",
        "localhost:",
        "localhost:abc",
        "localhost:80:90",
        "evil@localhost",
        "localhost/x",
        "[::1",
        "::1",
        "cluster.example",
        "xcluster.example",
        "127.0.0.1.evil.example",
        "l\xf6calhost",
        "localhost evil",
    ],
)
def test_other_hosts_are_refused(host: str) -> None:
    async def test() -> None:
        app = HostCheck(nothing, ["*.cluster.example"])
        status, _, body = await call(app, headers=[("host", host)])
        assert status == 403
        assert json.loads(body)["error"]["type"] == "permission_error"

    run(test())


@pytest.mark.parametrize("hosts", [[], ["localhost", "localhost"], ["localhost", "evil.example"]])
def test_there_is_one_host(hosts: list[str]) -> None:
    async def test() -> None:
        headers = [("host", host) for host in hosts]
        assert (await call(HostCheck(nothing), headers=headers))[0] == 403

    run(test())


@pytest.mark.parametrize("allowed", ["", "a b", "http://a", "*", "a:b", "*.", "a.*"])
def test_an_allowed_host_that_is_none_is_an_error(allowed: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"allowed_host={allowed!r} is no host name")):
        HostCheck(nothing, [allowed])


@pytest.mark.parametrize(
    ("bind", "allowed", "expected"),
    [
        ("127.0.0.1", (), ()),
        ("localhost", (), ()),
        ("::1", ("a",), ("a",)),
        ("127.0.0.1", ("*",), None),
        ("0.0.0.0", (), None),
        ("::", (), None),
        ("box.example", (), None),
        (None, (), None),
        ("0.0.0.0", ("a",), ("a",)),
        ("0.0.0.0", ("a", "*"), None),
    ],
)
def test_hosts_are_checked_where_it_is_known_what_they_may_be(
    bind: str | None, allowed: tuple[str, ...], expected: tuple[str, ...] | None
) -> None:
    assert hosts_to_allow(bind, allowed) == expected


async def preflight(
    app: ASGIApp, origin: str, headers: str = "authorization"
) -> tuple[int, dict[str, str], bytes]:
    lines = [("origin", origin), ("access-control-request-method", "POST")]
    return await call(app, "OPTIONS", headers=[*lines, ("access-control-request-headers", headers)])


def test_a_preflight_of_an_allowed_origin_is_answered() -> None:
    async def test() -> None:
        asked = "authorization, content-type,x-stainless-os"
        status, lines, body = await preflight(Cors(nothing, [ORIGIN]), ORIGIN, asked)
        assert (status, body) == (204, b"")
        assert lines["access-control-allow-origin"] == ORIGIN
        assert lines["access-control-allow-headers"] == asked
        assert "POST" in lines["access-control-allow-methods"]
        assert lines["vary"] == "Origin"
        assert "access-control-allow-credentials" not in lines

    run(test())


@pytest.mark.parametrize("asked", ["a\r\nSet-Cookie: x=y", "a b", "ü", "", "x" * 5000, "a,,b"])
def test_no_header_is_allowed_that_is_no_name(asked: str) -> None:
    async def test() -> None:
        status, lines, _ = await preflight(Cors(nothing, ["*"]), ORIGIN, asked)
        assert status == 204
        assert "access-control-allow-headers" not in lines

    run(test())


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://app.example", f"{ORIGIN}:81", "null", "*", ""]
)
def test_other_origins_get_nothing(origin: str) -> None:
    async def test() -> None:
        app = Cors(ToyApp(), [ORIGIN])
        status, lines, _ = await preflight(app, origin)
        assert status == 403
        assert not any(name.startswith("access-control") for name in lines)
        status, lines, _ = await call(app, headers=[("origin", origin)])
        assert status == 200
        assert lines["vary"] == "Origin"
        assert not any(name.startswith("access-control") for name in lines)

    run(test())


@pytest.mark.parametrize(
    ("allowed", "answered"), [(ORIGIN, ORIGIN), ("HTTPS://App.Example", ORIGIN), ("*", "*")]
)
def test_a_response_says_who_may_read_it(allowed: str, answered: str) -> None:
    async def test() -> None:
        app = Cors(ToyApp(), [allowed])
        _, lines, body = await call(app, headers=[("origin", ORIGIN)])
        assert lines["access-control-allow-origin"] == answered
        assert lines["access-control-expose-headers"] == "X-Request-Id, Retry-After"
        assert body == b"fine"
        _, lines, _ = await call(app)
        assert "access-control-allow-origin" not in lines
        assert (await call(app, "OPTIONS", headers=[("origin", ORIGIN)]))[0] == 200

    run(test())


@pytest.mark.parametrize(
    "origin", ["", "app.example", "https://app.example/", "https://a b", "https://", "https://*.a"]
)
def test_an_origin_that_is_none_is_an_error(origin: str) -> None:
    with pytest.raises(ValueError, match="allowed_origin="):
        Cors(nothing, [origin])


@pytest.mark.parametrize(
    "guard", [RequestId, HostCheck, lambda app: Cors(app, ["*"])], ids=["request-id", "host-check", "cors"]
)
def test_the_lifespan_passes(guard: Callable[[ASGIApp], Callable[..., Awaitable[None]]]) -> None:
    async def test() -> None:
        with pytest.raises(AssertionError, match="called with lifespan"):
            await guard(nothing)({"type": "lifespan"}, None, None)

    run(test())


def test_a_websocket_for_another_host_is_closed() -> None:
    async def test() -> None:
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            sent.append(message)

        await HostCheck(nothing)({"type": "websocket", "headers": [(b"host", b"evil")]}, receive, send)
        assert sent == [{"type": "websocket.close", "code": 1008}]

    run(test())


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (408, "timeout_error"),
        (413, "invalid_request_error"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (501, "server_error"),
        (503, "service_unavailable_error"),
    ],
)
def test_the_type_goes_with_the_status(status: int, kind: str) -> None:
    expected = {"message": "no", "type": kind, "param": "n", "code": "c"}
    assert openai_error(status, "no", param="n", code="c") == {"error": expected}
    assert openai_error(status, "no", type="mine")["error"]["type"] == "mine"


def test_an_error_has_all_four_fields() -> None:
    assert error_body("no") == {
        "error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}
    }


@pytest.mark.parametrize(
    "message", ["a\0b\r\n\t\x1b[31m\x7f", "\ud800 lone", "ü 漢字 😀", '"quoted\\"', "\u2028"]
)
def test_every_character_arrives(message: str) -> None:
    body = error_json(400, message)
    assert all(0x20 <= octet < 0x7F for octet in body)
    assert json.loads(body)["error"]["message"] == message


def test_messages_are_bounded() -> None:
    error = error_body("x" * 10_000_000, param="y" * 10_000)["error"]
    assert error["message"] == "x" * MAX_MESSAGE + f"... ({10_000_000 - MAX_MESSAGE} more characters)"
    assert len(error["param"]) == 200


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("got 'Bearer abc.def' there", "got 'Bearer [redacted]' there"),
        ("authorization: bearer  xyz", "authorization: bearer  [redacted]"),
        ("the key sk-proj-0123456789_ab is wrong", "the key [redacted] is wrong"),
        ("sk-short and task-0123456789 stay", "sk-short and task-0123456789 stay"),
    ],
)
def test_keys_are_not_repeated(message: str, shown: str) -> None:
    assert error_body(message)["error"]["message"] == shown


def test_an_error_is_sent() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send_error(send, 429, "later", headers=[(b"retry-after", b"3")], close=True)

    async def test() -> None:
        status, lines, body = await call(app)
        assert (status, json.loads(body)) == (429, openai_error(429, "later"))
        assert lines == {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "retry-after": "3",
            "connection": "close",
        }

    run(test())


def test_a_whole_response_is_one() -> None:
    head, _, body = error_response(431, "too much", [(b"a", b"b")]).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert b"\r\na: b\r\n" in head
    assert b"content-length: %d" % len(body) in head
    assert json.loads(body) == openai_error(431, "too much")
