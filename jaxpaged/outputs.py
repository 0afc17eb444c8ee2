"""What comes out of the engine: plain data with vLLM's names."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxpaged.records import Distribution


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
    "error", "timeout" or None while it runs; ``stop_reason`` the stop string or token id that ended it, None for EOS.
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


class CompileEvent(NamedTuple):
    """A program that was compiled: when (``time.monotonic``), for which shape, and how many seconds it took."""

    time: float
    shape: str
    seconds: float


@dataclass(slots=True)
class EngineStats:
    """A snapshot of the engine: counters since it started, and, where said, what is so now.

    Times are seconds of host wall clock, blocks are those of the pool without the dummy, requests are completions.

    Attributes:
      num_steps, num_tokens, num_padded_tokens: steps, tokens computed in them, and tokens computed for padding.
      num_prompt_tokens: of the prompts that came.
      num_generation_tokens: sampled and kept.
      schedule_time, build_time, device_time, update_time: who runs and in which blocks; arrays of the bucket;
        dispatch and wait; tokens, stops, text, outputs.
      num_requests_running, num_requests_waiting, num_requests_swapped: now; the last are among those that wait.
      num_preemptions, preemptions: how often a running request gave up its blocks; of these "recompute" and "swap".
      num_compiles, compile_time, compile_events: programs compiled; the latest hundred of them.
      num_blocks, num_free_blocks, num_cached_blocks: now: all; those nobody holds; of these, those in which a prefix
        can still be found.
      num_pinned_prefixes: pins now.
      kv_cache_usage_perc: share of the blocks that somebody holds now; vLLM's name for it.
      block_holders: now: number of holders to how many blocks have so many.
      internal_fragmentation: share of the slots in held blocks that hold nothing now.
      kv_waste: the same over all steps: unused slots of each step, summed, over held slots of each step, summed.
      prefix_cache_queries, prefix_cache_hits: prompt tokens looked up and found.
      blocks_allocated, blocks_allocated_per_second: blocks taken for new content; how many a second in the ten
        seconds before the last step.
      blocks_reused, blocks_evicted, blocks_copied, blocks_trimmed: taken with the content that they had; findable
        ones that were lost to new content; copied on write; given back behind a sliding window.
      blocks_swapped_out, blocks_swapped_in: of preempted requests, to the host and back.
      blocks_demoted, blocks_promoted: with evicted prefixes, to the host and back.
      num_host_blocks, num_host_blocks_held, num_host_blocks_cached: now: all; of swapped requests; of prefixes.
      host_blocks_evicted: prefixes that lost their place on the host.
      bytes_to_host, bytes_from_host: of blocks whose copies have ended.
      memory_level, memory_levels_entered: "normal", "warning" or "critical" now; how often each began.
      device_memory_in_use: bytes now, by the device's own account; None where it gives none, as a CPU.
      times: "step_time", "queue_time", "time_to_first_token", "time_per_output_token" and "e2e_time" to their
        "count", "mean", "p50", "p90" and "p99" over the latest thousand steps or requests (``Records.times``).
      finished: completions by finish reason.
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
    num_requests_swapped: int = 0
    num_preemptions: int = 0
    preemptions: dict[str, int] = field(default_factory=dict)
    num_compiles: int = 0
    compile_time: float = 0.0
    compile_events: list[CompileEvent] = field(default_factory=list)
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_pinned_prefixes: int = 0
    kv_cache_usage_perc: float = 0.0
    block_holders: dict[int, int] = field(default_factory=dict)
    internal_fragmentation: float = 0.0
    kv_waste: float = 0.0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    blocks_allocated: int = 0
    blocks_allocated_per_second: float = 0.0
    blocks_reused: int = 0
    blocks_evicted: int = 0
    blocks_copied: int = 0
    blocks_trimmed: int = 0
    blocks_swapped_out: int = 0
    blocks_swapped_in: int = 0
    blocks_demoted: int = 0
    blocks_promoted: int = 0
    num_host_blocks: int = 0
    num_host_blocks_held: int = 0
    num_host_blocks_cached: int = 0
    host_blocks_evicted: int = 0
    bytes_to_host: int = 0
    bytes_from_host: int = 0
    memory_level: str = "normal"
    memory_levels_entered: dict[str, int] = field(default_factory=dict)
    device_memory_in_use: int | None = None
    times: dict[str, Distribution] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)

    @property
    def padding_waste(self) -> float:
        """Share of the computed tokens that were padding."""
        return _share(self.num_padded_tokens, self.num_tokens + self.num_padded_tokens)

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the prompt tokens looked up in the prefix cache that were found."""
        return _share(self.prefix_cache_hits, self.prefix_cache_queries)

    @property
    def reuse_rate(self) -> float:
        """Share of the blocks taken that came with their content, from the prefix cache."""
        return _share(self.blocks_reused, self.blocks_reused + self.blocks_allocated)

    @property
    def num_host_blocks_free(self) -> int:
        """Host blocks that hold nothing now."""
        return self.num_host_blocks - self.num_host_blocks_held - self.num_host_blocks_cached

    @property
    def host_time_per_step(self) -> float:
        """Mean seconds a step spends outside of the device: schedule, build and update."""
        return (self.schedule_time + self.build_time + self.update_time) / max(1, self.num_steps)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


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
