"""Requests for the tests of policies and of the waiting queue: what decides their order is given directly."""

from jaxpaged.request import Request
from jaxpaged.sampling_params import SamplingParams

PARAMS = SamplingParams()


def waiting_request(
    arrival: int,
    tenant: str = "",
    *,
    index: int = 0,
    num_tokens: int = 4,
    priority: int = 0,
    at: float | None = None,
) -> Request:
    """The ``arrival``-th request, which arrived at second ``at``, by default at second ``arrival``."""
    made = Request(
        f"{tenant}{arrival}",
        [0] * num_tokens,
        PARAMS,
        block_size=4,
        max_tokens=1,
        index=index,
        priority=priority,
        tenant=tenant,
    )
    made.arrival_index = arrival
    made.arrival_time = float(arrival) if at is None else at
    return made


def nothing_cached(_: Request) -> int:
    return 0
