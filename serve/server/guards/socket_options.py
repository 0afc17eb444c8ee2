"""Options of accepted sockets: the kernel notices peers that are gone, and holds little for those that are slow."""

import socket
from typing import Protocol

from jaxpaged.serve.server.guards.connection_limits import ConnectionLimits


class SocketLike(Protocol):
    """What asyncio and uvloop give for a transport's socket."""

    @property
    def family(self) -> int: ...
    def setsockopt(self, level: int, option: int, value: int | bytes, /) -> None: ...


def set_socket_options(sock: SocketLike, limits: ConnectionLimits) -> None:
    """Sets those of the options that this system has; only a TCP socket gets any.

    A client that lost power or network sends nothing, so while no token is written nothing would tell: keep-alive
    probes do. TCP_USER_TIMEOUT does where something is written, also where the peer is there and takes nothing; a
    little later than the connection itself, which knows more.
    TCP_NOTSENT_LOWAT bounds what the kernel takes before it can be sent, by default megabytes: a stream has to feel
    that its reader is slow long before that.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    _set(sock, socket.SOL_SOCKET, "SO_KEEPALIVE", 1)
    _set(sock, socket.IPPROTO_TCP, "TCP_KEEPIDLE", limits.keepalive_idle)
    _set(sock, socket.IPPROTO_TCP, "TCP_KEEPINTVL", limits.keepalive_interval)
    _set(sock, socket.IPPROTO_TCP, "TCP_KEEPCNT", limits.keepalive_probes)
    _set(sock, socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", int((limits.send_timeout + 5) * 1000))
    _set(sock, socket.IPPROTO_TCP, "TCP_NOTSENT_LOWAT", limits.write_buffer_bytes)


def _set(sock: SocketLike, level: int, name: str, value: int) -> None:
    option = getattr(socket, name, None)
    if option is None:
        return
    try:
        sock.setsockopt(level, option, value)
    except OSError:  # the peer has left already, or the system knows the name only
        return
