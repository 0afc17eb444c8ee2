"""Beam search in plain lists over whole vocabularies, to compare with."""

import math
from collections.abc import Callable

from jaxpaged.beam_params import BeamSearchParams

type Model = Callable[[tuple[int, ...]], list[float]]  # generated tokens to log-probabilities of the next one


class Reference:
    """The search of transformers in plain lists: whole vocabularies, everything sorted, nothing left out."""

    def __init__(self, model: Model, params: BeamSearchParams, stops: set[int]) -> None:
        self.model, self.params, self.stops = model, params, stops
        self.width = params.beam_width // params.num_beam_groups
        self.running: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())]] * params.num_beam_groups
        self.finished: list[list[tuple[float, tuple[int, ...]]]] = [[] for _ in self.running]
        self.length = 0

    def advance(self) -> None:
        self.length += 1
        chosen: list[int] = []
        for group, running in enumerate(self.running):
            ranked = sorted(
                (
                    (score + logprob - self.params.diversity_penalty * chosen.count(token), (*tokens, token))
                    for score, tokens in running
                    for token, logprob in enumerate(self.model(tokens))
                    if logprob > -math.inf
                ),
                reverse=True,
            )
            at_end = self.length == self.params.max_tokens
            for score, tokens in ranked[: self.width]:
                if tokens[-1] in self.stops or at_end:
                    normalised = score / self.length**self.params.length_penalty
                    self.finished[group].append((normalised, tokens))
            self.finished[group] = sorted(self.finished[group], reverse=True)[: self.width]
            going_on = [entry for entry in ranked if entry[1][-1] not in self.stops][: self.width]
            chosen += [tokens[-1] for _, tokens in going_on]
            is_over = at_end or not going_on or not self.can_improve(group, going_on[0][0])
            self.running[group] = [] if is_over else going_on

    def results(self) -> list[tuple[float, tuple[int, ...]]]:
        """Scores and generated tokens, best first; of equals, those of the earlier group."""
        ranked = [
            (-score, group, tokens) for group, found in enumerate(self.finished) for score, tokens in found
        ]
        return [(-negated, tokens) for negated, _, tokens in sorted(ranked)]

    def can_improve(self, group: int, best: float) -> bool:
        if len(self.finished[group]) < self.width:
            return True
        if self.params.early_stopping is True:
            return False
        longest = self.length
        if self.params.early_stopping == "never" and self.params.length_penalty > 0:
            longest = self.params.max_tokens
        return best / longest**self.params.length_penalty > self.finished[group][-1][0]
