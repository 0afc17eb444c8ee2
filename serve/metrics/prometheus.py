"""Prometheus metrics of one engine and of the server before it.

Under the prefix ``jaxpaged:`` the names are vLLM's, where vLLM has them. What the founding documents ask for:

====================  ==========================================================================================
there                 here
====================  ==========================================================================================
num_free_blocks       ``num_free_blocks``, ``blocks{state}``
alloc_rate            ``alloc_rate``, ``blocks_allocated_total``
reuse_rate            ``reuse_rate``, ``blocks_reused_total``
fragmentation         ``fragmentation`` now, ``kv_waste`` over all steps
refcount_hist         ``refcount_hist{holders}``
gpu_mem_used          ``kv_mem_used`` for the KV pool, ``gpu_mem_used`` for all of the device
kv_gather_latency     ``attention_latency_seconds``: here the kernel reads blocks in place and gathers nothing apart
iteration statistics  ``step_time_seconds``, ``iteration_tokens_total``, ``engine_time_seconds_total{part}``
request statistics    ``request_prompt_tokens``, ``request_generation_tokens``, ``e2e_request_latency_seconds``
memory status         ``memory_level{level}``, ``memory_level_entered_total{level}``
cache statistics      ``num_blocks``, ``kv_cache_usage_perc``, ``kv_mem_used``
====================  ==========================================================================================

Percentiles, peaks and means are left to queries (``histogram_quantile``, ``max_over_time``).
"""

import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from jaxpaged.records import IterationRecord, RequestRecord
from jaxpaged.serve.metrics.engine_metrics import config_families, engine_families, memory_families
from jaxpaged.serve.metrics.exposition import FamilyMaker, write
from jaxpaged.serve.metrics.histogram import Histogram
from jaxpaged.serve.metrics.http_metrics import HttpMetrics

if TYPE_CHECKING:
    from jaxpaged.config import EngineConfig
    from jaxpaged.memory import MemoryReport
    from jaxpaged.outputs import EngineStats

ENGINE_STATES = ("starting", "ready", "draining", "dead", "closed")
FINISH_REASONS = ("stop", "length", "abort", "error", "timeout")
OTHER_REASON = "other"
ACTIVE_SECONDS = 10.0  # the window of EngineStats.blocks_allocated_per_second

# Seconds: of a whole request, of its first token, between two tokens or of a step, of one kernel.
LATENCY_BOUNDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60),
    *(120, 240, 480, 960, 1920, 3840),
)
FIRST_TOKEN_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1),
    *(1.5, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640),
)
TOKEN_BOUNDS = (
    *(0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08),
    *(0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 40),
)
KERNEL_BOUNDS = tuple(base / 10**power for power in range(6, 0, -1) for base in (1, 2, 5))
NUM_TOKENS_BOUNDS = tuple(base * 10**power for power in range(6) for base in (1, 2, 5))
STEP_TOKENS_BOUNDS = tuple(2**power for power in range(15))

# Name, bounds, documentation. "Request" is one completion, as in vLLM.
HISTOGRAMS = (
    ("iteration_tokens_total", STEP_TOKENS_BOUNDS, "Tokens computed in a step."),
    ("step_time_seconds", TOKEN_BOUNDS, "Seconds of a step."),
    ("inter_token_latency_seconds", TOKEN_BOUNDS, "Seconds between two tokens of a request."),
    ("time_to_first_token_seconds", FIRST_TOKEN_BOUNDS, "Seconds from arrival to the first token."),
    ("request_time_per_output_token_seconds", TOKEN_BOUNDS, "Mean seconds a token after the first."),
    ("e2e_request_latency_seconds", LATENCY_BOUNDS, "Seconds from arrival to the end."),
    ("request_queue_time_seconds", LATENCY_BOUNDS, "Seconds from arrival to the first step."),
    ("request_prefill_time_seconds", LATENCY_BOUNDS, "Seconds from the first step to the first token."),
    ("request_decode_time_seconds", LATENCY_BOUNDS, "Seconds from the first token to the end."),
    ("request_inference_time_seconds", LATENCY_BOUNDS, "Seconds from the first step to the end."),
    ("request_prompt_tokens", NUM_TOKENS_BOUNDS, "Tokens of a request's prompt."),
    ("request_generation_tokens", NUM_TOKENS_BOUNDS, "Tokens generated for a request."),
    ("attention_latency_seconds", KERNEL_BOUNDS, "Seconds of a call of paged attention, where measured."),
)


class PrometheusMetrics(Collector):
    """Collects what an engine and its server tell, and writes it down for a scraper.

    It is a ``Listener`` of an engine: ``stepped``, ``ended`` and ``gaps`` are called in the engine's thread and take a
    few microseconds each. The other methods may be called by any thread. Nothing in here is shared with another
    instance: each has a registry of its own.

    Invariants (``check_invariants``): those of the histograms; each completion that has ended counts once in
    ``request_success`` and once in ``e2e_request_latency_seconds``.

    Args:
      model_name: value of the label that every metric of ours has.
    """

    def __init__(self, model_name: str) -> None:
        self._make = FamilyMaker(model_name)
        self._histograms = {name: Histogram(bounds) for name, bounds, _ in HISTOGRAMS}
        of = self._histograms.__getitem__
        self._step_tokens, self._step_time = of("iteration_tokens_total"), of("step_time_seconds")
        self._gaps, self._attention = of("inter_token_latency_seconds"), of("attention_latency_seconds")
        self._first_token, self._end = of("time_to_first_token_seconds"), of("e2e_request_latency_seconds")
        self._per_token = of("request_time_per_output_token_seconds")
        self._queue, self._prefill = of("request_queue_time_seconds"), of("request_prefill_time_seconds")
        self._decode = of("request_decode_time_seconds")
        self._inference = of("request_inference_time_seconds")
        self._prompt_tokens, self._tokens = of("request_prompt_tokens"), of("request_generation_tokens")
        self._finished = dict.fromkeys((*FINISH_REASONS, OTHER_REASON), 0)  # the engine's thread alone counts
        self._last_step: float | None = None
        self._state = "starting"
        self._config: EngineConfig | None = None
        self._memory: MemoryReport | None = None
        self._stats: EngineStats | None = None
        self._http = HttpMetrics()
        self._rendering = threading.Lock()
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    # What the engine's thread calls.

    def stepped(self, record: IterationRecord) -> None:
        """A turn of the engine's loop has ended."""
        num_steps = max(1, record.num_steps)
        self._step_tokens.observe(record.num_scheduled_tokens / num_steps, num_steps)
        self._step_time.observe(record.step_time, num_steps)
        self._last_step = record.time

    def gaps(self, gaps: Mapping[float, int]) -> None:
        """Seconds between tokens, and how many tokens came after each."""
        for seconds, count in gaps.items():
            self._gaps.observe(seconds, count)

    def ended(self, record: RequestRecord) -> None:
        """A completion has ended."""
        first, end, queued = record.time_to_first_token, record.e2e_time, record.queue_time
        self._end.observe(end)
        if queued is not None:
            self._queue.observe(queued)
            self._inference.observe(end - queued)
        if first is not None:
            self._first_token.observe(first)
            self._decode.observe(end - first)
            if queued is not None:
                self._prefill.observe(first - queued)
        if record.time_per_output_token is not None:
            self._per_token.observe(record.time_per_output_token)
        self._prompt_tokens.observe(record.num_prompt_tokens)
        self._tokens.observe(record.num_generation_tokens)
        reason = record.finish_reason
        self._finished[reason if reason in FINISH_REASONS else OTHER_REASON] += 1

    # What others tell.

    def observe_attention(self, seconds: float) -> None:
        """One call of paged attention was measured; the founding documents' ``kv_gather_latency``."""
        self._attention.observe(seconds)

    def set_state(self, state: str) -> None:
        """What the engine is doing: one of ``ENGINE_STATES``.

        Raises:
          ValueError: ``state`` is none of them.
        """
        if state not in ENGINE_STATES:
            raise ValueError(f"state={state!r}: must be one of {', '.join(ENGINE_STATES)}")
        self._state = str(state)

    def set_engine(self, config: "EngineConfig", memory: "MemoryReport | None" = None) -> None:
        """The engine is there, of these sizes; where its memory goes adds ``memory_bytes`` and ``kv_mem_used``."""
        self._config, self._memory = config, memory

    def http(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered, on ``route``, a template such as ``/v1/models/{model}``, never a raw path."""
        self._http.http(route, method, status, seconds)

    def refused(self, reason: str) -> None:
        """A request was turned away, for a reason of a small fixed set, such as "queue_full"."""
        self._http.refused(reason)

    def disconnected(self) -> None:
        """A client went away before it had its answer."""
        self._http.disconnected()

    # What a scraper gets.

    def render(self, stats: "EngineStats | None", accept: str = "") -> tuple[bytes, str]:
        """All metrics as text.

        Takes a few milliseconds, for which an event loop with many streams may want another thread.

        Args:
          stats: a snapshot of now; None while there is no engine to give one. What only it knows is left out then,
            which tells Prometheus that it is not known.
          accept: the request's header of that name, which may ask for OpenMetrics.

        Returns:
          The text and its content type.
        """
        with self._rendering:
            self._stats = stats
            return write(self.registry, accept)

    def collect(self) -> Iterator[Metric]:
        """All families of ours, with the stats of the latest ``render``; ``prometheus_client`` calls it."""
        make, stats = self._make, self._stats
        yield make.states(
            "engine_state", "1 for what the engine is doing.", "state", ENGINE_STATES, self._state
        )
        for name, _, documentation in HISTOGRAMS:
            yield make.histogram(name, documentation, self._histograms[name])
        finished = {reason: n for reason, n in self._finished.items() if n or reason != OTHER_REASON}
        yield make.counters("request_success", "Completions that have ended.", "finished_reason", finished)
        yield from self._http.families(make)
        if stats is not None:
            last = self._last_step
            is_active = last is None or time.monotonic() - last <= ACTIVE_SECONDS
            yield from engine_families(make, stats, is_active)
            if self._config is not None:
                yield from config_families(make, self._config, stats)
        if self._memory is not None:
            yield from memory_families(make, self._memory, stats)

    def check_invariants(self) -> None:
        """Asserts the invariants; only while nothing ends, as the parts of one end are not counted at once."""
        for histogram in self._histograms.values():
            histogram.check_invariants()
        num_ended = sum(self._finished.values())
        assert self._end.read()[0][-1] == num_ended, "an end that counts in one of the two alone"
