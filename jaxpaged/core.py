"""The loop of the engine: schedule, build, execute, update; one step at a time, for all requests at once."""

import contextlib
import logging
import time
from collections import Counter

import numpy as np

from jaxpaged.batch import BatchBuilder
from jaxpaged.errors import InvalidRequestError, UnknownRequestError
from jaxpaged.generation import Completion, Generation
from jaxpaged.outputs import EngineStats, LogprobArrays, RequestOutput
from jaxpaged.program import PromptLogprobs, StepOutput
from jaxpaged.request import Request, RequestStatus
from jaxpaged.runner import Runner
from jaxpaged.sampler import SampleOutput
from jaxpaged.sampling_rows import needs_state, output_counts_row, prompt_mask_row
from jaxpaged.scheduler import ScheduledStep, Scheduler

logger = logging.getLogger(__name__)


class EngineCore:
    """Scheduler, batch builder and runner, and the generations that are under way.

    Invariants: every unfinished request of the scheduler belongs to exactly one generation in ``generations``; a
    generation leaves when its last completion has finished. The builder's line and the sampler's state of a row
    are those of the request in ``_owners``.
    """

    def __init__(
        self, scheduler: Scheduler, builder: BatchBuilder, runner: Runner, *, vocab_size: int
    ) -> None:
        self.scheduler = scheduler
        self.builder = builder
        self.runner = runner
        self.generations: dict[str, Generation] = {}
        self._vocab_size = vocab_size
        self._homes: dict[Request, tuple[Generation, Completion]] = {}
        # Row to (request, its preemptions): who the row's device state was last set for.
        self._owners: dict[int, tuple[Request, int]] = {}
        self._bias_keys: dict[int, object] = {}
        self._stats = EngineStats()
        self._finished: Counter[str] = Counter()

    def add(self, generation: Generation) -> None:
        """Queues a request.

        Raises:
          InvalidRequestError: its id is in use.
        """
        if generation.request_id in self.generations:
            raise InvalidRequestError("request_id", generation.request_id, "is in use by a live request")
        self.generations[generation.request_id] = generation
        for completion in generation.completions:
            self._homes[completion.request] = (generation, completion)
        self.scheduler.add(generation.completions[0].request)
        self._stats.num_prompt_tokens += len(generation.prompt_token_ids)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request now; returns its last output.

        Raises:
          UnknownRequestError: no live request has this id.
        """
        generation = self.generations.get(request_id)
        if generation is None:
            raise UnknownRequestError("request_id", request_id, "no live request has this id")
        for completion in generation.completions:
            completion.request.forks = []
        for completion in generation.completions:
            if not completion.finished:
                self._finish(generation, completion, RequestStatus.FINISHED_ABORTED)
        logger.info("request %s aborted", request_id)
        return self._close_if_done(generation)

    def step(self) -> list[RequestOutput]:
        """Runs one step; returns what is new, at most one output a request."""
        begun = time.perf_counter()
        step = self.scheduler.schedule()
        scheduled = time.perf_counter()
        if not step.rows:
            return []
        try:
            self._prepare_rows(step)
            bucket, buffer = self.builder.build(step)
            built = time.perf_counter()
            if step.copies:
                self.runner.copy_blocks(step.copies)
            output = None
            if step.num_steps == 1:
                output = self.runner.execute(bucket, buffer)
                tokens = [np.asarray(output.sampled.tokens).tolist()]
            else:
                tokens = np.asarray(self.runner.execute_decode_steps(bucket, buffer, step.num_steps)).tolist()
        except Exception as error:
            return self._fail(step, error)
        except BaseException:
            # Somebody interrupted us: the step has not happened, and nothing it was to write may be relied on.
            self._recover_state()
            self._start_over()
            raise
        computed = time.perf_counter()
        outputs = self._update(step, output, tokens)
        stats = self._stats
        stats.num_steps += step.num_steps
        stats.num_tokens += step.num_tokens * step.num_steps
        stats.num_padded_tokens += (bucket - step.num_tokens) * step.num_steps
        stats.schedule_time += scheduled - begun
        stats.build_time += built - scheduled
        stats.device_time += computed - built
        stats.update_time += time.perf_counter() - computed
        return outputs

    def _prepare_rows(self, step: ScheduledStep) -> None:
        """Brings the builder and the sampler's state up to date for rows that changed hands."""
        for request in step.rewritten:
            self.builder.rewrite_row(request.row)
        for request, _ in step.rows:
            row = request.row
            owner = self._owners.get(row)
            if owner is None or owner[0] is not request or owner[1] != request.num_preemptions:
                self._bind_row(request)
            if row in self._bias_keys:
                self._sync_bias(request)

    def _bind_row(self, request: Request) -> None:
        row, generation = request.row, self.generations[request.request_id]
        self._owners[row] = (request, request.num_preemptions)
        self._bias_keys.pop(row, None)
        self.builder.clear_row(row)
        self.builder.sampling.set(row, request.params, generation.completions[request.index].seed)
        if generation.metrics.first_scheduled_time is None:
            generation.metrics.first_scheduled_time = time.monotonic()
        if not needs_state(request.params):
            return
        prompt = request.token_ids[: request.num_prompt_tokens]
        bias = None if generation.rules is None else generation.rules.row(request.output_token_ids)
        self.runner.set_sampler_row(
            row,
            output_counts_row(request.output_token_ids, self._vocab_size),
            prompt_mask_row(prompt, self._vocab_size),
            np.zeros(self._vocab_size, np.float32) if bias is None else bias,
        )
        self.builder.sampling.set_bias(row, bias is not None)
        if generation.rules is not None:
            self._bias_keys[row] = generation.rules.key(request.output_token_ids)

    def _sync_bias(self, request: Request) -> None:
        rules = self.generations[request.request_id].rules
        assert rules is not None, "a bias key without rules"
        outputs = request.output_token_ids
        key = rules.key(outputs)
        if key == self._bias_keys[request.row]:
            return
        self._bias_keys[request.row] = key
        bias = rules.row(outputs)
        if bias is not None:
            self.runner.set_sampler_bias(request.row, bias)
        self.builder.sampling.set_bias(request.row, bias is not None)

    def _update(
        self, step: ScheduledStep, output: StepOutput | None, tokens: list[list[int]]
    ) -> list[RequestOutput]:
        """Tokens to requests, text to completions, outputs to the caller; ``tokens`` has one list a step."""
        touched: dict[str, Generation] = {}
        now = time.monotonic()
        if output is not None:
            self._take_prompt_logprobs(step, output.prompt)
            wants_logprobs = any(request.params.logprobs is not None for request, _ in step.rows)
            sampled = _on_host(output.sampled) if wants_logprobs else None
            rows = {request: i for i, (request, _) in enumerate(step.rows)} if wants_logprobs else {}
            for request in self.scheduler.update(step, tokens[0]):
                self._take_token(request, now, touched, sampled, rows.get(request, 0))
        else:
            for column in tokens:
                # Who ended at an earlier token of this program computes no further ones.
                alive = [i for i, (request, _) in enumerate(step.rows) if not request.status.is_finished]
                part = ScheduledStep(rows=[step.rows[i] for i in alive])
                for request in self.scheduler.update(part, [column[i] for i in alive]):
                    self._take_token(request, now, touched)
            self.scheduler.publish(step)
        outputs = (self._close_if_done(generation) for generation in touched.values())
        return [output for output in outputs if output is not None]

    def _take_token(
        self,
        request: Request,
        now: float,
        touched: dict[str, Generation],
        sampled: LogprobArrays | None = None,
        row: int = 0,
    ) -> None:
        """Text and log-probabilities of a request's newest token; notes in ``touched`` who has something to show."""
        self._stats.num_generation_tokens += 1
        generation, completion = self._homes[request]
        if generation.error is not None:
            return
        try:
            if sampled is not None and completion.logprobs is not None:
                generation.add_logprobs(completion, row, sampled)
            stop = generation.append(completion, now)
            if stop is not None:
                request.stop_reason = stop
                self._finish(generation, completion, RequestStatus.FINISHED_STOPPED)
            elif request.status.is_finished:
                self._note_finish(generation, completion)
            elif generation.shows_only_its_end:
                return
        except Exception as error:
            logger.exception("request %s ends with an error", generation.request_id)
            self._end_with_error(generation, error)
        touched[generation.request_id] = generation

    def _take_prompt_logprobs(self, step: ScheduledStep, prompt: PromptLogprobs) -> None:
        if not any(request.needs_all_logits for request, _ in step.rows):
            return
        arrays = _on_host(prompt)
        at = 0
        for request, count in step.rows:
            if request.needs_all_logits:
                generation = self.generations[request.request_id]
                generation.add_prompt_logprobs(request.num_computed_tokens, count, at, arrays)
            at += count

    def _finish(self, generation: Generation, completion: Completion, status: RequestStatus) -> None:
        self.scheduler.finish(completion.request, status)
        self._note_finish(generation, completion)

    def _note_finish(self, generation: Generation, completion: Completion) -> None:
        """The scheduler has ended the request; the rest of its text comes out."""
        generation.finish(completion)
        self._finished[completion.request.status.value] += 1

    def _close_if_done(self, generation: Generation) -> RequestOutput | None:
        if generation.finished:
            del self.generations[generation.request_id]
            for completion in generation.completions:
                del self._homes[completion.request]
        return generation.output()

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
            self._end_with_error(generation, error)
            outputs.append(self._close_if_done(generation))
        return [output for output in outputs if output is not None]

    def _end_with_error(self, generation: Generation, error: Exception) -> None:
        """Ends all completions of a request that have not ended before."""
        generation.error = error
        for completion in generation.completions:
            completion.request.forks = []
        for completion in generation.completions:
            if not completion.finished:
                self.scheduler.finish(completion.request, RequestStatus.FINISHED_ERROR)
            if completion.request.status is RequestStatus.FINISHED_ERROR:
                self._finished[RequestStatus.FINISHED_ERROR.value] += 1
                with contextlib.suppress(Exception):  # it may be the text that failed
                    generation.finish(completion)

    def _recover_state(self) -> bool:
        """A new pool when a program that failed had already taken the old one; whether that was so."""
        if lost := self.runner.state_is_lost:
            self.runner.reset_state()
        return lost

    def _start_over(self) -> None:
        """Every request is computed anew: what the pool holds is not to be relied on."""
        self.scheduler.restart()
        self._owners.clear()

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        space, scheduler, runner = self.scheduler.space, self.scheduler, self.runner
        stats, allocator = self._stats, self.scheduler.space.allocator
        stats.num_requests_running = len(scheduler.running)
        stats.num_requests_waiting = len(scheduler.waiting)
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
        stats.finished = dict(self._finished)
        return EngineStats(**{name: getattr(stats, name) for name in EngineStats.__dataclass_fields__})

    def check_invariants(self) -> None:
        """Asserts the invariants of the engine and everything below it."""
        self.scheduler.check_invariants()
        for request in self.scheduler.requests():
            generation = self.generations.get(request.request_id)
            assert generation is not None, "a request without a generation"
            assert generation.completions[request.index].request is request, "a request of another generation"
        assert all(not g.finished for g in self.generations.values()), "a finished generation is still here"


def _on_host(found: SampleOutput | PromptLogprobs) -> LogprobArrays:
    arrays = (found.logprob, found.rank, found.top_ids, found.top_logprobs)
    return LogprobArrays(*(np.asarray(array) for array in arrays))
