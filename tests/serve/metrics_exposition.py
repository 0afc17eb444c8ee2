"""Reads what PrometheusMetrics writes, and makes the records that fill it."""

from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from jaxpaged import EngineStats
from jaxpaged.records import IterationRecord, RequestRecord
from jaxpaged.serve.metrics.prometheus import PrometheusMetrics

OPENMETRICS = "application/openmetrics-text"
Key = tuple[str, frozenset[tuple[str, str]]]  # a sample's name and its labels


def families(metrics: PrometheusMetrics, stats: EngineStats | None, accept: str = "") -> list[Metric]:
    """All families of a render, as the library's own parser of that format reads them."""
    text, content_type = metrics.render(stats, accept)
    parse = parse_openmetrics if content_type.startswith(OPENMETRICS) else parse_plain
    return list(parse(text.decode("utf-8")))


def samples(metrics: PrometheusMetrics, stats: EngineStats | None, accept: str = "") -> dict[Key, float]:
    """Every sample of a render."""
    found: dict[Key, float] = {}
    for family in families(metrics, stats, accept):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def value(found: dict[Key, float], name: str, **labels: str) -> float:
    """The one sample of this name, prefix left out, that has these labels, others aside."""
    wanted = set(labels.items())
    hits = [v for (full, has), v in found.items() if full == f"jaxpaged:{name}" and wanted <= has]
    assert len(hits) == 1, f"{name} {labels}: {len(hits)} samples"
    return hits[0]


def names(found: dict[Key, float]) -> set[str]:
    """Names of all samples, as a query would use them."""
    return {name for name, _ in found}


def iteration(step: int = 1, **fields: float) -> IterationRecord:
    """One step of 10 ms, with eight tokens and as many for padding."""
    record = IterationRecord(step, 100.0 + step, num_scheduled_tokens=8, num_padded_tokens=8, block_size=4)
    record.schedule_time, record.build_time, record.device_time, record.update_time = (
        0.001,
        0.001,
        0.006,
        0.002,
    )
    for name, wanted in fields.items():
        setattr(record, name, wanted)
    return record


def request(finish_reason: str | None = "stop", **fields: float | None) -> RequestRecord:
    """A completion of 11 tokens that waited 0.1 s, had its first token after 0.3 s and ended after 1.3 s."""
    record = RequestRecord("r", 0, 20, 4, 11, 0.1, 0.3, 0.1, 1.3, 0, finish_reason)
    for name, wanted in fields.items():
        setattr(record, name, wanted)
    return record
