"""Counts of what came over HTTP; the number of series is bounded whatever clients send."""

import threading
from collections.abc import Iterator

from prometheus_client.core import Metric

from jaxpaged.serve.metrics.exposition import FamilyMaker, label_value
from jaxpaged.serve.metrics.histogram import Histogram

# Of a request from its first byte to the last of its answer, which for a stream is the whole generation.
DURATION_BOUNDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    120,
    300,
    600,
)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
MAX_ROUTES = 64
MAX_REASONS = 32
OTHER = "other"


class HttpMetrics:
    """Requests by route, method and status, their durations, refusals and disconnects.

    Any thread may count. Routes and reasons are meant to come from small fixed sets; where they do not, what comes
    after the first ``MAX_ROUTES`` and ``MAX_REASONS`` counts as "other", as does a method that HTTP does not know and a
    status that it cannot have.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, ...], int] = {}
        self._durations: dict[str, Histogram] = {}
        self._refused: dict[str, int] = {}
        self._num_disconnects = 0

    def http(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered, on ``route``, a template such as ``/v1/models/{model}``, never a raw path."""
        method = method if method in METHODS else OTHER
        code = str(status) if 100 <= status <= 599 else OTHER
        with self._lock:
            route = _bounded(route, self._durations, MAX_ROUTES)
            if route not in self._durations:
                self._durations[route] = Histogram(DURATION_BOUNDS)
            duration = self._durations[route]
            key = (route, method, code)
            self._requests[key] = self._requests.get(key, 0) + 1
        duration.observe(seconds)

    def refused(self, reason: str) -> None:
        """A request was turned away, for a reason of a fixed set, such as "queue_full"."""
        with self._lock:
            reason = _bounded(reason, self._refused, MAX_REASONS)
            self._refused[reason] = self._refused.get(reason, 0) + 1

    def disconnected(self) -> None:
        """A client went away before it had its answer."""
        with self._lock:
            self._num_disconnects += 1

    def families(self, make: FamilyMaker) -> Iterator[Metric]:
        """All of it."""
        with self._lock:
            requests, refused = dict(self._requests), dict(self._refused)
            durations, num_disconnects = dict(self._durations), self._num_disconnects
        labels = ("route", "method", "status")
        yield make.counters_by("http_requests", "HTTP requests answered.", labels, requests)
        documentation = "Seconds from an HTTP request to the end of its answer."
        yield make.histograms("http_request_duration_seconds", documentation, "route", durations)
        yield make.counters("requests_refused", "HTTP requests turned away, by reason.", "reason", refused)
        documentation = "Clients that went away before they had their answer."
        yield make.counter("client_disconnects", documentation, num_disconnects)


def _bounded(value: str, known: dict[str, Histogram] | dict[str, int], most: int) -> str:
    value = label_value(value)
    return value if value in known or len(known) < most else OTHER
