"""How much of the server one connection, one client and all of them together may take."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds of connections: seconds, bytes and counts, all above zero.

    Raises:
        ValueError: a bound that is not above zero.
    """

    header_timeout: float = (
        10.0  # from the connect, or the first byte of a further request, to the end of headers
    )
    max_header_bytes: int = 32 << 10
    max_header_lines: int = 100
    max_url_bytes: int = 8 << 10
    max_connections: int = 2048
    max_connections_per_client: int | None = None  # an address; of IPv6, a /64
    max_pipelined: int = 32  # requests of a connection that wait behind the one being answered
    # Without the client taking anything of what waits for it. The kernel tells in steps of half write_buffer_bytes,
    # so that is what a client has to take in this time, once so much waits that a handler's ``send`` does too.
    send_timeout: float = 60.0
    write_buffer_bytes: int = (
        64 << 10
    )  # beyond it a handler's ``send`` waits; the kernel holds about as much again
    keepalive_idle: int = 20  # TCP: seconds of silence before a probe,
    keepalive_interval: int = 10  # between probes,
    keepalive_probes: int = 4  # and how many without an answer end the connection
    linger_timeout: float = (
        2.0  # how long the rest of a refused request is thrown away, so that the answer arrives
    )
    linger_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ValueError(f"{field.name}={value!r} has to be above zero")
