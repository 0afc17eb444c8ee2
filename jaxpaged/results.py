"""From the tokens of a step to what users get: text, log-probabilities, outputs, ends."""

import contextlib
import logging
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from jaxpaged.beam_generation import BeamGeneration
from jaxpaged.errors import InvalidRequestError
from jaxpaged.generation import Completion, Generation
from jaxpaged.outputs import LogprobArrays, RequestOutput
from jaxpaged.program import PromptLogprobs, StepOutput
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


class Results:
    """The generations under way, and what becomes of their tokens.

    Invariants (``check_invariants``): every unfinished request of the scheduler belongs to exactly one generation in
    ``generations``; a generation leaves when its last completion has finished.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.generations: dict[str, Generation] = {}
        self._homes: dict[Request, tuple[Generation, Completion]] = {}
        self.finished: Counter[str] = Counter()  # completions by finish reason
        self.num_generation_tokens = 0

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
        """Takes in the tokens of a step; returns what there is to show."""
        touched: dict[str, Generation] = {}
        now, scheduler, step, output = time.monotonic(), self._scheduler, arrived.step, arrived.output
        sampled, rows = None, dict[Request, int]()
        if output is not None:
            self._take_prompt_logprobs(step, output.prompt)
            if any(request.params.logprobs is not None for request, _ in step.rows):
                sampled = _on_host(output.sampled)
                rows = {request: i for i, (request, _) in enumerate(step.rows)}
        for column in arrived.tokens:
            for request in scheduler.collect(step, column):
                self._take_token(request, now, touched, sampled, rows.get(request, 0))
        if len(arrived.tokens) > 1:
            for request, _ in step.rows:
                scheduler.publish(request)
        outputs = [self.close_if_done(generation) for generation in touched.values()]
        return [each for each in outputs if each is not None]

    def _take_token(
        self,
        request: Request,
        now: float,
        touched: dict[str, Generation],
        sampled: LogprobArrays | None,
        row: int,
    ) -> None:
        """Text and log-probabilities of a request's newest token; notes in ``touched`` who has something to show."""
        self.num_generation_tokens += 1
        generation, completion = self._homes[request]
        if generation.error is not None:
            return
        try:
            if isinstance(generation, BeamGeneration):
                assert sampled is not None, "a beam without candidates"
                if generation.take(self._scheduler, request, sampled, row, now):
                    self._end_all(generation, RequestStatus.FINISHED_STOPPED)
                    touched[generation.request_id] = generation
                return
            if sampled is not None and request.params.logprobs is not None:
                generation.add_logprobs(completion, row, sampled)
            stop = generation.append(completion, now)
            if stop is not None:
                request.stop_reason = stop
                self._finish(generation, completion, RequestStatus.FINISHED_STOPPED)
            elif request.status.is_finished:
                generation.finish(completion)
            elif generation.shows_only_its_end:
                return
        except Exception as error:
            logger.exception("request %s ends with an error", generation.request_id)
            self.end_with_error(generation, error)
        touched[generation.request_id] = generation

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
        self._end_all(generation, status)
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

    def _drop_forks(self, generation: Generation) -> None:
        """Nobody takes over the prompt of a request whose completions end together."""
        for completion in generation.completions:
            completion.request.forks = []

    def _finish(self, generation: Generation, completion: Completion, status: RequestStatus) -> None:
        self._scheduler.finish(completion.request, status)
        generation.finish(completion)

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
