"""What is told of the requests that the guards refuse at the ingress: metrics, and lines of the access log."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from jaxpaged.serve.metrics.access_log import AccessEntry, AccessLog
from jaxpaged.serve.metrics.exposition import FamilyMaker, write
from jaxpaged.serve.metrics.http_metrics import HttpMetrics
from jaxpaged.serve.server.guards.access import RequestSummary
from jaxpaged.serve.server.options import ServerOptions


class RefusalCounter(Collector):
    """Counts and logs the requests that no replica heard of; what replicas get, they count and log themselves.

    Args:
      model_name: label of all metrics.
      name: what this ingress is called among the replicas.
      options: say where the access log is.
    """

    def __init__(self, model_name: str, name: str, options: ServerOptions) -> None:
        self.name = name
        self._make = FamilyMaker(model_name)
        self._http = HttpMetrics()
        self._log = AccessLog.of_option(options.access_log)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def ended(self, summary: RequestSummary) -> None:
        """A request has been answered."""
        if summary.details.get("forwarded"):
            return
        self._http.http(summary.route, summary.method, summary.status, summary.seconds)
        entry = AccessEntry(
            request_id=summary.request_id or "",
            client=summary.client,
            method=summary.method,
            route=summary.route,
            status=summary.status,
            duration=summary.seconds,
        )
        self._log.write(entry)

    def close(self) -> None:
        """Writes what is left of the log."""
        self._log.close()

    def collect(self) -> Iterator[Metric]:
        """The counts; ``prometheus_client`` calls it."""
        return self._http.families(self._make)

    def render(self) -> str:
        """The counts, and what this process takes, in Prometheus' text format."""
        return write(self._registry, "")[0].decode()
