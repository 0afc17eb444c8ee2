"""Who has no key gets nothing but what is public, and learns nothing about the keys."""

import hmac
from pathlib import Path

import pytest
from starlette.types import Message

from jaxpaged.serve.server.guards.api_key import ApiKey, read_api_keys
from tests.serve.guard_server import ToyApp, call, run

KEYS = ["first-key", "schlüssel-ключ", "käse"]
PREFLIGHT = [("origin", "https://a.example"), ("access-control-request-method", "POST")]


def bearer(key: str | bytes) -> list[tuple[str, str | bytes]]:
    return [("authorization", b"Bearer " + (key if isinstance(key, bytes) else key.encode()))]


async def status(app: ApiKey, method: str = "GET", path: str = "/v1/models", **scope: object) -> int:
    return (await call(app, method, path, **scope))[0]


@pytest.mark.parametrize(
    "value",
    [
        b"Bearer first-key",
        b"bearer first-key",
        b"BEARER   first-key ",
        "Bearer schlüssel-ключ".encode(),
        "Bearer käse".encode(),
        "Bearer käse".encode("latin-1"),
    ],
)
def test_a_key_opens(value: bytes) -> None:
    async def test() -> None:
        assert await status(ApiKey(ToyApp(), KEYS), headers=[("authorization", value)]) == 200

    run(test())


@pytest.mark.parametrize(
    "headers",
    [
        [],
        bearer(""),
        bearer("first-ke"),
        bearer("first-key2"),
        bearer("FIRST-KEY"),
        bearer("x" * 100_000),
        bearer(b"\xff\xfe\x00"),
        bearer("första-ключ"),
        [("authorization", "first-key")],
        [("authorization", "Basic Zmlyc3Qta2V5")],
        [("authorization", "Basic first-key")],
        [("authorization", "Bearer")],
        [*bearer("first-key"), *bearer("first-key")],
        [("x-api-key", "first-key")],
    ],
    ids=range(14),
)
def test_anything_else_does_not(headers: list[tuple[str, str | bytes]]) -> None:
    async def test() -> None:
        toy = ToyApp()
        code, lines, body = await call(ApiKey(toy, KEYS), "POST", "/v1/completions", headers=headers)
        assert code == 401
        assert lines["www-authenticate"] == "Bearer"
        assert b'"type": "authentication_error"' in body
        assert b'"code": "invalid_api_key"' in body
        assert b"first" not in body
        assert toy.started == []

    run(test())


def test_no_key_in_the_url_opens() -> None:
    async def test() -> None:
        assert await status(ApiKey(ToyApp(), KEYS), query_string=b"api_key=first-key&key=first-key") == 401

    run(test())


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    original = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        assert isinstance(a, bytes)
        assert isinstance(b, bytes)
        compared.append((len(a), len(b)))
        return original(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counting)

    async def test() -> None:
        app = ApiKey(ToyApp(), ["one", "two", "three"])
        counts = []
        for key in ("one", "three", "none", "x" * 10_000):
            compared.clear()
            await status(app, headers=bearer(key))
            counts.append(list(compared))
        assert counts == [[(32, 32)] * 3] * 4

    run(test())


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/health", 200),
        ("HEAD", "/health", 200),
        ("POST", "/health", 401),
        ("GET", "/", 200),
        ("POST", "/", 401),
        ("GET", "/page/app.js", 200),
        ("GET", "/page/deeper/app.css", 200),
        ("POST", "/page/app.js", 401),
        ("GET", "/page", 401),
        ("GET", "/page/../v1/models", 401),
        ("GET", "/page/a/..", 401),
        ("GET", "/pages", 401),
        ("GET", "/health/", 401),
        ("GET", "//health", 401),
        ("GET", "/Health", 401),
        ("GET", "/health/../metrics", 401),
        ("GET", "/metrics", 401),
        ("GET", "/v1/models", 401),
        ("GET", "/docs", 401),
        ("OPTIONS", "/v1/models", 401),
    ],
)
def test_only_what_is_public_is_open(method: str, path: str, expected: int) -> None:
    async def test() -> None:
        app = ApiKey(ToyApp(), KEYS, public_paths=["/health", "/", "/page/"])
        assert await status(app, method, path) == expected

    run(test())


def test_behind_a_prefix_the_same_is_public() -> None:
    async def test() -> None:
        app = ApiKey(ToyApp(), KEYS)
        assert await status(app, path="/llm/health", root_path="/llm") == 200
        assert await status(app, path="/llm/v1/models", root_path="/llm") == 401
        assert await status(app, path="/llmhealth", root_path="/llm") == 401

    run(test())


def test_a_preflight_passes_since_it_cannot_carry_a_key() -> None:
    async def test() -> None:
        app = ApiKey(ToyApp(), KEYS)
        assert await status(app, "OPTIONS", headers=PREFLIGHT) == 200
        assert await status(app, "POST", headers=PREFLIGHT) == 401

    run(test())


def test_a_websocket_is_closed_and_the_lifespan_passes() -> None:
    async def test() -> None:
        sent: list[Message] = []
        seen: list[str] = []

        async def app(scope: object, receive: object, send: object) -> None:
            seen.append("app")

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            sent.append(message)

        guarded = ApiKey(app, KEYS)
        await guarded({"type": "websocket", "path": "/health", "headers": []}, receive, send)
        assert (sent, seen) == ([{"type": "websocket.close", "code": 1008}], [])
        await guarded({"type": "lifespan"}, receive, send)
        assert seen == ["app"]

    run(test())


@pytest.mark.parametrize("key", ["", " ", "secret ", "sec\nret", "sec\0ret", "sec\x7fret"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="api_key: a key must not be empty") as caught:
        ApiKey(ToyApp(), ["fine", key])
    assert "ret" not in str(caught.value)


def test_there_has_to_be_a_key() -> None:
    with pytest.raises(ValueError, match="there has to be at least one"):
        ApiKey(ToyApp(), [])


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\n\n  first-key  \r\nschlüssel-ключ\n", encoding="utf-8")
    assert read_api_keys(file) == ["first-key", "schlüssel-ключ"]


@pytest.mark.parametrize(
    ("content", "message"), [(b"# nothing\n\n", "has no key"), (b"\xff\xfe", "it is no UTF-8")]
)
def test_a_file_without_keys_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_api_keys(file)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"api_key_file=.* cannot be read: No such file"):
        read_api_keys(tmp_path / "none")
