"""How metrics are written down: families under our prefix, and the text format that a scraper asks for."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.utils import floatToGoString

from jaxpaged.serve.metrics.histogram import Histogram

PREFIX = "jaxpaged:"
OPENMETRICS = "application/openmetrics-text"
PLAIN = "text/plain"


def label_value(value: str, max_length: int = 256) -> str:
    """A label value that can always be written: cut to a length, and without what UTF-8 cannot hold.

    A file name that is not UTF-8 comes from the command line with lone surrogates, on which writing would fail.
    """
    return value[:max_length].encode("utf-8", "replace").decode("utf-8")


class FamilyMaker:
    """Makes metric families: the prefix before each name, the label ``model_name`` on each sample.

    The prefix is to these names what ``vllm:`` is to vLLM's, so a dashboard is ported by replacing it. A counter is
    named without ``_total``, which the formats add.
    """

    def __init__(self, model_name: str) -> None:
        self.model_name = label_value(model_name)

    def gauge(self, name: str, documentation: str, value: float) -> Metric:
        """One value that goes up and down."""
        family = GaugeMetricFamily(PREFIX + name, documentation, labels=("model_name",))
        family.add_metric((self.model_name,), value)
        return family

    def counter(self, name: str, documentation: str, value: float) -> Metric:
        """One value that only grows."""
        family = CounterMetricFamily(PREFIX + name, documentation, labels=("model_name",))
        family.add_metric((self.model_name,), value)
        return family

    def gauges(self, name: str, documentation: str, label: str, values: Mapping[str, float]) -> Metric:
        """A value for each value of a label."""
        family = GaugeMetricFamily(PREFIX + name, documentation, labels=("model_name", label))
        for key, value in values.items():
            family.add_metric((self.model_name, key), value)
        return family

    def states(self, name: str, documentation: str, label: str, states: tuple[str, ...], now: str) -> Metric:
        """1 for the state that is so now and 0 for the others.

        OpenMetrics has state sets for this, but their label has the metric's name, and a label can hold no colon.
        """
        return self.gauges(name, documentation, label, {state: float(state == now) for state in states})

    def counters(self, name: str, documentation: str, label: str, values: Mapping[str, float]) -> Metric:
        """A growing value for each value of a label."""
        keyed: dict[tuple[str, ...], float] = {(key,): value for key, value in values.items()}
        return self.counters_by(name, documentation, (label,), keyed)

    def counters_by(
        self, name: str, documentation: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]
    ) -> Metric:
        """A growing value for each combination of values of several labels."""
        family = CounterMetricFamily(PREFIX + name, documentation, labels=("model_name", *labels))
        for key, value in values.items():
            family.add_metric((self.model_name, *key), value)
        return family

    def histogram(self, name: str, documentation: str, histogram: Histogram) -> Metric:
        """A distribution."""
        family = HistogramMetricFamily(PREFIX + name, documentation, labels=("model_name",))
        family.add_metric((self.model_name,), *_buckets(histogram))
        return family

    def histograms(
        self, name: str, documentation: str, label: str, histograms: Mapping[str, Histogram]
    ) -> Metric:
        """A distribution for each value of a label."""
        family = HistogramMetricFamily(PREFIX + name, documentation, labels=("model_name", label))
        for key, histogram in histograms.items():
            family.add_metric((self.model_name, key), *_buckets(histogram))
        return family

    def info(self, name: str, documentation: str, values: Mapping[str, str]) -> Metric:
        """Facts as labels of a 1; the formats add ``_info`` to the name."""
        family = InfoMetricFamily(PREFIX + name, documentation, labels=("model_name",))
        family.add_metric((self.model_name,), {key: label_value(value) for key, value in values.items()})
        return family


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    counts, total = histogram.read()
    names = [*map(floatToGoString, histogram.bounds), "+Inf"]
    return [(name, float(count)) for name, count in zip(names, counts, strict=True)], total


def write(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The text of all that a registry collects, and its content type.

    It is OpenMetrics 1.0 where ``accept``, the request's header, asks for that at least as much as for plain text, and
    else the text format 0.0.4, which every scraper reads.
    """
    # So names come out as they are; there is nothing in them to escape. The default replaces a colon by an underscore,
    # in OpenMetrics of samples alone (prometheus/client_python#1177), which then belong to no family.
    escaping = openmetrics.ALLOWUTF8
    if wants_openmetrics(accept):
        return openmetrics.generate_latest(registry, escaping), openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(registry, escaping), CONTENT_TYPE_PLAIN_0_0_4


def wants_openmetrics(accept: str) -> bool:
    """Whether an ``Accept`` header asks for OpenMetrics at least as much as for plain text; nonsense asks for nothing.

    The library has a function for this too, but it raises on a version that is no number, and repeats the version that
    was asked for in its answer; this header is written by anybody.
    """
    wanted = {OPENMETRICS: 0.0, PLAIN: 0.0}
    for part in accept.split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if kind in wanted:
            wanted[kind] = max(wanted[kind], _quality(parameters))
    return wanted[OPENMETRICS] > 0 and wanted[OPENMETRICS] >= wanted[PLAIN]


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                quality = float(value)
            except ValueError:
                return 0.0
            return quality if 0.0 <= quality <= 1.0 else 0.0
    return 1.0
