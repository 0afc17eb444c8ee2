"""Refuses requests for other hosts than this one: a web page must not reach a local server by DNS rebinding.

A page whose name first resolves to its own server and then to 127.0.0.1 is, to a browser, of the same origin as what
listens there. The Host header still carries the page's name.
"""

import ipaddress
import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from jaxpaged.serve.server.guards.errors import send_error

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]/@\s]+)(?::\d{1,5})?")


def hosts_to_allow(bind_host: str | None, allowed_hosts: Iterable[str] = ()) -> tuple[str, ...] | None:
    """What ``HostCheck`` has to be given, beyond the names of this machine; None if no host is to be refused.

    By itself it is only for servers on a loopback address: what another machine may call this one is not known
    here. ``allowed_hosts`` adds names, and checks on any address; ``"*"`` among them allows all.
    """
    allowed = tuple(allowed_hosts)
    if "*" in allowed:
        return None
    return allowed if allowed or is_loopback(bind_host or "") else None


def host_name(value: str) -> str | None:
    """The host of a Host header in lower case, without port, brackets and final dot; None if it is malformed."""
    match = _HOST.fullmatch(value.lower())
    return match[1].strip("[]").rstrip(".") if match else None


def is_loopback(host: str) -> bool:
    """Whether ``host`` is localhost or a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HostCheck:
    """Answers 403 unless the Host header is localhost, a loopback address or one of ``allowed_hosts``.

    Ports do not matter. ``allowed_hosts`` are names or addresses; ``*.example.org`` stands for all below it.

    Raises:
        ValueError: an allowed host is malformed.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Iterable[str] = ()) -> None:
        self.app = app
        self._names = {"localhost", "127.0.0.1", "::1"}
        self._below: tuple[str, ...] = ()
        for allowed in allowed_hosts:
            name = host_name(allowed.removeprefix("*."))
            if not name or "*" in name:
                raise ValueError(f"allowed_host={allowed!r} is no host name")
            if allowed.startswith("*."):
                self._below += (f".{name}",)
            else:
                self._names.add(name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        name = host_name(str(hosts[0], "latin-1")) if len(hosts) == 1 else None
        if name and (name in self._names or name.endswith(self._below) or is_loopback(name)):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send_error(
                send,
                403,
                "the Host header names no host that this server answers for (option --allowed-host)",
                code="host_not_allowed",
            )
