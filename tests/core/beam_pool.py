"""Simulated memory for beams, which change blocks and tokens between steps: slots hold token prefixes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxpaged.request import Request
from jaxpaged.scheduler import ScheduledStep, Scheduler

Content = tuple[str | None, tuple[int, ...]]


def content_of(request: Request, position: int) -> Content:
    """What the slot of a position must hold: the prefix decides key and value, the salt who may see them."""
    return request.cache_salt, tuple(request.token_ids[: position + 1])


@dataclass
class PoolModel:
    """Simulated device memory of one scheduler; its methods assert."""

    scheduler: Scheduler
    slots: dict[int, Content] = field(default_factory=dict)
    # By id(request): the positions that were computed since it last lost its blocks.
    computed: dict[int, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tables: dict[int, set[int]] = {}
        self._waiting_with_blocks: dict[int, int] = {}

    def before(self) -> None:
        """To be called before ``schedule``: who holds what now."""
        requests = list(self.scheduler.requests())
        self._tables = {id(r): set(r.table.ids) for r in requests}
        self._waiting_with_blocks = {
            id(r): r.num_prompt_tokens for r in requests if r.table.ids and not r.row
        }

    def check_plan(self, step: ScheduledStep) -> None:
        """What a step promises before it runs: sizes, places, no work done twice."""
        scheduler, size = self.scheduler, self.scheduler.space.block_size
        assert len(step.rows) <= scheduler.max_num_seqs
        assert step.num_tokens == sum(count for _, count in step.rows) <= scheduler.max_num_batched_tokens
        assert len({id(r) for r, _ in step.rows}) == len(step.rows), "a request is in a step twice"
        assert len({r.row for r, _ in step.rows} - {0}) == len(step.rows), "two requests in one row"
        for request in step.preempted:
            assert request.row == 0
            assert not request.table.ids, "a preempted request keeps blocks"
            self.computed.pop(id(request), None)
        for request, count in step.rows:
            assert 1 <= count <= request.num_tokens - request.num_computed_tokens
            assert request.table.capacity >= request.num_computed_tokens + count
            assert all(0 < block < scheduler.space.num_blocks for block in request.table)
            assert len(request.table) == -(-(request.num_computed_tokens + count) // size), "too many blocks"
            self._check_first_position(request)
        self._check_writers(step)
        holders = Counter(block for request in scheduler.requests() for block in request.table)
        scheduler.space.allocator.check_invariants(dict(holders))

    def _check_first_position(self, request: Request) -> None:
        first = request.num_computed_tokens
        mine = self.computed.get(id(request))
        if mine:
            assert first == max(mine) + 1, "a token is skipped or computed twice"
            return
        # A fork that waits with its parent's blocks begins at its last prompt token, unless it lost them again.
        begins_as_fork = first == self._waiting_with_blocks.get(id(request), 0) - 1
        assert begins_as_fork or first % self.scheduler.space.block_size == 0, "half a block is cached"

    def _check_writers(self, step: ScheduledStep) -> None:
        """Nobody who held a block before this step, and still does, has it written by somebody else."""
        size = self.scheduler.space.block_size
        written: Counter[int] = Counter()
        for request, count in step.rows:
            first = request.num_computed_tokens
            blocks = set(request.table.ids[first // size : (first + count - 1) // size + 1])
            written.update(request.table.slot(p) for p in range(first, first + count))
            for other in self.scheduler.requests():
                if other is not request:
                    kept = set(other.table.ids) & self._tables.get(id(other), set())
                    assert not kept & blocks, f"{request} writes to a block of {other}"
        assert all(times == 1 for times in written.values()), "two tokens in one slot"
        targets = [target for _, target in step.copies]
        assert len(set(targets)) == len(targets), "two copies to one block"
        seen: set[int] = set()
        for source, target in step.copies:
            assert source not in seen, "copies depend on the order in which they run"
            assert 0 not in (source, target)
            seen.add(target)

    def run(self, step: ScheduledStep) -> None:
        """Executes a step: copies, then writes; afterwards every computed token must be readable."""
        size = self.scheduler.space.block_size
        moved = {
            target * size + i: self.slots.get(source * size + i)
            for source, target in step.copies
            for i in range(size)
        }
        for slot, content in moved.items():
            self.slots.pop(slot, None)
            if content is not None:
                self.slots[slot] = content
        for request, count in step.rows:
            for position in range(request.num_computed_tokens, request.num_computed_tokens + count):
                self.slots[request.table.slot(position)] = content_of(request, position)
                self.computed.setdefault(id(request), set()).add(position)
        running = {id(request): count for request, count in step.rows}
        for request in self.scheduler.requests():
            self._check_readable(request, request.num_computed_tokens + running.get(id(request), 0))

    def check(self) -> None:
        """All that any unfinished request counts as computed is there; cached blocks are full of one prefix."""
        for request in self.scheduler.requests():
            self._check_readable(request, request.num_computed_tokens)

    def _check_readable(self, request: Request, num_tokens: int) -> None:
        for position in range(num_tokens):
            found, wanted = self.slots.get(request.table.slot(position)), content_of(request, position)
            assert found == wanted, f"{request}: position {position} holds {found}, not {wanted}"

    def lose(self) -> None:
        """The device lost everything."""
        self.slots.clear()
        self.computed.clear()

    def forget(self, requests: Iterable[Request]) -> None:
        """These have finished."""
        for request in requests:
            assert request.status.is_finished
            assert not request.table.ids, "a finished request keeps blocks"
            self.computed.pop(id(request), None)
