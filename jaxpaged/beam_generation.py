"""A beam search as the engine and its user see it: candidates of the beams in, hypotheses with their text out."""

import logging

from jaxpaged.beam_group import BeamGroup
from jaxpaged.beam_search import BeamSearch
from jaxpaged.detokenizer import IncrementalDetokenizer
from jaxpaged.generation import Completion, Generation
from jaxpaged.outputs import CompletionOutput, LogprobArrays, RequestOutput
from jaxpaged.request import Request, RequestStatus
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.scheduler import Scheduler
from jaxpaged.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class BeamGeneration(Generation):
    """A beam search; its completions are the beams, its output the hypotheses, best first.

    There is one output, at the end. A search that is cut short gives what it has: the finished hypotheses and the beams
    as they are, ranked together.

    Args:
      requests: of the beams, as for ``BeamGroup``.
      prompt: its text, if it came as text.
      params: how each beam is run.
      search: the search, not begun.
      tokenizer: None for no text.
    """

    def __init__(
        self,
        requests: list[Request],
        prompt: str | None,
        params: SamplingParams,
        search: BeamSearch,
        tokenizer: Tokenizer | None,
    ) -> None:
        super().__init__(requests, prompt, params, [0] * len(requests), tokenizer, None)
        self.group = BeamGroup(search, requests)
        self._num_cached_tokens = 0
        self._outputs: list[CompletionOutput] | None = None

    def take(self, scheduler: Scheduler, beam: Request, sampled: LogprobArrays, row: int, now: float) -> bool:
        """Takes in what a step computed for a beam, ``row`` of ``sampled``; returns whether the search is over."""
        self.note_token(now)
        search = self.group.search
        if search.num_tokens == 0:
            self._num_cached_tokens = beam.num_cached_tokens
        return self.group.take(scheduler, beam, sampled.most_likely(row, search.candidates_needed))

    def finish(self, completion: Completion) -> None:
        """A beam has ended; there is nothing to show of it before all have."""

    def output(self) -> RequestOutput | None:
        """The hypotheses, once the search is over."""
        return self._with_outputs(self._concluded(), self._num_cached_tokens) if self.finished else None

    def finish_reasons(self) -> list[str]:
        """Those of the hypotheses."""
        return [str(output.finish_reason) for output in self._concluded()]

    def _concluded(self) -> list[CompletionOutput]:
        """The outputs; a text that cannot be had is the request's error."""
        if self._outputs is not None:
            return self._outputs
        self._outputs = self._ranked()
        try:
            for completion, output in zip(self.completions, self._outputs, strict=False):
                if completion.detokenizer is not None:
                    output.text = self._text(completion.detokenizer, output)
        except Exception as error:
            logger.exception("request %s ends with an error", self.request_id)
            self.error = error
            for output in self._outputs:
                output.finish_reason = RequestStatus.FINISHED_ERROR.value
        return self._outputs

    def _ranked(self) -> list[CompletionOutput]:
        """Finished hypotheses, and beams if there are any left, best first; without text."""
        search = self.group.search
        cut_short = self.requests[0].status.value
        length = max(1, search.num_tokens) ** search.params.length_penalty
        found = [
            (each.score, each.token_ids, each.cumulative_logprob, str(each.finish_reason), each.stop_reason)
            for each in search.results()
        ]
        found += [
            (beam.score / length, beam.token_ids, beam.cumulative_logprob, cut_short, None)
            for beam in search.beams
        ]
        found.sort(key=lambda each: each[0], reverse=True)
        return [
            CompletionOutput(place, "", list(token_ids), logprob, None, finish_reason, stop_reason)
            for place, (_, token_ids, logprob, finish_reason, stop_reason) in enumerate(found)
        ][: search.params.num_return_sequences]

    def _text(self, detokenizer: IncrementalDetokenizer, output: CompletionOutput) -> str:
        token_ids = output.token_ids
        if output.finish_reason == "stop" and not self.params.include_stop_str_in_output:
            token_ids = token_ids[:-1]
        for token_id in token_ids:
            detokenizer.append(token_id)
        detokenizer.flush()
        return detokenizer.text
