"""Beam search over the candidates of each step: which beams live on, which hypotheses are finished.

Pure host state: it sees tokens and log-probabilities and says by ``Move`` which sequence goes on with which token.
What a move costs is the engine's affair: it forks a block table, so that a beam with k children needs k - 1 forks
and no KV is copied but a partly filled block.

One step for beams of length n, as ``GenerationMixin._beam_search`` of transformers 5 does it:

1. Every token appended to every beam is a continuation, ranked by cumulative log-probability.
2. Continuations among the ``beam_width`` best that end with a stop token are finished hypotheses, scored by
   cumulative log-probability / (n + 1) ** length_penalty: generated tokens only, the stop token counted. (vLLM
   counts the prompt and not the stop token.) The ``beam_width`` best hypotheses are kept.
3. The ``beam_width`` best continuations that do not end are the next beams.
4. At ``max_tokens``, the ``beam_width`` best continuations are all finished and nothing lives on.

Diverse beam search (Vijayakumar et al. 2016, arXiv:1610.02424) does this in groups of beams, one group after the
other, each with its own hypotheses and its own end; tokens that earlier groups chose in the same step rank lower
(Hamming diversity). As in ``_group_beam_search`` of transformers 4, a token that ends a hypothesis counts for nothing
there, and what a beam has paid in penalties stays in its score.
"""

import heapq
import math
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxpaged.beam_params import BeamSearchParams


class Move(NamedTuple):
    """A next beam: the beam at index ``parent`` of the step before, and ``token``."""

    parent: int
    token: int


@dataclass(frozen=True, slots=True)
class Beam:
    """A live sequence: its generated tokens, their log-probability, and ``score``, this less its diversity penalties.

    ``group`` is None only for the prompt, in which all groups begin.
    """

    token_ids: tuple[int, ...] = ()
    cumulative_logprob: float = 0.0
    score: float = 0.0
    group: int | None = None


@dataclass(frozen=True, slots=True)
class BeamHypothesis:
    """A finished sequence: generated tokens, the stop token included.

    ``cumulative_logprob`` is the model's own, in nats; ``score`` is a beam's ``score`` over length ** length_penalty.
    ``finish_reason`` is "stop" or "length", ``stop_reason`` the stop token id that ended it, None for EOS.
    """

    token_ids: tuple[int, ...]
    cumulative_logprob: float
    score: float
    finish_reason: Literal["stop", "length"]
    stop_reason: int | None = None
    group: int = 0


class _Continuation(NamedTuple):
    """A beam and a next token, ordered best first; of equals, the earlier beam's and the likelier token."""

    negated_score: float
    parent: int
    rank: int
    token: int
    logprob: float


class BeamSearch:
    """The beams of one prompt, one step at a time.

    Invariants: all beams have ``num_tokens`` tokens, none of them a stop token; a group has at most ``group_width``
    beams and as many hypotheses, best first; a group that is done has no beam.
    """

    def __init__(
        self, params: BeamSearchParams, eos_token_ids: Iterable[int] = (), max_tokens: int | None = None
    ) -> None:
        """``max_tokens``: what the model's length leaves after the prompt; ``params.max_tokens`` still holds."""
        self.params = params
        self.max_tokens = params.max_tokens if max_tokens is None else min(params.max_tokens, max_tokens)
        assert self.max_tokens >= 1, "no room for a token"
        self.num_tokens = 0
        self._eos_token_ids = frozenset(() if params.ignore_eos else eos_token_ids)
        self._stop_ids = self._eos_token_ids | frozenset(params.stop_token_ids or ())
        self._beams: tuple[Beam, ...] = (Beam(),)
        self._hypotheses: list[list[BeamHypothesis]] = [[] for _ in range(params.num_beam_groups)]
        self._is_group_done = [False] * params.num_beam_groups

    @property
    def num_beams(self) -> int:
        """Sequences to run in the next step: 1 at first, the prompt; 0 when done."""
        return len(self._beams)

    @property
    def beams(self) -> tuple[Beam, ...]:
        """The live beams, in the order of ``advance``'s argument."""
        return self._beams

    @property
    def is_done(self) -> bool:
        """Whether all hypotheses that will be returned are known."""
        return all(self._is_group_done)

    @property
    def candidates_needed(self) -> int:
        """Candidates that ``advance`` needs of each beam for an exact result, or all where the vocabulary is smaller.

        Of one beam, a group of width g takes at most its g best tokens that do not stop. Above the last of these
        can only be stop tokens and tokens that a penalty pushes down: as many as earlier groups have beams.
        """
        penalised = self.params.beam_width - self.params.group_width if self.params.diversity_penalty else 0
        return self.params.group_width + len(self._stop_ids) + penalised

    def advance(self, candidates: Sequence[Sequence[tuple[int, float]]]) -> list[Move]:
        """Take one step; the moves give the next beams in order, and are empty when the search is done.

        ``candidates[i]`` are (token, log-probability) of beam i, most likely first, ``candidates_needed`` of them.
        Tokens of log-probability -inf are never taken, so that there can be fewer beams than ``beam_width``, as
        there also are when a group is done. The best child of a parent keeps its place, ``moves[i].parent == i``,
        for every beam i that has a child, unless there are now only i beams or fewer.
        """
        assert not self.is_done, "the search is done"
        assert len(candidates) == len(self._beams), "one list of candidates for each beam"
        self.num_tokens += 1
        chosen: Counter[int] = Counter()  # by the earlier groups in this step
        children: list[tuple[int, Beam]] = []
        for group, is_done in enumerate(self._is_group_done):
            if is_done:
                continue
            streams = [
                self._continuations(parent, candidates[parent], chosen)
                for parent, beam in enumerate(self._beams)
                if beam.group in (group, None)
            ]
            grown = self._grow(group, heapq.merge(*streams))
            if self.params.diversity_penalty:
                chosen.update(beam.token_ids[-1] for _, beam in grown)
            self._is_group_done[group] = self._ends(group, [beam.score for _, beam in grown])
            if not self._is_group_done[group]:
                children += grown
        children = _in_place(children)
        self._beams = tuple(beam for _, beam in children)
        return [Move(parent, beam.token_ids[-1]) for parent, beam in children]

    def results(self) -> list[BeamHypothesis]:
        """The best hypotheses so far of all groups, best first: ``num_return_sequences``, if there are as many."""
        hypotheses = [hypothesis for group in self._hypotheses for hypothesis in group]
        hypotheses.sort(key=_worst_last)
        return hypotheses[: self.params.num_return_sequences]

    def _continuations(
        self, parent: int, candidates: Sequence[tuple[int, float]], chosen: Counter[int]
    ) -> Iterator[_Continuation]:
        score = self._beams[parent].score
        penalty = self.params.diversity_penalty
        continuations = (
            _Continuation(-(score + logprob - penalty * chosen[token]), parent, rank, token, logprob)
            for rank, (token, logprob) in enumerate(candidates)
            if logprob > -math.inf  # nor NaN
        )
        return iter(sorted(continuations)) if chosen else continuations

    def _grow(self, group: int, continuations: Iterable[_Continuation]) -> list[tuple[int, Beam]]:
        """The next beams of a group with their parents, best first; what stops on the way is recorded."""
        width = self.params.group_width
        grown: list[tuple[int, Beam]] = []
        for place, (negated_score, parent, _, token, logprob) in enumerate(continuations):
            stops = token in self._stop_ids
            if stops and place >= width:
                continue
            beam = self._beams[parent]
            child = Beam((*beam.token_ids, token), beam.cumulative_logprob + logprob, -negated_score, group)
            if stops or self.num_tokens == self.max_tokens:
                self._finish(group, child, stops)
            if not stops:
                grown.append((parent, child))
                if len(grown) == width:
                    break
        return grown

    def _finish(self, group: int, beam: Beam, stops: bool) -> None:
        token = beam.token_ids[-1]
        hypothesis = BeamHypothesis(
            token_ids=beam.token_ids,
            cumulative_logprob=beam.cumulative_logprob,
            score=beam.score / self.num_tokens**self.params.length_penalty,
            finish_reason="stop" if stops else "length",
            stop_reason=token if stops and token not in self._eos_token_ids else None,
            group=group,
        )
        insort(self._hypotheses[group], hypothesis, key=_worst_last)
        del self._hypotheses[group][self.params.group_width :]

    def _ends(self, group: int, scores: Sequence[float]) -> bool:
        """Whether a group stops before the next step; ``scores`` are those of its next beams, best first."""
        if not scores or self.num_tokens == self.max_tokens:
            return True
        hypotheses = self._hypotheses[group]
        if len(hypotheses) < self.params.group_width:
            return False
        if self.params.early_stopping is True:
            return True
        # Log-probabilities only fall; over a positive power of the length they rise again, if the beams get long.
        length_penalty = self.params.length_penalty
        reaches_end = self.params.early_stopping == "never" and length_penalty > 0.0
        length = self.max_tokens if reaches_end else self.num_tokens
        return scores[0] / length**length_penalty <= hypotheses[-1].score

    def check_invariants(self) -> None:
        """Raise AssertionError if the state is inconsistent."""
        width = self.params.group_width
        assert self.num_tokens <= self.max_tokens, "too many tokens"
        assert self.is_done == (not self._beams), "done with beams, or not done without"
        for beam in self._beams:
            assert len(beam.token_ids) == self.num_tokens, "beams of different lengths"
            assert self._stop_ids.isdisjoint(beam.token_ids), "a beam went on after a stop token"
            assert beam.score <= beam.cumulative_logprob + 1e-6 * self.num_tokens, "a penalty that raises"
        for group, hypotheses in enumerate(self._hypotheses):
            members = [beam for beam in self._beams if beam.group == group]
            assert len(members) <= width, "more beams than the group is wide"
            assert len({beam.token_ids for beam in members}) == len(members), "two beams are the same"
            assert not (members and self._is_group_done[group]), "a beam in a group that is done"
            assert len(hypotheses) <= width, "more hypotheses than the group is wide"
            scores = [hypothesis.score for hypothesis in hypotheses]
            assert scores == sorted(scores, reverse=True), "hypotheses are not best first"


def _worst_last(hypothesis: BeamHypothesis) -> float:
    return -hypothesis.score


def _in_place(children: list[tuple[int, Beam]]) -> list[tuple[int, Beam]]:
    """The children reordered, each parent's first at the parent's index where there is such a place."""
    places: list[tuple[int, Beam] | None] = [None] * len(children)
    others = []
    for child in children:
        parent = child[0]
        if parent < len(places) and places[parent] is None:
            places[parent] = child
        else:
            others.append(child)
    rest = iter(others)
    return [next(rest) if child is None else child for child in places]
