"""From sampled tokens to outputs: text, log-probabilities and results of the completions of one request."""

from dataclasses import dataclass, field

from jaxpaged.detokenizer import IncrementalDetokenizer
from jaxpaged.outputs import CompletionOutput, Logprob, LogprobArrays, RequestMetrics, RequestOutput
from jaxpaged.request import Request, RequestStatus
from jaxpaged.sampling_params import RequestOutputKind, SamplingParams
from jaxpaged.sampling_rows import BiasRules
from jaxpaged.tokenizer import Tokenizer


@dataclass
class Completion:
    """One of the n sequences of a request, as the user will see it."""

    request: Request
    detokenizer: IncrementalDetokenizer | None  # None: token ids only
    seed: int
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float = 0.0
    delta: list[str] = field(default_factory=list)  # text since the last output
    num_taken_tokens: int = 0  # whose text and log-probabilities are here
    num_shown_tokens: int = 0
    end_was_shown: bool = False

    @property
    def finished(self) -> bool:
        """Whether no more tokens come."""
        return self.request.status.is_finished


class Generation:
    """A request with its n completions, from the first token to the last output."""

    def __init__(
        self,
        requests: list[Request],
        prompt: str | None,
        params: SamplingParams,
        seeds: list[int],
        tokenizer: Tokenizer | None,
        rules: BiasRules | None,
    ) -> None:
        first = requests[0]
        self.requests = requests
        self.request_id = first.request_id
        self.prompt = prompt
        self._selects = params.num_completions > params.n
        self.shows_only_its_end = params.output_kind is RequestOutputKind.FINAL_ONLY or self._selects
        self.prompt_token_ids = first.token_ids[: first.num_prompt_tokens]
        self.params = params
        self.rules = rules
        self.error: Exception | None = None
        self.metrics = RequestMetrics(arrival_time=first.arrival_time)
        self._tokenizer = tokenizer
        self.completions = [
            Completion(
                request,
                IncrementalDetokenizer(tokenizer, self.prompt_token_ids, params)
                if tokenizer is not None and params.detokenize
                else None,
                seed,
                None if params.logprobs is None else [],
            )
            for request, seed in zip(requests, seeds, strict=True)
        ]
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = (
            None if params.prompt_logprobs is None else [None]
        )

    @property
    def finished(self) -> bool:
        """Whether all completions are."""
        return all(completion.finished for completion in self.completions)

    def finish_reasons(self) -> list[str]:
        """Why each completion has ended, once all have."""
        return [completion.request.status.value for completion in self.completions]

    def note_token(self, now: float) -> None:
        """A token has come at ``now``, in seconds of ``time.monotonic``."""
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = now
        self.metrics.last_token_time = now

    def append(self, completion: Completion, now: float) -> str | None:
        """Takes in the newest token of a completion; returns the stop string that ends it, if one does."""
        self.note_token(now)
        ends_by_token = completion.request.status is RequestStatus.FINISHED_STOPPED
        if completion.detokenizer is None or (ends_by_token and not self.params.include_stop_str_in_output):
            return None
        text = completion.detokenizer.append(completion.request.token_ids[-1])
        if text:
            completion.delta.append(text)
        return completion.detokenizer.check_stop()

    def finish(self, completion: Completion) -> None:
        """The completion has ended: what the detokenizer still held back is shown."""
        if completion.detokenizer is None:
            return
        text = completion.detokenizer.flush()
        if text:
            completion.delta.append(text)
        stop, request = completion.detokenizer.check_stop(), completion.request
        if stop is not None and request.status is RequestStatus.FINISHED_LENGTH:
            # The last characters, held back until now, completed a stop string.
            request.status, request.stop_reason = RequestStatus.FINISHED_STOPPED, stop

    def add_logprobs(self, completion: Completion, row: int, sampled: LogprobArrays) -> None:
        """Keeps the log-probabilities of the newest token."""
        completion.cumulative_logprob += float(sampled.logprob[row])
        if completion.logprobs is not None:
            found = sampled.candidates(row, completion.request.token_ids[-1], self.params.logprobs)
            completion.logprobs.append(self._with_text(found))

    def add_prompt_logprobs(self, first: int, count: int, at: int, prompt: LogprobArrays) -> None:
        """Keeps those of the prompt tokens after positions ``first .. first + count - 1`` (``at`` in the batch)."""
        if self.prompt_logprobs is None:
            return
        for offset in range(count):
            position = first + offset + 1
            # A preempted request comes by here again.
            if position != len(self.prompt_logprobs) or position >= len(self.prompt_token_ids):
                continue
            token = self.prompt_token_ids[position]
            found = prompt.candidates(at + offset, token, self.params.prompt_logprobs)
            self.prompt_logprobs.append(self._with_text(found))

    def _with_text(self, found: dict[int, tuple[float, int]]) -> dict[int, Logprob]:
        tokenizer = self._tokenizer if self.params.detokenize else None
        return {
            token: Logprob(
                logprob,
                rank,
                None if tokenizer is None else tokenizer.decode([token], skip_special_tokens=False),
            )
            for token, (logprob, rank) in found.items()
        }

    def output(self) -> RequestOutput | None:
        """What to show after a step, or None when the request wants only its end and that has not come."""
        finished = self.finished
        if self.shows_only_its_end and not finished:
            return None
        outputs = self._completion_outputs()
        return self._with_outputs(outputs, self.completions[0].request.num_cached_tokens) if outputs else None

    def _completion_outputs(self) -> list[CompletionOutput]:
        if self._selects:
            best = sorted(self.completions, key=_rank, reverse=True)[: self.params.n]
            return [self._cumulative_output(completion, place) for place, completion in enumerate(best)]
        if self.params.output_kind is not RequestOutputKind.DELTA:
            return [
                self._cumulative_output(completion, completion.request.index)
                for completion in self.completions
            ]
        outputs = []
        for completion in self.completions:
            is_new = completion.num_shown_tokens != completion.request.num_output_tokens or completion.delta
            if not completion.end_was_shown and (is_new or completion.finished):
                outputs.append(self._delta_output(completion))
        return outputs

    def _with_outputs(self, outputs: list[CompletionOutput], num_cached_tokens: int) -> RequestOutput:
        self.metrics.num_preemptions = sum(request.num_preemptions for request in self.requests)
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            outputs,
            self.finished,
            self.prompt_logprobs,
            num_cached_tokens,
            self.metrics,
            self.error,
        )

    def _cumulative_output(self, completion: Completion, index: int) -> CompletionOutput:
        request, logprobs = completion.request, completion.logprobs
        return CompletionOutput(
            index,
            "" if completion.detokenizer is None else completion.detokenizer.text,
            request.output_token_ids,
            None if logprobs is None else completion.cumulative_logprob,
            None if logprobs is None else list(logprobs),
            _finish_reason(request),
            request.stop_reason,
        )

    def _delta_output(self, completion: Completion) -> CompletionOutput:
        request, logprobs, shown = completion.request, completion.logprobs, completion.num_shown_tokens
        output = CompletionOutput(
            request.index,
            "".join(completion.delta),
            request.token_ids[request.num_prompt_tokens + shown :],
            None if logprobs is None else completion.cumulative_logprob,
            None if logprobs is None else logprobs[shown:],
            _finish_reason(request),
            request.stop_reason,
        )
        completion.delta.clear()
        completion.num_shown_tokens = request.num_output_tokens
        completion.end_was_shown = completion.finished
        return output


def _rank(completion: Completion) -> tuple[bool, bool, float]:
    """What ``best_of`` selects by: the log-probability of what has come to its end, before what was cut short."""
    request = completion.request
    has_ended = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH)
    return has_ended, request.num_output_tokens > 0, completion.cumulative_logprob


def _finish_reason(request: Request) -> str | None:
    return request.status.value if request.status.is_finished else None
