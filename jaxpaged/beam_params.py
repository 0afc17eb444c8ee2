"""What a caller asks of beam search: ``BeamSearchParams``, with the names of vLLM and of transformers."""

import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from jaxpaged.errors import InvalidRequestError
from jaxpaged.sampling_params import MAX_TOKEN_COUNT, SamplingParams

# Every beam is a sequence of the batch.
MAX_BEAM_WIDTH = 64
# A length to a power within this limit is always a finite float.
LENGTH_PENALTY_LIMIT = 10.0
MAX_DIVERSITY_PENALTY = 1e4


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Beam search options of one prompt; checked when they are built, then unchanging.

    The first five are vLLM's of this name, ``stop_token_ids`` that of ``SamplingParams``, the others those of
    ``GenerationConfig`` in transformers. Log-probabilities are the model's own: there is no ``temperature``.

    beam_width: beams, 1 to 64. max_tokens: most tokens of a hypothesis. ignore_eos: go on after EOS.
    length_penalty: in [-10, 10]; a hypothesis scores its log-probability over (number of tokens) ** length_penalty,
    so above 0 favours long ones. include_stop_str_in_output: show the stop token in the text.
    stop_token_ids: tokens that end a hypothesis as EOS does.
    early_stopping: with ``beam_width`` hypotheses finished, True stops at once, False when no beam could enter them at
    its length of now, "never" when none could at any length (which matters for a positive ``length_penalty``).
    num_return_sequences: hypotheses to return, at most ``beam_width``, None for all of them.
    num_beam_groups: groups that share the beams evenly (diverse beam search, Vijayakumar et al. 2016,
    arXiv:1610.02424). diversity_penalty: in [0, 10000], taken from a token's log-probability for every beam of an
    earlier group that chose this token in the same step.

    Raises InvalidRequestError (a ValueError) naming the argument and its value.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    stop_token_ids: Iterable[int] | None = None  # stored as a tuple
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int | None = None  # stored as an integer
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    def __post_init__(self) -> None:
        self._integer("beam_width", MAX_BEAM_WIDTH)
        self._integer("max_tokens", MAX_TOKEN_COUNT)
        # What both kinds of parameters have in common is checked in one place.
        shared = SamplingParams(
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
            include_stop_str_in_output=self.include_stop_str_in_output,
        )
        self._set("stop_token_ids", shared.stop_token_ids)
        self._real("length_penalty", -LENGTH_PENALTY_LIMIT, LENGTH_PENALTY_LIMIT)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InvalidRequestError("early_stopping", self.early_stopping, "must be True, False or 'never'")
        if self.num_return_sequences is None:
            self._set("num_return_sequences", self.beam_width)
        self._integer("num_return_sequences", self.beam_width)
        self._integer("num_beam_groups", self.beam_width)
        if self.beam_width % self.num_beam_groups:
            raise InvalidRequestError(
                "num_beam_groups", self.num_beam_groups, f"must divide beam_width={self.beam_width}"
            )
        self._real("diversity_penalty", 0.0, MAX_DIVERSITY_PENALTY)
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise InvalidRequestError(
                "diversity_penalty", self.diversity_penalty, "needs num_beam_groups of at least 2"
            )

    @property
    def group_width(self) -> int:
        """Beams of each group."""
        return self.beam_width // self.num_beam_groups

    def validate_for(self, vocab_size: int) -> None:
        """Check what depends on the model; raises InvalidRequestError naming the offending value."""
        for token_id in self.stop_token_ids or ():
            if token_id >= vocab_size:
                raise InvalidRequestError(
                    "stop_token_ids", token_id, f"is not a token id of this model (vocab_size={vocab_size})"
                )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _integer(self, name: str, high: int) -> None:
        value: Any = getattr(self, name)
        is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not is_integer:
            raise InvalidRequestError(name, value, "must be an integer")
        if not 1 <= value <= high:
            raise InvalidRequestError(name, value, f"must be in [1, {high}]")
        self._set(name, int(value))

    def _real(self, name: str, low: float, high: float) -> None:
        value: Any = getattr(self, name)
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number:
            raise InvalidRequestError(name, value, "must be a number")
        if not low <= value <= high:  # also false for NaN
            raise InvalidRequestError(name, value, f"must be in [{low:g}, {high:g}]")
        self._set(name, float(value))
