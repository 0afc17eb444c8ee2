"""Who runs in the next step, with how many tokens and in which blocks. Ints only.

Continuous batching (Orca, Yu et al. 2022) without phases: every request is behind by some tokens, one budget of
tokens a step is given first to those that run, in the order of admission, then to those that wait, in the order of the
policy. A long prompt takes what is left and goes on in the next step (chunked prefill, Sarathi, arXiv:2308.16369).

Scheduling may run ahead of the device: ``advance`` counts a step as computed once it has been handed over, ``collect``
takes in its tokens when they are known, and in between the next step can be planned.
"""

import logging
import time
from collections.abc import Iterable, Mapping

from jaxpaged.block_space import BlockSpace, Entry
from jaxpaged.buckets import MAX_MULTI_STEP_ROWS
from jaxpaged.deadlines import Deadlines
from jaxpaged.held_beams import HeldBeams
from jaxpaged.memory_monitor import MemoryMonitor
from jaxpaged.policies import Fcfs, SchedulingPolicy
from jaxpaged.preemption import Preemption
from jaxpaged.request import Request, RequestStatus
from jaxpaged.step_plan import ScheduledStep
from jaxpaged.waiting_queue import WaitingQueue

__all__ = ["ScheduledStep", "Scheduler"]

logger = logging.getLogger(__name__)


class Scheduler:
    """Plans steps over one ``BlockSpace``.

    Invariants (``check_invariants``):
      * a request is in exactly one of ``running``, ``waiting``, ``held.paused`` or the forks of a request in these;
      * running requests have distinct rows in ``1 .. max_num_seqs``, all others row 0;
      * the block space's invariants over all of these requests.

    Args:
      space: the blocks.
      max_num_seqs, max_num_batched_tokens: rows and tokens of a step.
      watermark: share of the blocks that a new request must leave free, else it would soon push somebody out.
      num_scheduler_steps: decode steps of one program while a few rows do nothing else.
      policy: who is admitted next and who gives way; None for first come, first served.
      tenant_weights: shares of tenants, 1 where not named.
      monitor: acts on memory that runs short; None for nothing but watermark and preemption.
      preemption: how a request gives up its blocks; None for recompute.
    """

    def __init__(
        self,
        space: BlockSpace,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        watermark: float = 0.01,
        num_scheduler_steps: int = 1,
        policy: SchedulingPolicy | None = None,
        tenant_weights: Mapping[str, float] | None = None,
        monitor: MemoryMonitor | None = None,
        preemption: Preemption | None = None,
    ) -> None:
        self.space = space
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_scheduler_steps = num_scheduler_steps
        self.watermark_blocks = int(watermark * space.num_blocks)
        self.policy = policy or Fcfs()
        self.monitor = monitor
        self.preemption = preemption or Preemption(space)
        self.deadlines = Deadlines()
        self.running: list[Request] = []
        self.waiting = WaitingQueue(self.policy, tenant_weights)
        self.held = HeldBeams()
        self._free_rows = list(range(max_num_seqs, 0, -1))
        self._num_arrivals = 0
        self._has_tenants = bool(tenant_weights)
        self._num_host_bound = 0  # running requests whose next step needs their tokens on the host

    @property
    def has_unfinished(self) -> bool:
        """Whether a further step has anything to do."""
        return bool(self.running or self.waiting)

    @property
    def needs_tokens(self) -> bool:
        """Whether the next step cannot be planned, or built, before the tokens of the last one are known."""
        return self._num_host_bound > 0

    def add(self, request: Request) -> None:
        """Queues a request, with its forks if it has any."""
        self._num_arrivals += 1
        for each in (request, *request.forks):
            each.arrival_index = self._num_arrivals
            self.deadlines.add(each)
        self._has_tenants = self._has_tenants or bool(request.tenant)
        self.waiting.push(request)

    def schedule(self) -> ScheduledStep:
        """Plans one step and takes the blocks it needs. Every call is followed by ``advance`` or ``fail``."""
        step = ScheduledStep(rewritten=self.held.take_rewritten())
        budget, admit = self._heed_memory()
        budget = self._schedule_running(step, budget)
        if admit and not step.preempted:
            self._schedule_waiting(step, budget)
            while self.held.running and self.waiting and not step.rows:
                # Beams wait for beams that find no room: those that have nothing to do make it.
                self._push_out(step, self._victim(self.held.running), 0, may_swap=True)
                self._schedule_waiting(step, budget)
        step.num_tokens = sum([count for _, count in step.rows])
        if self.num_scheduler_steps > 1:
            self._extend(step, self.num_scheduler_steps)
        step.moves = self.space.take_moves()
        return step

    def _heed_memory(self) -> tuple[int, bool]:
        """Tokens of this step, and whether anybody may be admitted."""
        if self.space.pins:
            self.space.pins.expire(time.monotonic())
        if self.monitor is None:
            return self.max_num_batched_tokens, True
        allocator = self.space.allocator
        advice = self.monitor.observe(
            allocator.num_live,
            allocator.num_usable,
            len(self.running) - len(self.held.running),
            self.max_num_batched_tokens,
        )
        if advice.release_pins:
            self.space.pins.give_way()
        return advice.max_batched_tokens, advice.admit

    def _extend(self, step: ScheduledStep, num_steps: int) -> None:
        """Lets a step of few decode rows run several times, if nothing on the host has a say in between."""
        if self.waiting or not 0 < len(step.rows) <= MAX_MULTI_STEP_ROWS or step.num_tokens != len(step.rows):
            return
        needed = 0
        for request, _ in step.rows:
            known = len(request.token_ids) + request.num_pending
            if request.max_total_tokens - known < num_steps or request.needs_single_steps or request.forks:
                return
            if request.num_computed_tokens + 1 < known:
                return
            if self.space.has_windows:
                self.space.trim(request)  # several steps at a time may never stop at the beginning of a block
            needed += self.space.blocks_to_grow(request, request.num_computed_tokens + num_steps)
        if needed > self.space.num_free:
            return
        for request, _ in step.rows:
            self.space.append_blocks(request, request.num_computed_tokens + num_steps)
            step.grown.append(request)
        step.num_steps = num_steps

    def _schedule_running(self, step: ScheduledStep, budget: int) -> int:
        """Gives those that run their tokens; somebody gives way as long as they do not all fit."""
        while True:
            rows, growing, needed, left = self._plan_running(budget)
            if needed <= self.space.num_free:
                break
            self._make_room(step, needed)
        for request, count in growing:
            self._take(step, request, count)
        step.rows += rows
        if self._has_tenants:
            for request, count in rows:
                self.waiting.charge(request, count)
        return left

    def _plan_running(
        self, budget: int
    ) -> tuple[list[tuple[Request, int]], list[tuple[Request, int]], int, int]:
        """(rows, those among them whose blocks change, free blocks needed, budget left)."""
        rows: list[tuple[Request, int]] = []
        growing: list[tuple[Request, int]] = []
        needed, space, block_size = 0, self.space, self.space.block_size
        for request in self.running:
            if budget <= 0:
                break
            done = request.num_computed_tokens
            known = len(request.token_ids) + request.num_pending
            count = known - done
            if request.num_pending and known >= request.max_total_tokens:
                continue  # its last token is on the way
            if count == 1 and done % block_size and not request.may_share:
                # Most rows of most steps: one token into a block of its own that has room. A block that this fills
                # is published with the next one.
                rows.append((request, 1))
                budget -= 1
                continue
            if count <= 0:
                continue
            count = min(count, budget)
            if space.has_windows:
                space.trim(request)
            needed += space.blocks_to_grow(request, done + count)
            rows.append((request, count))
            growing.append((request, count))
            budget -= count
        return rows, growing, needed, budget

    def _make_room(self, step: ScheduledStep, needed: int) -> None:
        """One of those that run gives up its blocks; for one alone, whatever else holds any goes first."""
        alone = len(self.running) - len(self.held.running) == 1
        if alone and self.held.running:
            self._push_out(step, self._victim(self.held.running), needed, may_swap=True)
        elif not alone:
            self._push_out(step, self._victim(self.running), needed, may_swap=True)
        elif not self._release_waiting() and not self.space.pins.give_way():
            self._push_out(step, self.running[0], needed, may_swap=False)

    def _victim(self, running: list[Request]) -> Request:
        return self.preemption.victim(self.policy, running)

    def _push_out(self, step: ScheduledStep, victim: Request, needed: int, *, may_swap: bool) -> None:
        self.running.remove(victim)
        self._give_back_row(victim)
        self.preemption.preempt(victim, needed, may_swap=may_swap)
        self._queue_again(victim)
        step.preempted.append(victim)

    def _queue_again(self, request: Request) -> None:
        if request.is_held:
            self.held.pause(request)  # it has what it ran for: there is nothing to wait for in the queue
        else:
            self.waiting.push(request)

    @property
    def num_preemptions(self) -> int:
        """How often a running request gave up its blocks."""
        return self.preemption.num_preemptions

    def _release_waiting(self) -> bool:
        """Forks that wait give up the blocks they hold."""
        released = False
        for waiting in self.waiting:
            if waiting.holds_blocks:
                self.space.release(waiting)
                released = True
        return released

    def _num_cached(self, request: Request) -> int:
        return self.space.plan_entry(request).num_computed_tokens

    def _schedule_waiting(self, step: ScheduledStep, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting.peek(self._num_cached)
            if request is None or request.num_pending:
                break
            entry = self.space.plan_entry(request)
            count = min(request.num_tokens - entry.num_computed_tokens, budget)
            needed = self.space.blocks_to_enter(request, entry, entry.num_computed_tokens + count)
            # A request that runs alone may use everything.
            reserve = self.watermark_blocks if self.running else 0
            if needed + reserve > self.space.num_free:
                if self.running or not (self._release_waiting() or self.space.pins.give_way()):
                    break
                continue
            self._admit(step, request, entry, count)
            budget -= count

    def _admit(self, step: ScheduledStep, request: Request, entry: Entry, count: int) -> None:
        self.waiting.remove(request)
        step.num_admitted += 1
        self.space.enter(request, entry)
        request.row = self._free_rows.pop()
        request.num_admissions += 1
        request.status = RequestStatus.RUNNING
        for each in (request, *request.forks):
            each.queue_deadline = None
        self.running.append(request)
        self._num_host_bound += request.needs_tokens_on_host
        self._take(step, request, count)
        step.rows.append((request, count))
        if self._has_tenants:
            self.waiting.charge(request, count)  # before the next one is chosen

    def _take(self, step: ScheduledStep, request: Request, count: int) -> None:
        step.grown.append(request)
        target = request.num_computed_tokens + count
        if self.space.grow(request, target):
            step.rewritten.append(request)
        # A block is found by its tokens: those that only the device knows so far are published a step later.
        step.published += self.space.publish(request, min(target, len(request.token_ids)))

    def next_loads(self) -> list[int]:
        """Host blocks that the next request to be admitted will bring to the pool, as far as can be told now."""
        if self.space.host is None or not self.waiting:
            return []
        request = self.waiting.peek(self._num_cached)
        entry = None if request is None else self.space.plan_entry(request)
        tables = [] if entry is None or entry.tables is None else entry.tables
        return [-1 - item for table in tables for item in table if item < 0]

    def advance(self, step: ScheduledStep) -> None:
        """The step is with the device: what it computes counts as computed from here on."""
        ahead = step.num_steps - 1
        self.space.unused.written(step.num_tokens * step.num_steps)
        for index, (request, count) in enumerate(step.rows):
            step.starts.append(request.num_computed_tokens)
            request.num_computed_tokens = done = request.num_computed_tokens + count + ahead
            if done - ahead < len(request.token_ids) + request.num_pending:
                continue
            request.num_pending += step.num_steps
            step.sampling.append(index)
            if request.forks:
                self._release_forks(request)

    def collect(self, step: ScheduledStep, sampled: list[int]) -> list[Request]:
        """Takes in tokens of a step; once for each of its ``num_steps``.

        Args:
          step: what ``schedule`` returned and ``advance`` has seen.
          sampled: one token per row; ignored for rows that have not caught up, and for who has ended meanwhile.

        Returns:
          The requests that got a new token, finished ones included, in batch order. Beams get none yet:
          they are held.
        """
        advanced = []
        for index in step.sampling:
            request = step.rows[index][0]
            if request.status.is_finished:
                continue
            request.num_pending -= 1
            advanced.append(request)
            if request.is_beam:
                self.held.hold(request)
                continue
            ending = request.append(sampled[index])
            if ending is not None:
                self.publish(request)
                self.finish(request, ending)
        return advanced

    def update(self, step: ScheduledStep, sampled: list[int]) -> list[Request]:
        """``advance`` and ``collect`` in one, for who does not run ahead."""
        self.advance(step)
        return self.collect(step, sampled)

    def publish(self, request: Request) -> None:
        """Makes a request's full blocks findable."""
        if request.holds_blocks:
            self.space.publish(request, min(request.num_computed_tokens, len(request.token_ids)))

    def _release_forks(self, request: Request) -> None:
        """The prompt is computed: the other completions share its blocks and need only its last token again."""
        for child in request.forks:
            self.space.fork(request, child, request.num_prompt_tokens - 1)
            child.num_cached_tokens = child.num_computed_tokens
            self.waiting.push(child)
        request.forks = []

    def fork(self, parent: Request, child: Request) -> None:
        """Queues ``child``, whose tokens begin with some of the parent's; it shares what of them is computed."""
        shared = min(parent.num_computed_tokens, child.num_tokens - 1, parent.common_length(child))
        if child.needs_all_logits:
            shared = 0  # the prompt's log-probabilities come from computing it
        if shared > 0 and parent.holds_blocks and self.space.fork(parent, child, shared):
            child.num_cached_tokens = shared
        self.add(child)

    def finish(self, request: Request, status: RequestStatus) -> None:
        """Ends a request in whatever state it is; its forks that have not begun are not ended with it."""
        if not self.leave(request) and not request.status.is_finished:
            siblings = next((r.forks for r in self.requests() if request in r.forks), [request])
            siblings.remove(request)
        self.space.release(request)
        request.status = status
        if request.forks:
            # The next completion takes over as the one whose prompt is computed.
            heir, *rest = request.forks
            heir.forks, request.forks = rest, []
            self.waiting.push(heir)

    def leave(self, request: Request) -> bool:
        """Takes a request out of where it is; its blocks stay with it. False when it is in none of the queues."""
        was_held = request.is_held
        self.held.drop(request)
        if request.row:
            self.running.remove(request)
            self._give_back_row(request)
            request.status = RequestStatus.WAITING
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            return was_held
        return True

    def fail(self, step: ScheduledStep) -> list[Request]:
        """Ends all requests of a step that raised; returns them."""
        self.space.unpublish(step.published, step.moves)
        for request in step.preempted:
            if request.host_tables is not None:
                self.space.release(request)  # nobody knows whether it has arrived on the host
                request.status = RequestStatus.PREEMPTED
        failed = [request for request, _ in step.rows if not request.status.is_finished]
        for request in failed:
            self.finish(request, RequestStatus.FINISHED_ERROR)
        return failed

    def restart(self) -> None:
        """Makes every request start over: the content of the pool was lost, and tokens that were on the way."""
        self.space.take_moves()
        for request in self.running:
            self._give_back_row(request)
            request.status = RequestStatus.PREEMPTED
            request.num_preemptions += 1
            self._queue_again(request)
        self.running.clear()
        for request in self.requests():
            request.num_pending = 0
            self.space.release(request)
            if request.status is RequestStatus.SWAPPED:
                request.status = RequestStatus.PREEMPTED
        self.space.forget_everything()

    def _give_back_row(self, request: Request) -> None:
        self._free_rows.append(request.row)
        self._num_host_bound -= request.needs_tokens_on_host
        request.row = 0

    def requests(self) -> Iterable[Request]:
        """All unfinished requests, forks that wait included."""
        for request in (*self.running, *self.waiting, *self.held.paused):
            yield request
            yield from request.forks

    def check_invariants(self) -> None:
        """Asserts the invariants."""
        everything = list(self.requests())
        assert len({id(r) for r in everything}) == len(everything), "a request is in two places"
        assert len(self.running) <= self.max_num_seqs, "too many running"
        rows = [request.row for request in self.running]
        assert sorted(rows + self._free_rows) == list(range(1, self.max_num_seqs + 1)), "rows lost or shared"
        for request in everything:
            assert not request.status.is_finished, "a finished request is still queued"
            assert (request.row > 0) == (request.status is RequestStatus.RUNNING), "row of a waiting request"
            is_swapped = request.status is RequestStatus.SWAPPED
            assert is_swapped == (request.host_tables is not None), "status does not say where its blocks are"
            known = request.num_tokens + request.num_pending
            assert request.num_computed_tokens <= known, "computed more than there is"
        num_host_bound = sum(request.needs_tokens_on_host for request in self.running)
        assert self._num_host_bound == num_host_bound, "requests that need their tokens miscounted"
        self.held.check_invariants(self.running, [*self.waiting, *self.held.paused])
        self.waiting.check_invariants()
        self.space.check_invariants(everything)
