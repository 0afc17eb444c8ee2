"""The connections of one server: how many there may be, and which have overstayed."""

import asyncio
import ipaddress
from collections import Counter
from typing import Protocol

from jaxpaged.serve.server.guards.connection_limits import ConnectionLimits

# Connections beyond the limit that still get an answer saying so; further ones are cut off without a word.
SPARE = 64


class Watched(Protocol):
    """A connection, as its watch sees it."""

    def check(self, now: float) -> None:
        """Ends itself if a bound of time has passed; ``now`` is the loop's clock in seconds."""


class OpenConnections:
    """Counts connections and looks at each a few times a second, as long as there are any.

    One timer for all: a timer for every header, write and close of every connection would cost each request
    several microseconds. For one event loop.

    Invariants: ``_clients`` has the client of every open connection, ``_per_client`` how often each occurs there; a
    timer is running if and only if there are connections.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.num_refused = 0  # connections and requests that were answered by the connection itself
        self.num_timed_out = 0  # connections closed for want of headers
        self.num_stalled = 0  # connections whose client took nothing
        shortest = min(limits.header_timeout, limits.send_timeout, limits.linger_timeout)
        self._period = min(1.0, shortest / 4)
        self._clients: dict[Watched, str | None] = {}
        self._per_client: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._clients)

    def add(self, connection: Watched, address: str | None, loop: asyncio.AbstractEventLoop) -> str | None:
        """Begins to watch a connection; returns why it is one too many, None if it is not."""
        client = client_of(address)
        self._clients[connection] = client
        if client is not None:
            self._per_client[client] += 1
        if self._timer is None:
            self._timer = loop.call_later(self._period, self._sweep, loop)
        if len(self._clients) > self.limits.max_connections:
            return "the server has too many connections"
        most = self.limits.max_connections_per_client
        if most is not None and client is not None and self._per_client[client] > most:
            return "the server has too many connections from this address"
        return None

    @property
    def is_flooded(self) -> bool:
        """Whether there are so many connections that not even a refusal should be kept waiting for its reader."""
        return len(self._clients) > self.limits.max_connections + SPARE

    def remove(self, connection: Watched) -> None:
        """Forgets a connection that has ended."""
        client = self._clients.pop(connection)
        if client is not None:
            self._per_client[client] -= 1
            if not self._per_client[client]:
                del self._per_client[client]
        if not self._clients and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def check_invariants(self) -> None:
        """Asserts what the class says of itself."""
        assert self._per_client == Counter(client for client in self._clients.values() if client is not None)
        assert (self._timer is not None) == bool(self._clients)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(self._period, self._sweep, loop)
        now = loop.time()
        for connection in list(self._clients):
            connection.check(now)


def client_of(address: str | None) -> str | None:
    """What stands for one client: an IPv4 address, or the /64 that an IPv6 one is in, since one host has all of it."""
    if address is None:
        return None
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(parsed) >> 64 << 64))
