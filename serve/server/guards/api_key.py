"""Lets only those in who know one of the API keys."""

import hmac
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from jaxpaged.serve.server.guards.cors import is_preflight
from jaxpaged.serve.server.guards.errors import send_error

PUBLIC_PATHS = ("/health",)


def read_api_keys(path: Path) -> list[str]:
    """The keys of a UTF-8 file, one a line; empty lines and those that begin with ``#`` are skipped.

    Raises:
        ValueError: the file cannot be read, is no UTF-8, or has no key.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise ValueError(f"api_key_file={str(path)!r} cannot be read: {reason}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"api_key_file={str(path)!r} has no key")
    return keys


class ApiKey:
    """Answers 401 unless ``Authorization: Bearer KEY`` carries one of ``keys``.

    ``public_paths`` may be read (GET, HEAD) without a key; one that ends in ``/`` stands for all below it, except
    ``/`` itself. A CORS preflight, which cannot carry a key, passes too. What is compared are hashes of equal
    length, in constant time, and always with all keys: neither the time nor its length tells how close a guess was.

    With several keys ``scope["state"]["tenant"]`` says which it was, by its place: "key-1", "key-2", ...

    Raises:
        ValueError: no key, or one that is empty or has characters that no header can carry. No message shows a key.
    """

    def __init__(
        self, app: ASGIApp, keys: Iterable[str], *, public_paths: Iterable[str] = PUBLIC_PATHS
    ) -> None:
        self.app = app
        listed = list(keys)
        tenants = [f"key-{place}" if len(listed) > 1 else "" for place in range(1, len(listed) + 1)]
        self._digests = [
            (digest, tenant) for key, tenant in zip(listed, tenants, strict=True) for digest in _digests(key)
        ]
        if not self._digests:
            raise ValueError("api_key: there has to be at least one")
        paths = list(public_paths)
        self._public = frozenset(paths)
        self._public_below = tuple(path for path in paths if path.endswith("/") and path != "/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        elif self._is_open(scope) or self._is_known(scope):
            await self.app(scope, receive, send)
        else:
            await send_error(
                send,
                401,
                "this server needs an API key: send 'Authorization: Bearer KEY' with a valid one",
                code="invalid_api_key",
                headers=[(b"www-authenticate", b"Bearer")],
            )

    def _is_open(self, scope: Scope) -> bool:
        if scope["method"] not in ("GET", "HEAD"):
            return is_preflight(scope)
        path = _route_path(scope)
        if path in self._public:
            return True
        return path.startswith(self._public_below) and ".." not in path.split("/")

    def _is_known(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1:
            return False
        scheme, _, key = values[0].partition(b" ")
        given = sha256(key.strip()).digest()
        known, found = False, ""
        for digest, tenant in self._digests:  # no early end
            same = hmac.compare_digest(given, digest)
            known |= same
            found = tenant if same else found
        scope.setdefault("state", {})["tenant"] = found
        return known and scheme.lower() == b"bearer"


def _digests(key: str) -> list[bytes]:
    """Hashes of a key as UTF-8 and, as some clients write headers, as Latin-1."""
    if not key or key != key.strip() or any(ord(c) < 0x20 or ord(c) == 0x7F for c in key):
        raise ValueError(
            "api_key: a key must not be empty, nor have control characters or spaces at its ends"
        )
    written = {key.encode("utf-8", "surrogateescape")}
    with suppress(UnicodeEncodeError):
        written.add(key.encode("latin-1"))
    return [sha256(octets).digest() for octets in sorted(written)]


def _route_path(scope: Scope) -> str:
    """The path that routes are matched with: without the prefix that a proxy added."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path
