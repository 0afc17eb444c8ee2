"""The loop of the engine: schedule, build, execute, collect; one step at a time, for all requests at once.

With ``overlap`` a step is planned, built and handed to the device while the one before still runs, its tokens staying
on the device; the host then takes in the results of the one before. The device has its next step before it ends
the last, and a token is shown as soon as it is there.
"""

import logging
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxpaged.batch import BatchBuilder
from jaxpaged.device_rows import DeviceRows
from jaxpaged.errors import UnknownRequestError
from jaxpaged.generation import Generation
from jaxpaged.host_pool import HostPoolStats
from jaxpaged.outputs import EngineStats, RequestOutput
from jaxpaged.program import StepOutput
from jaxpaged.request import Request, RequestStatus
from jaxpaged.results import Results, StepTokens
from jaxpaged.runner import Runner
from jaxpaged.scheduler import Scheduler
from jaxpaged.step_plan import ScheduledStep

logger = logging.getLogger(__name__)


@dataclass
class _Launched:
    """A step that is with the device."""

    step: ScheduledStep
    output: StepOutput | None  # None for several steps in one program
    tokens: Any  # int32 [B], or [num_steps, B] for several steps
    begun: float  # ``time.perf_counter`` when it was handed over
    compiled: bool  # whether its program had to be compiled first


class EngineCore:
    """Scheduler, batch builder and runner, and the generations that are under way.

    Invariants: those of ``Results`` and ``Scheduler``; between two calls of ``step`` at most one step is with the
    device, and none without ``overlap``.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        builder: BatchBuilder,
        runner: Runner,
        *,
        vocab_size: int,
        overlap: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.builder = builder
        self.runner = runner
        self.overlap = overlap
        self.results = Results(scheduler)
        self._rows = DeviceRows(builder, runner, self.results.home, vocab_size)
        self._launched: deque[_Launched] = deque()
        self._stats = EngineStats()
        self._last_computed = 0.0
        self._moved = HostPoolStats()

    @property
    def generations(self) -> dict[str, Generation]:
        """Live requests by id."""
        return self.results.generations

    @property
    def has_unfinished(self) -> bool:
        """Whether a further step has anything to do."""
        return self.scheduler.has_unfinished

    def add(self, generation: Generation) -> None:
        """Queues a request.

        Raises:
          InvalidRequestError: its id is in use.
        """
        self.results.add(generation)
        self.scheduler.add(generation.completions[0].request)
        self._stats.num_prompt_tokens += len(generation.prompt_token_ids)

    def fork(self, generation: Generation, parent: Request) -> None:
        """Queues a request whose tokens begin with some of ``parent``'s, whose blocks it shares.

        Raises:
          InvalidRequestError: its id is in use.
        """
        self.results.add(generation)
        self.scheduler.fork(parent, generation.completions[0].request)
        self._stats.num_prompt_tokens += len(generation.prompt_token_ids)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request now; returns its last output.

        Raises:
          UnknownRequestError: no live request has this id.
        """
        generation = self.generations.get(request_id)
        if generation is None:
            raise UnknownRequestError("request_id", request_id, "no live request has this id")
        logger.info("request %s aborted", request_id)
        return self.results.end(generation, RequestStatus.FINISHED_ABORTED)

    def step(self) -> list[RequestOutput]:
        """Hands the device its next step and returns what the last one brought; without overlap, its own.

        At most one output a request, but for one that fails.
        """
        outputs = self._end_late_requests()
        if self.scheduler.needs_tokens:
            outputs += self._collect(0)
        before = len(self._launched)
        outputs += self._launch()
        is_ahead = self.overlap and len(self._launched) > before
        return outputs + self._collect(1 if is_ahead else 0)

    def _end_late_requests(self) -> list[RequestOutput]:
        outputs: list[RequestOutput | None] = []
        if self.scheduler.deadlines:
            for request in self.scheduler.deadlines.expired(time.monotonic()):
                generation = self.generations.get(request.request_id)
                if generation is None or generation.finished:
                    continue
                logger.info("request %s ends: its time is over", request.request_id)
                outputs.append(self.results.end(generation, RequestStatus.FINISHED_TIMEOUT))
        return [output for output in outputs if output is not None]

    def _launch(self) -> list[RequestOutput]:
        """Plans a step and hands it to the device; returns outputs only of requests that this ended."""
        stats, begun = self._stats, time.perf_counter()
        step = self.scheduler.schedule()
        scheduled = time.perf_counter()
        stats.schedule_time += scheduled - begun
        if not step.rows:
            if step.moves:
                self.runner.move_blocks(step.moves)
            return []
        try:
            self._rows.prepare(step)
            bucket, buffer = self.builder.build(step)
            built = time.perf_counter()
            if step.moves:
                self.runner.move_blocks(step.moves)
            launched = self._execute(step, bucket, buffer)
        except Exception as error:
            # What is under way was there before, and is good.
            return self._collect(0) + self._fail(step, error)
        except BaseException:
            # Somebody interrupted us: the step has not happened, and nothing it was to write may be relied on.
            self._recover_state()
            self._start_over()
            raise
        self._launched.append(launched)
        self.scheduler.advance(step)
        self.runner.stage(self.scheduler.next_loads())
        stats.num_steps += step.num_steps
        stats.num_tokens += step.num_tokens * step.num_steps
        stats.num_padded_tokens += (bucket - step.num_tokens) * step.num_steps
        stats.build_time += built - scheduled
        stats.device_time += time.perf_counter() - built
        return []

    def _execute(self, step: ScheduledStep, bucket: int, buffer: np.ndarray) -> _Launched:
        num_compiles, output = self.runner.num_compiles, None
        if step.num_steps > 1:
            tokens: Any = self.runner.execute_decode_steps(bucket, buffer, step.num_steps)
        else:
            output = self.runner.execute(bucket, buffer)
            tokens = output.sampled.tokens
        compiled = self.runner.num_compiles != num_compiles
        return _Launched(step, output, tokens, time.perf_counter(), compiled)

    def _collect(self, num_left: int) -> list[RequestOutput]:
        """Takes in the steps that are with the device but for the last ``num_left``."""
        outputs: list[RequestOutput] = []
        while len(self._launched) > num_left:
            launched, begun = self._launched.popleft(), time.perf_counter()
            try:
                tokens = np.asarray(launched.tokens).reshape(launched.step.num_steps, -1).tolist()
            except Exception as error:
                outputs += self._fail(launched.step, error)
                continue
            except BaseException:
                self._recover_state()
                self._start_over()
                raise
            computed = time.perf_counter()
            self._learn(launched, computed)
            outputs += self.results.take(StepTokens(launched.step, launched.output, tokens))
            self._stats.device_time += computed - begun
            self._stats.update_time += time.perf_counter() - computed
        return outputs

    def _learn(self, launched: _Launched, computed: float) -> None:
        """What a step and the copies beside it took, for the choice between recomputing and swapping."""
        seconds = computed - max(launched.begun, self._last_computed)
        self._last_computed = computed
        cost, host_pool = self.scheduler.preemption.cost, self.runner.host_pool
        if cost is None or host_pool is None:
            return
        if not launched.compiled and launched.step.num_steps == 1:
            cost.observe_step(launched.step.num_tokens, seconds)
        moved, before = host_pool.stats, self._moved
        self._moved = moved
        num_bytes = moved.bytes_stored + moved.bytes_loaded - before.bytes_stored - before.bytes_loaded
        taken = (
            moved.seconds_storing + moved.seconds_loading - before.seconds_storing - before.seconds_loading
        )
        cost.observe_transfer(num_bytes, taken)

    def _fail(self, step: ScheduledStep, error: Exception) -> list[RequestOutput]:
        """A step raised: its requests end with the error, all others go on."""
        failed = self.scheduler.fail(step)
        names = sorted({request.request_id for request in failed})
        logger.error("step failed, requests %s end with an error: %s", names, error, exc_info=error)
        if self._recover_state():
            self._start_over()
        outputs = []
        for name in names:
            generation = self.generations[name]
            self.results.end_with_error(generation, error)
            outputs.append(self.results.close_if_done(generation))
        return [output for output in outputs if output is not None]

    def _recover_state(self) -> bool:
        """A new pool when a program that failed had already taken the old one; whether that was so."""
        if lost := self.runner.state_is_lost:
            self.runner.reset_state()
        return lost

    def _start_over(self) -> None:
        """Every request is computed anew: what the pool holds is not to be relied on."""
        self._launched.clear()
        self.scheduler.restart()
        self._rows.forget()

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        space, scheduler, runner = self.scheduler.space, self.scheduler, self.runner
        stats, allocator = self._stats, self.scheduler.space.allocator
        stats.num_generation_tokens = self.results.num_generation_tokens
        stats.num_requests_running = len(scheduler.running)
        stats.num_requests_waiting = len(scheduler.waiting) + len(scheduler.held.paused)
        stats.num_preemptions = scheduler.num_preemptions
        stats.num_compiles, stats.compile_time = runner.num_compiles, runner.compile_seconds
        stats.num_blocks, stats.num_free_blocks = allocator.num_usable, allocator.num_free
        stats.kv_cache_usage_perc = allocator.num_live / allocator.num_usable
        stats.prefix_cache_queries, stats.prefix_cache_hits = (
            space.stats.prefix_queries,
            space.stats.prefix_hits,
        )
        stats.blocks_allocated, stats.blocks_reused = space.stats.allocated, space.stats.reused
        stats.blocks_evicted, stats.blocks_copied = space.stats.evicted, space.stats.copied
        stats.finished = dict(self.results.finished)
        return replace(stats)

    def check_invariants(self) -> None:
        """Asserts the invariants of the engine and everything below it."""
        assert len(self._launched) <= self.overlap, "more steps under way than there may be"
        self.scheduler.check_invariants()
        self.results.check_invariants()
