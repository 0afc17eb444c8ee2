"""When requests are sent: gaps of a gamma distribution, at a rate that may change on the way."""

import math

import numpy as np


def arrival_times(
    count: int, rates: tuple[float, float], burstiness: float, rng: np.random.Generator
) -> list[float]:
    """Seconds after the start at which each of ``count`` requests is sent; the first is at 0.

    ``rates`` are requests a second at the first and at the last request, and in between on a straight line over the
    requests; infinite rates send all at once. Gaps are gamma distributed with shape ``burstiness`` and the mean of
    the rate: shape 1 is a Poisson process, below 1 requests come in bursts, far above 1 at regular intervals. All
    gaps are then scaled alike, so that the last request comes when the rate says: what is offered to two servers is
    the same, and as much as asked for. Source: the open-loop arrivals of vLLM's ``bench serve``.
    """
    if count < 2 or math.isinf(rates[0]):
        return [0.0] * count
    along = (np.arange(count - 1) + 0.5) / (count - 1)
    means = 1.0 / (rates[0] + (rates[1] - rates[0]) * along)
    gaps = rng.gamma(burstiness, means / burstiness)
    total = gaps.sum()
    if total > 0:
        gaps *= means.sum() / total
    return [0.0, *np.cumsum(gaps).tolist()]
