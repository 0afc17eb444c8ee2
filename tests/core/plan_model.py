"""What a plan must promise before it runs: sizes, places, no work left out or done twice, nobody's block written."""

from collections import Counter
from itertools import groupby

from jaxpaged.memory_monitor import MemoryLevel
from jaxpaged.preemption import MAX_PREEMPTIONS
from jaxpaged.request import Request, RequestStatus
from jaxpaged.scheduler import ScheduledStep, Scheduler
from jaxpaged.step_plan import Move, MoveKind


class PlanModel:
    """Follows how far each request has come, and checks every step of one scheduler against it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.num_moves: Counter[MoveKind] = Counter()
        # Tokens computed of what it holds, here or on the host; or by its parent, when it was forked.
        self.progress: dict[Request, int] = {}
        self._was_running: set[Request] = set()
        self._may_be_released: set[Request] = set()
        self._held: dict[Request, set[int]] = {}
        self._tables: dict[Request, list[list[int]]] = {}
        self._pinned: set[tuple[int, bytes | None]] = set()

    def before(self) -> None:
        """To be called before ``schedule``: who holds what now."""
        requests = list(self.scheduler.requests())
        self._was_running = set(self.scheduler.running)
        self._may_be_released = {r for r in requests if r.holds_blocks and not r.row}
        self._held = {r: blocks_of(r) for r in requests}
        self._tables = {r: [list(table.ids) for table in r.tables] for r in self._was_running}
        self._pinned = self._pinned_now()

    def check(self, step: ScheduledStep) -> None:
        """To be called after ``schedule``."""
        scheduler = self.scheduler
        assert len(step.rows) <= scheduler.max_num_seqs
        assert step.num_tokens == sum(count for _, count in step.rows) <= scheduler.max_num_batched_tokens
        assert len({id(r) for r, _ in step.rows}) == len(step.rows), "a request is in a step twice"
        assert len({r.row for r, _ in step.rows} - {0}) == len(step.rows), "two requests in one row"
        for request in step.preempted:
            self._check_preempted(request)
        for request in self._may_be_released:
            if not request.holds_blocks:
                self.progress.pop(request, None)
        self._check_notes(step)
        for request, count in step.rows:
            self._check_first_position(request)
            self._check_tables(request, request.num_computed_tokens + count + step.num_steps - 1)
            known = request.num_tokens + request.num_pending
            assert 1 <= count <= known - request.num_computed_tokens
            assert known < request.max_total_tokens or not request.num_pending, "its last token is on the way"
            assert not (request.needs_tokens_on_host and request.num_pending), "a step ahead of its tokens"
            if step.num_steps > 1:
                assert step.num_steps == scheduler.num_scheduler_steps
                assert count == 1
                assert known == request.num_computed_tokens + 1, "several steps of a row that lags behind"
                assert known + step.num_steps <= request.max_total_tokens, "more tokens than it may have"
                assert not request.needs_single_steps
        self._check_left_out(step)
        self._check_writers(step)
        self._check_moves(step.moves)

    def _check_left_out(self, step: ScheduledStep) -> None:
        """Who runs and has something to compute does so, until the tokens of the step are used up."""
        scheduler, rows = self.scheduler, {request for request, _ in step.rows}
        if (
            self._was_running
            and scheduler.monitor is not None
            and scheduler.monitor.level is not MemoryLevel.NORMAL
        ):
            assert rows <= self._was_running, "a newcomer while memory is short"
        budget = scheduler.max_num_batched_tokens
        for request in scheduler.running:
            known = request.num_tokens + request.num_pending
            is_done = request.num_pending > 0 and known >= request.max_total_tokens
            if request not in rows and not is_done and request.num_computed_tokens < known:
                used_up = step.num_tokens >= (budget if scheduler.monitor is None else budget // 2)
                assert used_up, f"{request} is left out"

    def _check_preempted(self, request: Request) -> None:
        assert request.row == 0
        assert not request.holds_blocks, "a preempted request keeps blocks"
        is_swapped = request.host_tables is not None
        assert request.status is (RequestStatus.SWAPPED if is_swapped else RequestStatus.PREEMPTED)
        if request.host_tables is None:
            self.progress.pop(request, None)
        for window, blocks in zip(self.scheduler.space.windows, request.host_tables or (), strict=False):
            unseen = 0 if window is None else max(0, request.num_computed_tokens - window + 1)
            behind = blocks[: unseen // self.scheduler.space.block_size]
            assert not any(block >= 0 for block in behind), "keeps a block behind its window on the host"
        if request.num_preemptions > MAX_PREEMPTIONS:
            # Those that run now ran then: nobody is admitted in a step that preempts.
            others = [r for r in self.scheduler.running if r.num_preemptions < MAX_PREEMPTIONS]
            assert not others, (
                f"{request} gave way for the {request.num_preemptions}th time instead of {others}"
            )

    def _check_notes(self, step: ScheduledStep) -> None:
        """The builder of the batch is told whose tables became longer, or changed in the middle."""
        for request, _ in step.rows:
            tables, before = [table.ids for table in request.tables], self._tables.get(request)
            if before is None or len(tables[0]) > len(before[0]):
                assert request in step.grown, "a table became longer and nobody says so"
            changed = before is not None and any(
                new not in (old, 0)
                for ids, old_ids in zip(tables, before, strict=True)
                for new, old in zip(ids, old_ids, strict=False)
            )
            assert not changed or request in step.rewritten, "a table changed and nobody says so"

    def _check_first_position(self, request: Request) -> None:
        first, known = request.num_computed_tokens, self.progress.get(request)
        if request in self._was_running:
            assert first == known, "a token is skipped or computed twice"
            return
        has_run = request.num_preemptions > 0
        assert first == 0 or has_run or not request.needs_all_logits, "logits of the prompt are left out"
        if first != known:
            # It begins with what the cache has. Only forks that wait may lose what they had.
            assert known is None or request in self._may_be_released, "lost what it had computed"
            assert first % self.scheduler.space.block_size == 0, "half a block is cached"
            assert first == 0 or self.scheduler.space.enable_prefix_caching, "found without a cache"

    def _check_tables(self, request: Request, end: int) -> None:
        """As many blocks as ``end`` tokens need, and none that lies behind a window for long."""
        space, first = self.scheduler.space, request.num_computed_tokens
        chunk = max(self.scheduler.max_num_batched_tokens, self.scheduler.num_scheduler_steps)
        for window, table in zip(space.windows, request.tables, strict=True):
            assert len(table) == -(-end // space.block_size), "too many blocks, or too few"
            needed = 0 if window is None else max(0, first - window + 1) // space.block_size
            assert all(0 < block < space.num_blocks for block in table.ids[needed:]), "a hole in the window"
            if window is None:
                continue
            held = sum(block != 0 for block in table.ids)
            assert held <= (window + chunk - 3) // space.block_size + 2, "holds more than its window needs"
            if first % space.block_size == 0 and request in self._was_running:
                assert not any(table.ids[:needed]), "keeps a block behind its window"

    def _check_writers(self, step: ScheduledStep) -> None:
        """Nobody who held a block before this step, and still does, has it written by somebody else."""
        size = self.scheduler.space.block_size
        slots: Counter[int] = Counter()
        writers: dict[int, Request] = {}
        for request, count in step.rows:
            first = request.num_computed_tokens
            positions = range(first, first + count + step.num_steps - 1)
            for table in request.tables:
                slots.update(table.slot(position) for position in positions)
                for block in table.ids[first // size : (positions[-1]) // size + 1]:
                    assert writers.setdefault(block, request) is request, "two write to one block"
        assert all(times == 1 for times in slots.values()), "two tokens in one slot"
        kept = {block for block, _ in self._pinned & self._pinned_now()}
        assert not kept & writers.keys(), "a pinned block is written"
        for other in self.scheduler.requests():
            if other.row and other in self._may_be_released:
                continue  # nobody can tell whether it kept its blocks or found others
            for block in blocks_of(other) & self._held.get(other, set()) & writers.keys():
                assert writers[block] is other, f"{writers[block]} writes to block {block} of {other}"

    def _pinned_now(self) -> set[tuple[int, bytes | None]]:
        """With their keys: a pin may end, and another one take hold of the block when it holds something else."""
        return {
            (block, self.scheduler.space.cache.key_of(block)) for block in self.scheduler.space.pins.blocks
        }

    def _check_moves(self, moves: list[Move]) -> None:
        for kind, run in groupby(moves, key=lambda move: move.kind):
            targets: set[int] = set()
            for _, source, target in run:
                self.num_moves[kind] += 1
                assert self._exists(source, on_host=kind is MoveKind.SWAP_IN), "moved from nowhere"
                assert self._exists(target, on_host=kind is MoveKind.SWAP_OUT), "moved to nowhere"
                # The runner does moves of a kind that follow each other together.
                assert target not in targets or kind is MoveKind.SWAP_OUT, "two moves to one block"
                assert source not in targets or kind is not MoveKind.COPY, "copies depend on their order"
                targets.add(target)
        stats = self.scheduler.space.stats
        counted = (stats.copied, stats.swapped_out + stats.demoted, stats.swapped_in + stats.promoted)
        assert counted == tuple(self.num_moves[kind] for kind in MoveKind), "moves miscounted"

    def _exists(self, block: int, *, on_host: bool) -> bool:
        space = self.scheduler.space
        if on_host:
            return space.host is not None and 0 <= block < space.host.num_blocks
        return 0 < block < space.num_blocks

    def advanced(self, step: ScheduledStep) -> None:
        """The step has been handed over."""
        for request, _ in step.rows:
            self.progress[request] = request.num_computed_tokens
        self.note_forks()

    def note_forks(self) -> None:
        """Forks that wait with blocks of their parent begin behind these."""
        for request in self.scheduler.waiting:
            if request.holds_blocks:
                self.progress[request] = request.num_computed_tokens

    def failed(self, step: ScheduledStep) -> None:
        """Who was swapped out by a step that failed begins anew."""
        for request in step.preempted:
            if request.host_tables is None and not request.row:
                self.progress.pop(request, None)

    def lose(self) -> None:
        """Everybody begins anew."""
        self.progress.clear()


def blocks_of(request: Request) -> set[int]:
    """The blocks of the pool that a request holds."""
    return {block for table in request.tables for block in table.ids if block}
