"""Who runs in the next step, with how many tokens and in which blocks. Ints only.

Continuous batching (Orca, Yu et al. 2022) without phases: every request is behind by some tokens, one budget of
tokens a step is given first to those that run, in the order of arrival, then to those that wait.
A long prompt takes what is left and goes on in the next step (chunked prefill, Sarathi, arXiv:2308.16369).
When blocks run out, the request that came last gives up its blocks and is computed again later.
"""

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxpaged.block_space import BlockSpace
from jaxpaged.buckets import MAX_MULTI_STEP_ROWS
from jaxpaged.request import Request, RequestStatus

logger = logging.getLogger(__name__)


@dataclass
class ScheduledStep:
    """What one step computes. ``rows`` pairs each request with its number of tokens, in batch order."""

    rows: list[tuple[Request, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # blocks to copy before the step
    rewritten: list[Request] = field(default_factory=list)  # running requests whose tables these change
    preempted: list[Request] = field(default_factory=list)
    published: list[int] = field(default_factory=list)  # blocks this step makes findable
    num_tokens: int = 0
    num_steps: int = 1  # more: every row decodes so many tokens, one after the other, in one program


class Scheduler:
    """First come, first served over one ``BlockSpace``.

    Invariants (``check_invariants``):
      * a request is in exactly one of ``running``, ``waiting`` or the forks of a request in either;
      * running requests have distinct rows in ``1 .. max_num_seqs``, all others row 0;
      * the block space's invariants over all of these requests.
    """

    def __init__(
        self,
        space: BlockSpace,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        watermark: float = 0.01,
        num_scheduler_steps: int = 1,
    ) -> None:
        self.space = space
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_scheduler_steps = num_scheduler_steps
        # A new request must leave this many blocks free, else it would soon push somebody out.
        self.watermark_blocks = int(watermark * space.num_blocks)
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.num_preemptions = 0
        self._free_rows = list(range(max_num_seqs, 0, -1))

    @property
    def has_unfinished(self) -> bool:
        """Whether a further step has anything to do."""
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Queues a request, with its forks if it has any."""
        self.waiting.append(request)

    def schedule(self) -> ScheduledStep:
        """Plans one step and takes the blocks it needs. Every call is followed by ``update`` or ``fail``."""
        step = ScheduledStep()
        budget = self._schedule_running(step, self.max_num_batched_tokens)
        if not step.preempted:
            self._schedule_waiting(step, budget)
        step.num_tokens = sum(count for _, count in step.rows)
        if self.num_scheduler_steps > 1:
            self._extend(step, self.num_scheduler_steps)
        return step

    def _extend(self, step: ScheduledStep, num_steps: int) -> None:
        """Lets a step of few decode rows run several times, if nothing on the host has a say in between."""
        if self.waiting or not 0 < len(step.rows) <= MAX_MULTI_STEP_ROWS or step.num_tokens != len(step.rows):
            return
        needed = 0
        for request, _ in step.rows:
            left = request.max_tokens - request.num_output_tokens
            if left < num_steps or request.needs_host_each_step or request.forks:
                return
            if request.num_computed_tokens + 1 < request.num_tokens:
                return
            needed += request.table.missing(request.num_computed_tokens + num_steps)
        if needed > self.space.num_free:
            return
        for request, _ in step.rows:
            self.space.append_blocks(request, request.num_computed_tokens + num_steps)
        step.num_steps = num_steps

    def _schedule_running(self, step: ScheduledStep, budget: int) -> int:
        index, block_size = 0, self.space.block_size
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            done = request.num_computed_tokens
            count = len(request.token_ids) - done
            index += 1
            if count == 1 and done % block_size and (done + 1) % block_size and not request.may_share:
                # Most rows of most steps: one token into a block of its own that has room and does not fill.
                step.rows.append((request, 1))
                budget -= 1
                continue
            count = min(count, budget)
            if not self._find_room(step, request, done + count):
                break
            self._take(step, request, count)
            budget -= count
        return budget

    def _find_room(self, step: ScheduledStep, request: Request, target: int) -> bool:
        """Preempts until a running request can grow; False when it had to go itself."""
        while (needed := self.space.blocks_to_grow(request, target)) > self.space.num_free:
            if not self._make_room(step, request, needed):
                return False
        return True

    def _make_room(self, step: ScheduledStep, request: Request, needed: int) -> bool:
        """Preempts the last of the running; False when that was ``request`` itself."""
        victim = self.running[-1]
        if victim is request and len(self.running) == 1 and self._release_waiting():
            # Forks that wait hold blocks; alone with them, the one running request goes first.
            return True
        self._preempt(step, victim, needed)
        return victim is not request

    def _release_waiting(self) -> bool:
        released = False
        for waiting in self.waiting:
            if waiting.table.ids:
                self.space.release(waiting)
                released = True
        return released

    def _preempt(self, step: ScheduledStep, victim: Request, needed: int) -> None:
        logger.warning(
            "request %s[%d] preempted: %d blocks needed, %d free; %d computed tokens will be computed again",
            victim.request_id,
            victim.index,
            needed,
            self.space.num_free,
            victim.num_computed_tokens,
        )
        self.running.remove(victim)
        self._give_back_row(victim)
        self.space.release(victim)
        victim.status = RequestStatus.PREEMPTED
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(victim)
        step.preempted.append(victim)

    def _schedule_waiting(self, step: ScheduledStep, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            prefix = [] if request.table.ids else self.space.cached_prefix(request)
            computed = request.num_computed_tokens or len(prefix) * self.space.block_size
            count = min(request.num_tokens - computed, budget)
            if request.table.ids:
                needed = self.space.blocks_to_grow(request, computed + count)
            else:
                new = request.table.missing(computed + count) - len(prefix)
                needed = new + self.space.num_revived(prefix)
            # A request that runs alone may use everything.
            reserve = self.watermark_blocks if self.running else 0
            if needed + reserve > self.space.num_free:
                if self.running or not self._release_waiting():
                    break
                continue
            self.waiting.popleft()
            if not request.table.ids:
                self.space.adopt(request, prefix)
            request.row = self._free_rows.pop()
            request.status = RequestStatus.RUNNING
            self.running.append(request)
            self._take(step, request, count)
            budget -= count

    def _take(self, step: ScheduledStep, request: Request, count: int) -> None:
        target = request.num_computed_tokens + count
        copy = self.space.grow(request, target)
        if copy is not None:
            step.copies.append(copy)
            step.rewritten.append(request)
        step.published += self.space.publish(request, target)
        step.rows.append((request, count))

    def update(self, step: ScheduledStep, sampled: list[int]) -> list[Request]:
        """Takes in the results of a step.

        Args:
          step: what ``schedule`` returned.
          sampled: one token per row; ignored for rows that have not caught up.

        Returns:
          The requests that got a new token, finished ones included, in batch order.
        """
        advanced = []
        for (request, count), token in zip(step.rows, sampled, strict=False):
            request.num_computed_tokens = done = request.num_computed_tokens + count
            if done < len(request.token_ids):
                continue
            if request.forks:
                self._release_forks(request)
            ending = request.append(token)
            advanced.append(request)
            if ending is not None:
                self.finish(request, ending)
        return advanced

    def publish(self, step: ScheduledStep) -> None:
        """Makes the blocks findable that several steps in one program have filled."""
        for request, _ in step.rows:
            if not request.status.is_finished:
                self.space.publish(request, request.num_computed_tokens)

    def _release_forks(self, request: Request) -> None:
        """The prompt is computed: the other completions share its blocks and need only its last token again."""
        for child in reversed(request.forks):
            self.space.fork(request, child, request.num_prompt_tokens)
            child.num_computed_tokens = child.num_cached_tokens = request.num_prompt_tokens - 1
            self.waiting.appendleft(child)
        request.forks = []

    def finish(self, request: Request, status: RequestStatus) -> None:
        """Ends a request in whatever state it is; its forks that have not begun are not ended with it."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._give_back_row(request)
        elif not request.status.is_finished:
            holder = next((r.forks for r in self.requests() if request in r.forks), self.waiting)
            if request in holder:
                holder.remove(request)
        self.space.release(request)
        request.status = status
        if request.forks:
            # The next completion takes over as the one whose prompt is computed.
            heir, *rest = request.forks
            heir.forks, request.forks = rest, []
            self.waiting.appendleft(heir)

    def fail(self, step: ScheduledStep) -> list[Request]:
        """Ends all requests of a step that raised; returns them."""
        self.space.unpublish(step.published)
        failed = [request for request, _ in step.rows]
        for request in failed:
            self.finish(request, RequestStatus.FINISHED_ERROR)
        return failed

    def restart(self) -> None:
        """Makes every request start over: the content of the pool was lost."""
        for request in self.running:
            self._give_back_row(request)
            request.status = RequestStatus.PREEMPTED
            request.num_preemptions += 1
        self.waiting.extendleft(reversed(self.running))
        self.running.clear()
        for request in self.requests():
            self.space.release(request)
        self.space.cache.clear()

    def _give_back_row(self, request: Request) -> None:
        self._free_rows.append(request.row)
        request.row = 0

    def requests(self) -> Iterable[Request]:
        """All unfinished requests, forks that wait included."""
        for request in (*self.running, *self.waiting):
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
            assert request.num_computed_tokens <= request.num_tokens, "computed more than there is"
        self.space.check_invariants(everything)
