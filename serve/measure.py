"""Runs a workload on an engine and takes the times; greedy, the end of a text ignored, exact output lengths."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpaged.serve.workload import WorkItem

if TYPE_CHECKING:
    from jaxpaged import Engine, EngineStats

PERCENTILES = (50, 90, 99)


@dataclass
class RequestTimes:
    """When a request was sent and when tokens of it came, in seconds of ``time.perf_counter``."""

    sent: float
    num_tokens: int = 0
    arrivals: list[float] = field(default_factory=list)  # one an output, which may bring several tokens

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.arrivals[0] - self.sent

    @property
    def latency(self) -> float:
        """Time to the last token."""
        return self.arrivals[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        """Mean time of an output token after the first one."""
        return (self.latency - self.ttft) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Times between successive outputs: inter-token latencies."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass
class Run:
    """One pass over the workload."""

    seconds: float
    requests: list[RequestTimes]
    counters: dict[str, Any]  # differences of the engine's counters
    peak_kv_usage: float


def run_together(engine: "Engine", items: Sequence[WorkItem]) -> Run:
    """All requests are sent at once."""
    return _timed(engine, [items])


def run_one_by_one(engine: "Engine", items: Sequence[WorkItem]) -> Run:
    """Each request is sent when the one before it has finished."""
    return _timed(engine, [[item] for item in items])


MODES: dict[str, Callable[["Engine", Sequence[WorkItem]], Run]] = {
    "throughput": run_together,
    "latency": run_one_by_one,
}


def _timed(engine: "Engine", rounds: Sequence[Sequence[WorkItem]]) -> Run:
    engine.reset_prefix_cache()
    before = engine.stats()
    times: list[RequestTimes] = []
    peak = 0.0
    started = time.perf_counter()
    for items in rounds:
        peak = max(peak, _serve(engine, items, times))
    took = time.perf_counter() - started
    return Run(took, times, _difference(before, engine.stats()), peak)


def _serve(engine: "Engine", items: Sequence[WorkItem], times: list[RequestTimes]) -> float:
    """Runs some requests to their ends; returns the largest share of the pool that was in use."""
    from jaxpaged import RequestOutputKind, SamplingParams

    live: dict[str, RequestTimes] = {}
    for item in items:
        params = SamplingParams(
            max_tokens=item.out,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        name = f"bench-{len(times)}"
        live[name] = RequestTimes(time.perf_counter())
        times.append(live[name])
        engine.add_request(name, item.prompt, params)
    peak = 0.0
    while engine.has_unfinished_requests:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.error is not None:
                raise output.error
            request = live[output.request_id]
            request.arrivals.append(now)
            request.num_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        peak = max(peak, engine.stats().kv_cache_usage_perc)
    return peak


def _difference(before: "EngineStats", after: "EngineStats") -> dict[str, Any]:
    values = {f.name: (getattr(before, f.name), getattr(after, f.name)) for f in fields(after)}
    return {name: new - old for name, (old, new) in values.items() if isinstance(new, int | float)}


def figures(run: Run) -> dict[str, Any]:
    """What a run says: rates in 1/s, times in seconds, shares of one."""
    counters, steps = run.counters, max(1, run.counters["num_steps"])
    output = sum(request.num_tokens for request in run.requests)
    computed = counters["num_tokens"] + counters["num_padded_tokens"]
    host = counters["schedule_time"] + counters["build_time"] + counters["update_time"]
    gaps = [gap for request in run.requests for gap in request.gaps]
    tpots = [request.tpot for request in run.requests if request.tpot is not None]
    return {
        "seconds": run.seconds,
        "requests": len(run.requests),
        "prompt_tokens": counters["num_prompt_tokens"],
        "output_tokens": output,
        "output_tokens_per_second": output / run.seconds,
        "total_tokens_per_second": (output + counters["num_prompt_tokens"]) / run.seconds,
        "requests_per_second": len(run.requests) / run.seconds,
        "ttft": distribution([request.ttft for request in run.requests]),
        "tpot": distribution(tpots),
        "itl": distribution(gaps),
        "latency": distribution([request.latency for request in run.requests]),
        "steps": counters["num_steps"],
        "tokens_per_step": counters["num_tokens"] / steps,
        "padding_waste": counters["num_padded_tokens"] / max(1, computed),
        "host_time_per_step": host / steps,
        "schedule_time_per_step": counters["schedule_time"] / steps,
        "build_time_per_step": counters["build_time"] / steps,
        "update_time_per_step": counters["update_time"] / steps,
        "device_time_per_step": counters["device_time"] / steps,
        "peak_kv_usage": run.peak_kv_usage,
        "prefix_hit_rate": counters["prefix_cache_hits"] / max(1, counters["prefix_cache_queries"]),
        "preemptions": counters["num_preemptions"],
        "compiles": counters["num_compiles"],
        "compile_seconds": counters["compile_time"],
    }


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles of some times; None when there are none."""
    if not values:
        return None
    marks = np.percentile(values, PERCENTILES)
    named = {f"p{p}": float(mark) for p, mark in zip(PERCENTILES, marks, strict=True)}
    return {"mean": float(np.mean(values)), **named}
