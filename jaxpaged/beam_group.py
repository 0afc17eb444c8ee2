"""The requests of one beam search: which of them are beams, and how they become other beams. Ints and floats only.

Every beam is a ``Request``. Beams of a prompt advance together: one that has caught up is held until all of them have,
then ``BeamSearch`` moves. The first child of a beam goes on in its parent's request. Any other takes the request of a
beam that has no child and forks the parent's block tables; a block is copied only when one of the two writes to it, so
only a partly filled one.
"""

from collections.abc import Sequence
from typing import TypeAlias

from jaxpaged.beam_search import BeamSearch
from jaxpaged.request import Request, RequestStatus
from jaxpaged.scheduler import Scheduler

Candidates: TypeAlias = list[tuple[int, float]]  # token ids and their log-probabilities, most likely first


class BeamGroup:
    """The beams of one search, and the requests that are none just now.

    Invariants (``check_invariants``): ``beams`` are those of the search, in its order, the prompt in front; they and
    the spare requests are all the requests there are; a beam is held exactly while its candidates are known; a spare
    one is in no queue and has no blocks.

    Args:
      search: which has not begun.
      requests: as many as there can be beams, all of the same prompt; the first is to be queued.
    """

    def __init__(self, search: BeamSearch, requests: Sequence[Request]) -> None:
        assert len(requests) == search.params.beam_width, "one request for each beam"
        self.search = search
        self.beams = [requests[0]]
        self._spare = list(requests[1:])
        self._candidates: dict[Request, Candidates] = {}

    def take(self, scheduler: Scheduler, beam: Request, candidates: Candidates) -> bool:
        """Notes the candidates of a beam that is held; with those of all beams, the group moves.

        Returns:
          Whether the search is over; then no beam goes on.
        """
        assert beam in self.beams, "no beam of this group"
        self._candidates[beam] = candidates
        if len(self._candidates) == len(self.beams):
            self._move(scheduler)
        return self.search.is_done

    def _move(self, scheduler: Scheduler) -> None:
        parents = self.beams
        moves = self.search.advance([self._candidates[beam] for beam in parents])
        self._candidates.clear()
        if not moves:
            return  # done: all of them end together
        heirs: dict[int, int] = {}  # by parent, the place of its first child
        for place, move in enumerate(moves):
            heirs.setdefault(move.parent, place)
        losers = [beam for index, beam in enumerate(parents) if index not in heirs]
        # Those that run come first: then no child has to wait for a row.
        idle = sorted(losers, key=lambda beam: beam.row == 0) + self._spare
        self.beams = []
        for place, move in enumerate(moves):
            beam = parents[move.parent]
            if heirs[move.parent] != place:
                beam = idle.pop(0)
                _take_over(scheduler, beam, parents[move.parent])
            self.beams.append(beam)
        for beam, move in zip(self.beams, moves, strict=True):  # after all have taken what their parents had
            beam.token_ids.append(move.token)
            scheduler.held.drop(beam)
            if not beam.row:
                scheduler.waiting.push(beam)
        for beam in idle:
            _retire(scheduler, beam)
        self._spare = idle

    def check_invariants(self) -> None:
        """Asserts the invariants."""
        self.search.check_invariants()
        assert len({*self.beams, *self._spare}) == self.search.params.beam_width, "a request was lost"
        if self.search.is_done:
            return
        for beam, expected in zip(self.beams, self.search.beams, strict=True):
            assert tuple(beam.output_token_ids) == expected.token_ids, "a beam has other tokens than its own"
            assert beam.is_held == (beam in self._candidates), (
                "held without candidates, or the other way round"
            )
        holding = [each for each in self._spare if each.row or each.holds_blocks or each.is_held]
        assert not holding, "a spare request holds something"


def _take_over(scheduler: Scheduler, beam: Request, parent: Request) -> None:
    """``beam`` becomes what ``parent`` is, on the parent's blocks where they are in the pool."""
    space = scheduler.space
    space.release(beam)
    beam.token_ids = list(parent.token_ids)
    beam.block_hashes = list(parent.block_hashes)
    beam.arrival_index = parent.arrival_index
    if space.fork(parent, beam, parent.num_computed_tokens):
        beam.num_published = parent.num_published
        if beam.row:
            scheduler.held.rewritten.append(beam)
    elif beam.row:
        scheduler.leave(beam)  # in the queue it looks for what the prefix cache has of the parent
    if not beam.row:
        beam.status = RequestStatus.WAITING


def _retire(scheduler: Scheduler, beam: Request) -> None:
    """A beam without a child, or a spare request: it holds nothing until it is needed."""
    scheduler.leave(beam)
    scheduler.space.release(beam)
    beam.status = RequestStatus.WAITING
