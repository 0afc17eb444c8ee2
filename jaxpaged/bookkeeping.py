"""What each step cost and did: totals for ``EngineStats``, a record of every step, a trace where one is asked for."""

import time
from collections import deque
from dataclasses import replace

from jaxpaged.block_trace import BlockTrace
from jaxpaged.host_pool import HostPoolStats
from jaxpaged.memory_monitor import MemoryLevel
from jaxpaged.outputs import EngineStats
from jaxpaged.records import IterationRecord
from jaxpaged.results import Results
from jaxpaged.runner import Runner
from jaxpaged.scheduler import Scheduler
from jaxpaged.step_plan import MoveKind, ScheduledStep


class Bookkeeping:
    """Notes each step twice: when it is with the device, and when its results have been taken in.

    Takes microseconds a step, and O(rows) while prompts are computed; a trace takes O(blocks).

    Attributes:
      totals: what grows with each step; ``stats`` adds the rest.
      records: the latest steps and requests.
      trace: gets what every block is after each step, while somebody asks for it.
    """

    def __init__(self, scheduler: Scheduler, results: Results, runner: Runner) -> None:
        self._scheduler = scheduler
        self._results = results
        self._runner = runner
        self.totals = EngineStats()
        self.records = results.records
        self.trace: BlockTrace | None = None
        self._allocations = _RecentRate()
        self._all_caught_up = True  # whether nobody was left in the middle of a prompt by the last step
        self._used_slots = self._held_slots = 0  # summed over all steps
        # How far the counters have been spread over records.
        self._num_allocated = self._num_generated = 0
        self._num_recomputed = self._num_swapped_out = self._num_swapped_in = 0

    def launched(
        self, step: ScheduledStep, bucket: int, times: tuple[float, float, float]
    ) -> IterationRecord:
        """A step is with the device, and ``Scheduler.advance`` has seen it.

        Args:
          step: its plan.
          bucket: tokens that its program computes, padding included.
          times: seconds it took to schedule, to build and to hand over.

        Returns:
          The step's record, for ``collected``.
        """
        totals, num_steps, record = self.totals, step.num_steps, IterationRecord(0, 0.0)
        record.schedule_time, record.build_time, record.device_time = times
        record.num_steps = num_steps
        record.step = totals.num_steps = totals.num_steps + num_steps
        record.num_scheduled_tokens = num_tokens = step.num_tokens * num_steps
        record.num_padded_tokens = num_padded = (bucket - step.num_tokens) * num_steps
        record.num_prompt_tokens = self._num_prompt_tokens(step)
        totals.num_tokens += num_tokens
        totals.num_padded_tokens += num_padded
        totals.build_time += record.build_time
        totals.device_time += record.device_time

        counts, preemptions = self._scheduler.space.stats, self._scheduler.preemption.counts
        allocated, self._num_allocated = self._num_allocated, counts.allocated
        swapped_in, self._num_swapped_in = self._num_swapped_in, counts.requests_swapped_in
        recomputed, self._num_recomputed = self._num_recomputed, preemptions["recompute"]
        swapped_out, self._num_swapped_out = self._num_swapped_out, preemptions["swap"]
        record.blocks_allocated = counts.allocated - allocated
        record.num_swapped_in = counts.requests_swapped_in - swapped_in
        record.num_swapped_out = preemptions["swap"] - swapped_out
        record.num_preempted = record.num_swapped_out + preemptions["recompute"] - recomputed
        return record

    def _num_prompt_tokens(self, step: ScheduledStep) -> int:
        """Tokens of prompts, and those computed again: all but the newest token of who is past its prompt."""
        all_caught_up = len(step.sampling) == len(step.rows) == len(self._scheduler.running)
        only_decodes = self._all_caught_up and not step.num_admitted and step.num_tokens == len(step.rows)
        self._all_caught_up = all_caught_up
        if only_decodes:
            return 0
        num_new = 0
        for index in step.sampling:
            request, count = step.rows[index]
            num_new += step.starts[index] + count > request.num_prompt_tokens
        return step.num_tokens - num_new

    def collected(self, step: ScheduledStep, record: IterationRecord, begun: float, computed: float) -> None:
        """The results of a step have been taken in, or it has failed.

        Args:
          step: its plan.
          record: what ``launched`` returned.
          begun, computed: since when its results were waited for, and since when they were there; seconds of
            ``time.perf_counter``.
        """
        scheduler, totals, space = self._scheduler, self.totals, self._scheduler.space
        allocator = space.allocator
        record.num_running = len(scheduler.running)
        record.num_waiting = len(scheduler.waiting)
        record.num_swapped = space.num_swapped
        record.num_generation_tokens = self._results.num_generation_tokens - self._num_generated
        self._num_generated = self._results.num_generation_tokens
        record.num_free_blocks = num_free = allocator.num_free
        record.num_cached_blocks = allocator.num_cached
        record.num_live_blocks = num_live = allocator.num_usable - num_free
        record.block_size = space.block_size
        held_slots = num_live * space.block_size
        record.num_kv_tokens = used_slots = held_slots - space.unused.count()
        self._held_slots += held_slots * record.num_steps
        self._used_slots += used_slots * record.num_steps
        if self.trace is not None:
            self._trace(self.trace, step, record.step)
        record.time = now = time.monotonic()
        self._allocations.note(now, self._num_allocated)
        record.device_time += computed - begun
        record.update_time = time.perf_counter() - computed
        totals.device_time += computed - begun
        totals.update_time += record.update_time
        self.records.add_iteration(record)

    def _trace(self, trace: BlockTrace, step: ScheduledStep, number: int) -> None:
        space = self._scheduler.space
        swapping = {move.target for move in step.moves if move.kind is MoveKind.SWAP_IN}
        swapping |= {move.source for move in step.moves if move.kind is MoveKind.SWAP_OUT}
        trace.observe(number, space.allocator, space.cache, space.pins.blocks, swapping)

    def stats(self) -> EngineStats:
        """A snapshot of all counters."""
        scheduler, runner, space = self._scheduler, self._runner, self._scheduler.space
        allocator, counts, host, monitor = space.allocator, space.stats, space.host, scheduler.monitor
        moved = HostPoolStats() if runner.host_pool is None else runner.host_pool.stats
        num_slots = allocator.num_live * space.block_size
        return replace(
            self.totals,
            num_generation_tokens=self._results.num_generation_tokens,
            num_requests_running=len(scheduler.running),
            num_requests_waiting=len(scheduler.waiting) + len(scheduler.held.paused),
            num_requests_swapped=space.num_swapped,
            num_preemptions=scheduler.num_preemptions,
            preemptions={kind: scheduler.preemption.counts[kind] for kind in ("recompute", "swap")},
            num_compiles=runner.num_compiles,
            compile_time=runner.compile_seconds,
            compile_events=list(runner.compile_events),
            num_blocks=allocator.num_usable,
            num_free_blocks=allocator.num_free,
            num_cached_blocks=allocator.num_cached,
            num_pinned_prefixes=len(space.pins),
            kv_cache_usage_perc=allocator.num_live / allocator.num_usable,
            block_holders=allocator.holders,
            internal_fragmentation=space.unused.count() / num_slots if num_slots else 0.0,
            kv_waste=1.0 - self._used_slots / self._held_slots if self._held_slots else 0.0,
            prefix_cache_queries=counts.prefix_queries,
            prefix_cache_hits=counts.prefix_hits,
            blocks_allocated=counts.allocated,
            blocks_allocated_per_second=self._allocations.value,
            blocks_reused=counts.reused,
            blocks_evicted=counts.evicted,
            blocks_copied=counts.copied,
            blocks_trimmed=counts.trimmed,
            blocks_swapped_out=counts.swapped_out,
            blocks_swapped_in=counts.swapped_in,
            blocks_demoted=counts.demoted,
            blocks_promoted=counts.promoted,
            num_host_blocks=0 if host is None else host.num_blocks,
            num_host_blocks_held=0 if host is None else host.num_held,
            num_host_blocks_cached=0 if host is None else host.num_cached,
            host_blocks_evicted=0 if host is None else host.num_evicted,
            bytes_to_host=moved.bytes_stored,
            bytes_from_host=moved.bytes_loaded,
            memory_level=(MemoryLevel.NORMAL if monitor is None else monitor.level).name.lower(),
            memory_levels_entered={}
            if monitor is None
            else {level.name.lower(): count for level, count in monitor.num_transitions.items()},
            device_memory_in_use=runner.device_memory_in_use,
            times=self.records.times(),
            finished=dict(self._results.finished),
        )

    def check_invariants(self) -> None:
        """Asserts those of the records and of the trace."""
        self.records.check_invariants()
        if self.trace is not None:
            self.trace.check_invariants()


class _RecentRate:
    """How fast a counter has grown in the last ten seconds, or since the start if that is later."""

    WINDOW = 10.0
    SPACING = 1.0  # between two marks

    def __init__(self) -> None:
        self._last = (time.monotonic(), 0)
        # When the counter stood where, oldest first. The first one may be older than the window, the next not.
        self._marks: deque[tuple[float, int]] = deque([self._last])

    def note(self, now: float, count: int) -> None:
        """Where the counter stands now."""
        marks = self._marks
        if now - marks[-1][0] >= self.SPACING:
            # Where it stood before this change, so that a pause belongs to neither side.
            marks.append(self._last)
            while len(marks) > 1 and marks[1][0] <= now - self.WINDOW:
                marks.popleft()
        self._last = (now, count)

    @property
    def value(self) -> float:
        """Counts a second before the last ``note``; 0 before the first."""
        (now, count), (since, before) = self._last, self._marks[0]
        seconds = min(now - since, self.WINDOW + self.SPACING)
        return (count - before) / seconds if seconds > 0 else 0.0
