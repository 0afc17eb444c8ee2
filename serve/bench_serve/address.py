"""Where a server is, taken from ``--base-url``, and how requests to it look on the wire."""

import asyncio
import socket
import ssl
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

USER_AGENT = "jaxpaged-bench"


@dataclass(frozen=True)
class Address:
    """A server; ``prefix`` is what its paths begin with, before ``/v1``."""

    url: str
    host: str
    port: int
    prefix: str
    tls: ssl.SSLContext | None
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> Self:
        """The address of a URL like ``http://127.0.0.1:8000``, with or without ``/v1`` at its end.

        Raises:
          ValueError: it is no such URL.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"--base-url={url}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--base-url={url}: must be as in http://127.0.0.1:8000")
        is_clean = url.isascii() and url.isprintable() and " " not in url
        if parts.username is not None or parts.query or parts.fragment or not is_clean:
            raise ValueError(f"--base-url={url}: must be scheme, host, port and path alone")
        is_tls = parts.scheme == "https"
        headers = {"Host": parts.netloc, "User-Agent": USER_AGENT}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        return cls(
            url=url,
            host=parts.hostname,
            port=port or (443 if is_tls else 80),
            prefix=parts.path.rstrip("/").removesuffix("/v1"),
            tls=ssl.create_default_context() if is_tls else None,
            headers=headers,
        )

    def get(self, path: str) -> bytes:
        """The bytes of a GET request; ``path`` begins after the prefix."""
        return self._message("GET", path, {}, b"")

    def post(self, path: str, body: bytes, request_id: str) -> bytes:
        """The bytes of a POST request with a JSON body, whose answer may be a stream."""
        more = {
            "Accept": "text/event-stream, application/json",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "X-Request-Id": request_id,
        }
        return self._message("POST", path, more, body)

    def _message(self, method: str, path: str, more: dict[str, str], body: bytes) -> bytes:
        lines = [f"{method} {self.prefix}{path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in (self.headers | more).items()]
        return "\r\n".join([*lines, "", ""]).encode("ascii") + body

    async def resolve(self) -> list[str]:
        """Numeric addresses of the host, so that no connection has to ask for them again.

        Raises:
          OSError: the name is not known.
        """
        if self.host == "localhost":
            # Both families, the one that servers bind by default first.
            return ["127.0.0.1", "::1"]
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))
