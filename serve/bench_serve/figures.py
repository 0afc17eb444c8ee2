"""From times to figures. Every definition of ``jaxpaged bench serve`` is in this file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxpaged.serve.bench_serve.client import Failure
from jaxpaged.serve.bench_serve.load import LoadRun


@dataclass(frozen=True)
class Outcome:
    """One request that has ended; times in seconds of ``time.perf_counter``, ``None`` where there is no such thing."""

    at: int  # its place in the workload
    scheduled: float
    sent: float  # before a connection was looked for
    ended: float  # the end of the stream, or of waiting for it
    token_times: Sequence[float] = ()  # one a chunk, which may bring several tokens
    output_len: int = 0
    prompt_len: int | None = None
    is_counted_by_server: bool = True  # both lengths; else chunks were counted
    text: str = field(default="", repr=False)
    finish_reason: str | None = None
    failure: Failure | None = None

    @property
    def ttft(self) -> float:
        """Time to first token: from sending the request to the first chunk that brings a token."""
        return self.token_times[0] - self.sent

    @property
    def e2el(self) -> float:
        """End-to-end latency: from sending the request to the end of the stream."""
        return self.ended - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token: (latency - TTFT) / (output_len - 1); None for a single token."""
        return (self.e2el - self.ttft) / (self.output_len - 1) if self.output_len > 1 else None

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the gaps between successive chunks that bring tokens."""
        return np.diff(self.token_times).tolist()

    @property
    def wait(self) -> float:
        """How much later than planned it was sent."""
        return self.sent - self.scheduled

    def meets(self, objectives: Mapping[str, float]) -> bool:
        """Whether no metric is above its objective, in seconds; what a request has not, it does not miss."""
        values = ((getattr(self, metric), limit) for metric, limit in objectives.items())
        return self.failure is None and all(value is None or value <= limit for value, limit in values)


def figures(
    outcomes: Sequence[Outcome],
    run: LoadRun,
    percentiles: Sequence[float],
    objectives: Mapping[str, float],
) -> dict[str, Any]:
    """What a run says: rates in 1/s, times in seconds, shares of one; failed requests only count as failed.

    Without a duration, or with unknown prompt lengths, what needs them is None.
    """
    good = [one for one in outcomes if one.failure is None]
    output = sum(one.output_len for one in good)
    prompt_lens = [one.prompt_len for one in good if one.prompt_len is not None]
    prompt = sum(prompt_lens) if len(prompt_lens) == len(good) else None
    chunks = sum(len(one.token_times) for one in good)

    def rate(count: int | None) -> float | None:
        return None if count is None or run.seconds <= 0 else count / run.seconds

    tpots = [one.tpot for one in good]
    result: dict[str, Any] = {
        "seconds": run.seconds,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "unfinished": run.num_unfinished,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "output_tokens_counted_by": _counted_by(good),
        "tokens_per_chunk": output / chunks if chunks else None,
        "requests_per_second": rate(len(good)),
        "output_tokens_per_second": rate(output),
        "total_tokens_per_second": rate(None if prompt is None else prompt + output),
        "peak_concurrency": peak_concurrency(outcomes),
        "goodput": None,
        "ttft": distribution([one.ttft for one in good], percentiles),
        "tpot": distribution([tpot for tpot in tpots if tpot is not None], percentiles),
        "itl": distribution([gap for one in good for gap in one.itl], percentiles),
        "e2el": distribution([one.e2el for one in good], percentiles),
        "wait": distribution([one.wait for one in outcomes], percentiles),
    }
    if objectives:
        met = sum(one.meets(objectives) for one in good)
        share = met / len(outcomes) if outcomes else None
        result["goodput"] = {
            "objectives": dict(objectives),
            "requests_per_second": rate(met),
            "share_of_requests": share,
        }
    return result


def _counted_by(good: Sequence[Outcome]) -> str | None:
    kinds = {"usage" if one.is_counted_by_server else "chunks" for one in good}
    return "both" if len(kinds) == 2 else next(iter(kinds), None)


def distribution(values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float] | None:
    """Mean, standard deviation, extremes and percentiles of some times; None when there are none."""
    if not values:
        return None
    array = np.asarray(values, np.float64)
    marks = np.percentile(array, percentiles)
    named = {percentile_name(p): float(mark) for p, mark in zip(percentiles, marks, strict=True)}
    return {
        "mean": float(array.mean()),
        "std": float(array.std()),
        "min": float(array.min()),
        "max": float(array.max()),
        **named,
    }


def percentile_name(percentile: float) -> str:
    """``p50``, ``p99.9``."""
    return f"p{percentile:g}"


def peak_concurrency(outcomes: Sequence[Outcome]) -> int:
    """The most requests that were under way at one time; one that ends as another is sent is not."""
    changes = sorted([(one.sent, 1) for one in outcomes] + [(one.ended, -1) for one in outcomes])
    return int(np.cumsum([change for _, change in changes]).max()) if changes else 0


def errors(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Failures by kind, the most frequent kind first, each with the message of its first."""
    failed = sorted((one for one in outcomes if one.failure is not None), key=lambda one: one.ended)
    counts = Counter(one.failure.kind for one in failed if one.failure is not None)
    first: dict[str, str] = {}
    for one in failed:
        assert one.failure is not None
        first.setdefault(one.failure.kind, one.failure.message)
    return [{"kind": kind, "count": n, "first": first[kind]} for kind, n in counts.most_common()]


def client_figures(run: LoadRun, num_chunks: int) -> dict[str, Any]:
    """What measuring cost this process, of which one core is all it can use; ``num_chunks`` were read."""
    return {
        "cpu_seconds": run.cpu_seconds,
        "cpu_share": run.cpu_seconds / run.seconds if run.seconds > 0 else None,
        "chunks": num_chunks,
        "cpu_per_chunk": run.cpu_seconds / num_chunks if num_chunks else None,
        "connections": run.num_connections,
    }
