"""A pool of connections to one server, and what can go wrong on them, by kind."""

import asyncio
import contextlib
import socket
import ssl
from dataclasses import dataclass
from time import perf_counter

from jaxpaged.serve.bench_serve.address import Address
from jaxpaged.serve.bench_serve.connection import (
    Connection,
    ConnectionEndedError,
    Exchange,
    MalformedResponseError,
)
from jaxpaged.serve.terminal import seconds

# So many descriptors are left to everything that is no connection.
SPARE_DESCRIPTORS = 64


@dataclass(frozen=True)
class Failure:
    """Why a request has no answer: a kind to count by, and what was said."""

    kind: str
    message: str


class Client:
    """Sends requests over connections that are kept for the next ones.

    ``numeric_hosts`` are what ``Address.resolve`` gave; the first that takes a connection is used from then on.
    """

    def __init__(self, address: Address, numeric_hosts: list[str], *, timeout: float) -> None:
        self.num_connections = 0
        self._address = address
        self._hosts = numeric_hosts
        self._timeout = timeout
        self._idle: list[Connection] = []

    async def send(self, message: bytes, timeout: float | None = None) -> tuple[Exchange, Failure | None]:
        """Sends a request and waits for the end of its response; the clock starts before a connection is looked for.

        ``timeout`` in seconds stands for the client's own. A failure says that there is no whole response; a status
        that tells of an error is none here.
        """
        exchange = Exchange(perf_counter())
        failure = None
        timeout = self._timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(timeout) as limit:
                exchange = await self._send(message, exchange)
        except ConnectionEndedError as error:
            failure = Failure("broken connection", str(error))
        except MalformedResponseError as error:
            failure = Failure("malformed response", str(error))
        except OSError as error:
            # asyncio's own TimeoutError is an OSError too, as is that of a connection that nobody accepts.
            if isinstance(error, TimeoutError) and limit.expired():
                failure = Failure("timeout", f"no end of the response within {seconds(timeout)}")
            else:
                failure = Failure("no connection", reason(error))
        if failure is not None:
            exchange.ended = perf_counter()
        return exchange, failure

    async def _send(self, message: bytes, exchange: Exchange) -> Exchange:
        while True:
            is_fresh = not self._idle
            connection = await self._connect() if is_fresh else self._idle.pop()
            is_kept = False
            try:
                await connection.carry(message, exchange)
                is_kept = exchange.is_reusable and connection.is_idle
                return exchange
            except ConnectionEndedError:
                # A server may close a connection that it kept just when the next request is written to it.
                if is_fresh or exchange.has_begun:
                    raise
            finally:
                if is_kept:
                    self._idle.append(connection)
                else:
                    connection.abort()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        address, error = self._address, OSError("no address")
        for host in list(self._hosts):
            try:
                _, connection = await loop.create_connection(
                    Connection,
                    host,
                    address.port,
                    ssl=address.tls,
                    server_hostname=address.host if address.tls is not None else None,
                )
            except OSError as refused:
                error = refused
                continue
            self._hosts = [host]
            self.num_connections += 1
            return connection
        raise error

    def close(self) -> None:
        """Closes the connections that are kept."""
        while self._idle:
            self._idle.pop().abort()


def reason(error: OSError) -> str:
    """An error of connecting in a few words."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, socket.gaierror):
        return "the host is not known"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    return error.strerror or str(error) or type(error).__name__


def allow_connections(count: int) -> None:
    """Raises the limit of open files, as far as the system lets us, to what ``count`` connections need."""
    try:
        import resource
    except ImportError:  # no such limit where there is no such module
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(ValueError, OSError):
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
