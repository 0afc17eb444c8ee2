"""From the tokens of a step to what users get: text, log-probabilities, outputs, ends."""

import contextlib
import logging
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from jaxpaged.beam_generation import BeamGeneration
from jaxpaged.errors import InvalidRequestError
from jaxpaged.generation import Completion, Generation
from jaxpaged.outputs import LogprobArrays, RequestOutput
from jaxpaged.program import PromptLogprobs, StepOutput
from jaxpaged.records import Records, RequestRecord
from jaxpaged.request import Request, RequestStatus
from jaxpaged.sampler import SampleOutput
from jaxpaged.scheduler import Scheduler
from jaxpaged.step_plan import ScheduledStep

logger = logging.getLogger(__name__)


@dataclass
class StepTokens:
    """What a step brought, on the host: ``tokens`` has one list for each of its decode steps, one token a row.

    ``output`` is that of a step that is not several in one, still on the device.
    """

    step: ScheduledStep
    output: StepOutput | None
    tokens: list[list[int]]


@dataclass
class _Taking:
    """How far ``Results.take`` has come."""

    step: ScheduledStep
    now: float = field(default_factory=time.monotonic)
    sampled: LogprobArrays | None = None
    touched: dict[str, Generation] = field(default_factory=dict)
    outputs: list[RequestOutput] = field(default_factory=list)


class Results:
    """The generations under way, and what becomes of their tokens.

    Invariants (``check_invariants``): every unfinished request of the scheduler belongs to exactly one generation in
    ``generations``; a generation leaves when its last completion has finished; each completion that finishes is
    recorded once.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.generations: dict[str, Generation] = {}
        self._homes: dict[Request, tuple[Generation, Completion]] = {}
        self._taking = _Taking(ScheduledStep())
        self.finished: Counter[str] = Counter()  # completions by finish reason
        self.num_generation_tokens = 0
        self.records = Records()

    def add(self, generation: Generation) -> None:
        """Takes a generation in.

        Raises:
          InvalidRequestError: its id is in use.
        """
        if generation.request_id in self.generations:
            raise InvalidRequestError("request_id", generation.request_id, "is in use by a live request")
        self.generations[generation.request_id] = generation
        for completion in generation.completions:
            self._homes[completion.request] = (generation, completion)

    def home(self, request: Request) -> Generation:
        """The generation that a request belongs to."""
        return self._homes[request][0]

    def take(self, arrived: StepTokens) -> list[RequestOutput]:
        """Takes in the tokens of a step; returns what there is to show. After an interrupt comes ``settle``."""
        scheduler, step, output = self._scheduler, arrived.step, arrived.output
        self._taking = taking = _Taking(step)
        rows = dict[Request, int]()
        if output is not None:
            self._take_prompt_logprobs(step, output.prompt)
            if any(request.params.logprobs is not None for request, _ in step.rows):
                taking.sampled = _on_host(output.sampled)
                rows = {request: i for i, (request, _) in enumerate(step.rows)}
        for column in arrived.tokens:
            for request in scheduler.collect(step, column):
                self._take_token(request, taking, rows.get(request, 0))
        if len(arrived.tokens) > 1:
            for request, _ in step.rows:
                scheduler.publish(request)
        return self._close(taking)

    def settle(self) -> list[RequestOutput]:
        """Ends a ``take`` that was interrupted: takes in what requests had got by then; they get the rest anew."""
        taking = self._taking
        for row, (request, _) in enumerate(taking.step.rows):
            home = self._homes.get(request)
            if (
                home is not None
                and not request.is_beam
                and home[1].num_taken_tokens < request.num_output_tokens
            ):
                self._take_token(request, taking, row)
        return self._close(taking)

    def _close(self, taking: _Taking) -> list[RequestOutput]:
        """What there is to show of the generations that a step has touched, which leave if they have finished."""
        for name, generation in list(taking.touched.items()):
            output = self.close_if_done(generation)
            if output is not None:
                taking.outputs.append(output)
            del taking.touched[name]
        return taking.outputs

    def _take_token(self, request: Request, taking: _Taking, row: int) -> None:
        """Text and log-probabilities of a request's newest token; notes who has something to show."""
        self.num_generation_tokens += 1
        generation, completion = self._homes[request]
        if generation.error is not None:
            return
        try:
            if isinstance(generation, BeamGeneration):
                assert taking.sampled is not None, "a beam without candidates"
                if generation.take(self._scheduler, request, taking.sampled, row, taking.now):
                    self._end_all(generation, RequestStatus.FINISHED_STOPPED)
                    taking.touched[generation.request_id] = generation
                return
            if taking.sampled is not None and request.params.logprobs is not None:
                generation.add_logprobs(completion, row, taking.sampled)
            stop = generation.append(completion, taking.now)
            completion.num_taken_tokens += 1
            if stop is not None:
                request.stop_reason = stop
                self._finish(generation, completion, RequestStatus.FINISHED_STOPPED)
            elif request.status.is_finished:
                self._note_finish(generation, completion)
            elif generation.shows_only_its_end:
                return
        except Exception as error:
            logger.exception("request %s ends with an error", generation.request_id)
            self.end_with_error(generation, error)
        taking.touched[generation.request_id] = generation

    def _take_prompt_logprobs(self, step: ScheduledStep, prompt: PromptLogprobs) -> None:
        if not any(request.needs_all_logits for request, _ in step.rows):
            return
        arrays = _on_host(prompt)
        at = 0
        for (request, count), start in zip(step.rows, step.starts, strict=True):
            if request.needs_all_logits and not request.status.is_finished:
                self.home(request).add_prompt_logprobs(start, count, at, arrays)
            at += count

    def end(self, generation: Generation, status: RequestStatus) -> RequestOutput | None:
        """Ends all completions of a request that have not ended before; returns its last output."""
        try:
            self._end_all(generation, status)
        except Exception as error:  # the rest of its text could not be made
            logger.exception("request %s ends with an error", generation.request_id)
            self.end_with_error(generation, error)
        return self.close_if_done(generation)

    def _end_all(self, generation: Generation, status: RequestStatus) -> None:
        self._drop_forks(generation)
        for completion in generation.completions:
            if not completion.finished:
                self._finish(generation, completion, status)

    def end_with_error(self, generation: Generation, error: Exception) -> None:
        """Ends them because of an error, which may be that of their text."""
        generation.error = error
        self._drop_forks(generation)
        for completion in generation.completions:
            if not completion.finished:
                self._scheduler.finish(completion.request, RequestStatus.FINISHED_ERROR)
            if completion.request.status is RequestStatus.FINISHED_ERROR:
                with contextlib.suppress(Exception):  # it may be the text that failed
                    generation.finish(completion)
                self._record(generation, completion)

    def _drop_forks(self, generation: Generation) -> None:
        """Nobody takes over the prompt of a request whose completions end together."""
        for completion in generation.completions:
            completion.request.forks = []

    def _finish(self, generation: Generation, completion: Completion, status: RequestStatus) -> None:
        self._scheduler.finish(completion.request, status)
        self._note_finish(generation, completion)

    def _note_finish(self, generation: Generation, completion: Completion) -> None:
        """The scheduler has ended the request; the rest of its text comes out."""
        try:
            generation.finish(completion)
        finally:
            self._record(generation, completion)

    def _record(self, generation: Generation, completion: Completion) -> None:
        request, metrics = completion.request, generation.metrics
        self.records.add_request(
            RequestRecord.from_metrics(
                request.request_id,
                index=request.index,
                arrival_time=metrics.arrival_time,
                first_scheduled_time=metrics.first_scheduled_time,
                first_token_time=metrics.first_token_time,
                last_token_time=metrics.last_token_time,
                finished_time=time.monotonic(),
                num_prompt_tokens=request.num_prompt_tokens,
                num_cached_tokens=request.num_cached_tokens,
                num_generation_tokens=request.num_output_tokens,
                num_preemptions=request.num_preemptions,
                finish_reason=request.status.value,
            )
        )

    def close_if_done(self, generation: Generation) -> RequestOutput | None:
        """What to show of a generation, which leaves if it has finished."""
        output = generation.output()
        if generation.finished:
            self.finished.update(generation.finish_reasons())
            del self.generations[generation.request_id]
            for request in generation.requests:
                del self._homes[request]
        return output

    def check_invariants(self) -> None:
        """Asserts the invariants."""
        for request in self._scheduler.requests():
            generation = self.generations.get(request.request_id)
            assert generation is not None, "a request without a generation"
            assert generation.completions[request.index].request is request, "a request of another generation"
        for generation in self.generations.values():
            assert not generation.finished, "a finished generation is still here"
            if isinstance(generation, BeamGeneration):
                generation.group.check_invariants()


def _on_host(found: SampleOutput | PromptLogprobs) -> LogprobArrays:
    arrays = (found.logprob, found.rank, found.top_ids, found.top_logprobs)
    return LogprobArrays(*(np.asarray(array) for array in arrays))
