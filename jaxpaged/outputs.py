"""What comes out of the engine: plain data with vLLM's names."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one candidate; ``rank`` 1 is the most likely token of the vocabulary."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.

    ``text`` and ``token_ids`` hold everything so far or only what is new, as the request's ``output_kind`` says.
    ``logprobs`` has one mapping (token id to ``Logprob``) a token. ``finish_reason`` is "stop", "length", "abort",
    "error" or None while it runs; ``stop_reason`` the stop string or token id that ended it, None for EOS.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """Whether no more tokens come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request in seconds of ``time.monotonic``, and what it cost."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_preemptions: int = 0


@dataclass(slots=True)
class RequestOutput:
    """The state of one request: its prompt and its ``n`` completions.

    ``prompt_logprobs`` has one entry a prompt token, None for the first. ``num_cached_tokens`` prompt tokens were
    found in the prefix cache. ``error`` is what ended the request when a finish reason is "error".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    error: Exception | None = None


@dataclass
class EngineStats:
    """Counters since the engine started. Times are seconds of host wall clock.

    ``padding_waste`` is the share of computed tokens that were padding. Per-step times: ``schedule_time`` (who
    runs, which blocks), ``build_time`` (arrays of the bucket), ``device_time`` (dispatch and wait), ``update_time``
    (tokens, stops, text, outputs).
    """

    num_steps: int = 0
    num_tokens: int = 0
    num_padded_tokens: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    schedule_time: float = 0.0
    build_time: float = 0.0
    device_time: float = 0.0
    update_time: float = 0.0
    num_requests_running: int = 0
    num_requests_waiting: int = 0
    num_preemptions: int = 0
    num_compiles: int = 0
    compile_time: float = 0.0
    num_blocks: int = 0
    num_free_blocks: int = 0
    kv_cache_usage_perc: float = 0.0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    blocks_allocated: int = 0
    blocks_reused: int = 0
    blocks_evicted: int = 0
    blocks_copied: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # by finish reason

    @property
    def padding_waste(self) -> float:
        """Share of the computed tokens that were padding."""
        total = self.num_tokens + self.num_padded_tokens
        return self.num_padded_tokens / total if total else 0.0

    @property
    def host_time_per_step(self) -> float:
        """Mean seconds a step spends outside of the device: schedule, build and update."""
        return (self.schedule_time + self.build_time + self.update_time) / max(1, self.num_steps)


class LogprobArrays(NamedTuple):
    """Log-probabilities of many tokens on the host: ``logprob`` and ``rank`` ``[n]``, the most likely ``[n, k]``."""

    logprob: np.ndarray
    rank: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray

    def most_likely(self, i: int, count: int) -> list[tuple[int, float]]:
        """The ``count`` most likely tokens at ``i`` with their log-probabilities, or all that are known."""
        pairs = zip(self.top_ids[i, :count].tolist(), self.top_logprobs[i, :count].tolist(), strict=True)
        return list(pairs)

    def candidates(self, i: int, token: int, asked: int | None) -> dict[int, tuple[float, int]]:
        """Token id to (log-probability, rank): token ``i`` itself and the ``asked`` most likely ones, -1 for all."""
        width = self.top_ids.shape[1]
        found = {token: (float(self.logprob[i]), int(self.rank[i]))}
        for place in range(width if asked == -1 else min(asked or 0, width)):
            found.setdefault(int(self.top_ids[i, place]), (float(self.top_logprobs[i, place]), place + 1))
        return found
