"""The loop of the engine: schedule, build, execute, collect; one step at a time, for all requests at once.

With ``overlap`` a step is planned, built and handed to the device while the one before still runs, its tokens staying
on the device; the host then takes in the results of the one before. The device has its next step before it ends
the last, and a token is shown as soon as it is there.
"""

import logging
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxpaged.batch import BatchBuilder
from jaxpaged.bookkeeping import Bookkeeping
from jaxpaged.device_rows import DeviceRows
from jaxpaged.errors import UnknownRequestError
from jaxpaged.generation import Generation
from jaxpaged.host_pool import HostPoolStats
from jaxpaged.memory import MemoryReport
from jaxpaged.outputs import RequestOutput
from jaxpaged.program import StepOutput
from jaxpaged.records import IterationRecord
from jaxpaged.request import Request, RequestStatus
from jaxpaged.results import Results, StepTokens
from jaxpaged.runner import BlocksLostError, Runner
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
    disturbed: bool  # whether its time tells nothing: its program was compiled first, or attention measured
    record: IterationRecord = field(init=False)


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
        memory: MemoryReport,
        overlap: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.builder = builder
        self.runner = runner
        self.memory = memory
        self.overlap = overlap
        self.results = Results(scheduler)
        self._rows = DeviceRows(builder, runner, self.results.home, vocab_size)
        self._launched: deque[_Launched] = deque()
        self._outputs: list[RequestOutput] = []  # those that an interrupted step could not return
        self.books = Bookkeeping(scheduler, self.results, runner)
        self._last_computed = 0.0
        self._moved = HostPoolStats()

    @property
    def generations(self) -> dict[str, Generation]:
        """Live requests by id."""
        return self.results.generations

    @property
    def has_unfinished(self) -> bool:
        """Whether a further step has anything to do."""
        return bool(self._outputs) or self.scheduler.has_unfinished

    def add(self, generation: Generation) -> None:
        """Queues a request.

        Raises:
          InvalidRequestError: its id is in use.
        """
        self.results.add(generation)
        self.scheduler.add(generation.completions[0].request)
        self.books.totals.num_prompt_tokens += len(generation.prompt_token_ids)

    def fork(self, generation: Generation, parent: Request) -> None:
        """Queues a request whose tokens begin with some of ``parent``'s, whose blocks it shares.

        Raises:
          InvalidRequestError: its id is in use.
        """
        self.results.add(generation)
        self.scheduler.fork(parent, generation.completions[0].request)
        self.books.totals.num_prompt_tokens += len(generation.prompt_token_ids)

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

        At most one output a request, but for one that fails, and after an interrupt.
        """
        outputs = self._outputs
        outputs += self._end_late_requests()
        if self.scheduler.needs_tokens:
            outputs += self._collect(0)
        before = len(self._launched)
        outputs += self._launch()
        is_ahead = self.overlap and len(self._launched) > before
        outputs += self._collect(1 if is_ahead else 0)
        self._outputs = []
        return outputs

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

    def measure_attention(self, repeats: int) -> float | None:
        """Seconds that attention of one layer takes for what runs now; see ``Engine.measure_attention``."""
        for launched in self._launched:
            launched.disturbed = True
        running = [request for request in self.scheduler.running if request.num_computed_tokens]
        return self.runner.measure_attention(running, repeats)

    def _launch(self) -> list[RequestOutput]:
        """Plans a step and hands it to the device; returns outputs only of requests that this ended."""
        begun = time.perf_counter()
        try:
            step = self.scheduler.schedule()
        except BaseException:
            # A policy of the user's raised, or somebody interrupted us: half a plan is not to be relied on.
            self._start_over()
            raise
        scheduled = time.perf_counter()
        self.books.totals.schedule_time += scheduled - begun
        try:
            if not step.rows:
                self.runner.move_blocks(step.moves)
                return []
            self._rows.prepare(step)
            bucket, buffer = self.builder.build(step)
            built = time.perf_counter()
            if step.moves:
                self.runner.move_blocks(step.moves)
            launched = self._execute(step, bucket, buffer)
        except BlocksLostError as error:
            return self._collect(0) + self._fail_loads(step, error)
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
        times = (scheduled - begun, built - scheduled, time.perf_counter() - built)
        launched.record = self.books.launched(step, bucket, times)
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
                computed = time.perf_counter()
                outputs += self._fail(launched.step, error)
                self.books.collected(launched.step, launched.record, begun, computed)
                continue
            except BaseException:
                self._recover_state()
                self._start_over()
                raise
            computed = time.perf_counter()
            self._learn(launched, computed)
            try:
                outputs += self.results.take(StepTokens(launched.step, launched.output, tokens))
            except BaseException:
                self._recover_state()
                self._start_over()
                self._outputs += self.results.settle()
                raise
            self.books.collected(launched.step, launched.record, begun, computed)
        return outputs

    def _learn(self, launched: _Launched, computed: float) -> None:
        """What a step and the copies beside it took, for the choice between recomputing and swapping."""
        seconds = computed - max(launched.begun, self._last_computed)
        self._last_computed = computed
        cost, host_pool = self.scheduler.preemption.cost, self.runner.host_pool
        if cost is None or host_pool is None:
            return
        if not launched.disturbed and launched.step.num_steps == 1:
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

    def _fail_loads(self, step: ScheduledStep, error: BlocksLostError) -> list[RequestOutput]:
        """Who needs blocks that did not come from the host ends; the others of the step are computed anew."""
        concerned = [
            (request, count)
            for request, count in step.rows
            if any(not error.blocks.isdisjoint(table.ids) for table in request.tables)
        ]
        outputs = self._fail(replace(step, rows=concerned), error)
        self._start_over()
        return outputs

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

    def check_invariants(self) -> None:
        """Asserts the invariants of the engine and everything below it."""
        assert len(self._launched) <= self.overlap, "more steps under way than there may be"
        self.scheduler.check_invariants()
        self.results.check_invariants()
        self.books.check_invariants()
