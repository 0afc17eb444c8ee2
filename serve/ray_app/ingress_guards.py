"""The guards of ``jaxpaged serve`` at the ingress, and what is told of the requests that they refuse."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from jaxpaged.serve.metrics.access_log import AccessEntry, AccessLog
from jaxpaged.serve.metrics.exposition import FamilyMaker, write
from jaxpaged.serve.metrics.http_metrics import HttpMetrics
from jaxpaged.serve.page.routes import public_paths
from jaxpaged.serve.server.guards.access import RequestSummary
from jaxpaged.serve.server.guards.api_key import PUBLIC_PATHS, read_api_keys
from jaxpaged.serve.server.guards.stack import GuardOptions
from jaxpaged.serve.server.options import ServerOptions


def guard_options(options: ServerOptions) -> GuardOptions:
    """The guards' options among those of a server.

    Raises:
      ValueError: the file of API keys cannot be read.
    """
    keys = list(options.api_key or ())
    if options.api_key_file is not None:
        keys += read_api_keys(options.api_key_file)
    return GuardOptions(
        api_keys=tuple(keys),
        public_paths=PUBLIC_PATHS + (tuple(public_paths()) if options.page else ()),
        bind_host=options.host,
        allowed_hosts=tuple(options.allowed_host or ()),
        allowed_origins=tuple(options.allowed_origin or ()),
        max_body_bytes=options.max_body_bytes,
        max_total_body_bytes=16 * options.max_body_bytes,
        body_timeout=options.body_timeout,
    )


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
