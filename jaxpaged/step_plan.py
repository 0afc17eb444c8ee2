"""What the scheduler hands on: the plan of one step, ints and requests only."""

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxpaged.request import Request


class MoveKind(enum.Enum):
    """What is done to a block before a step runs."""

    COPY = "copy"  # block to block, for copy on write
    SWAP_OUT = "swap_out"  # block to host block
    SWAP_IN = "swap_in"  # host block to block


class Move(NamedTuple):
    """One block on its way. Moves happen in the order in which they were planned, all before the step."""

    kind: MoveKind
    source: int
    target: int


@dataclass
class ScheduledStep:
    """What one step computes. ``rows`` pairs each request with its number of tokens, in batch order."""

    rows: list[tuple[Request, int]] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    rewritten: list[Request] = field(default_factory=list)  # running requests whose tables these change
    grown: list[Request] = field(default_factory=list)  # running requests whose tables may have become longer
    preempted: list[Request] = field(default_factory=list)
    published: list[int] = field(default_factory=list)  # blocks this step makes findable
    num_tokens: int = 0
    num_admitted: int = 0  # requests that did not run before
    num_steps: int = 1  # more: every row decodes so many tokens, one after the other, in one program
    # Filled by ``Scheduler.advance``: the rows that sample, and each row's first position.
    sampling: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    @property
    def copies(self) -> list[tuple[int, int]]:
        """The copies on write among the moves: (source, target)."""
        return [(move.source, move.target) for move in self.moves if move.kind is MoveKind.COPY]
