"""Who gives way when memory is short, and how: computed again later, or moved to the host and back."""

import logging
from collections.abc import Sequence
from typing import Literal

from jaxpaged.block_space import BlockSpace
from jaxpaged.policies import SchedulingPolicy
from jaxpaged.preemption_cost import PreemptionCost
from jaxpaged.request import Request, RequestStatus

logger = logging.getLogger(__name__)

PreemptionMode = Literal["auto", "recompute", "swap"]

# Who was pushed out so often is spared while anybody else can go, whatever the policy says: a request that fits
# alone finishes.
MAX_PREEMPTIONS = 8


class Preemption:
    """Picks victims and takes their blocks.

    Args:
      space: the blocks.
      mode: "recompute", "swap" (as long as the host has room), or "auto": whichever ``cost`` says is cheaper.
      cost: the estimate for "auto"; None recomputes.
    """

    def __init__(
        self, space: BlockSpace, mode: PreemptionMode = "recompute", cost: PreemptionCost | None = None
    ) -> None:
        self._space = space
        self._mode = mode
        self.cost = cost
        self.counts = {"recompute": 0, "swap": 0}

    @property
    def num_preemptions(self) -> int:
        """How often a running request gave up its blocks."""
        return sum(self.counts.values())

    def victim(self, policy: SchedulingPolicy, running: Sequence[Request]) -> Request:
        """Who of the running requests, two or more, gives way."""
        candidates = [request for request in running if request.num_preemptions < MAX_PREEMPTIONS]
        if candidates:
            return policy.victim(candidates)
        return max(running, key=lambda request: (request.arrival_index, request.index))

    def preempt(self, victim: Request, needed: int, *, may_swap: bool) -> None:
        """Takes the blocks of a request that no longer runs."""
        computed, num_free = victim.num_computed_tokens, self._space.num_free
        swapped = may_swap and self._prefers_swap(victim) and self._space.swap_out(victim)
        if not swapped:
            self._space.release(victim)
        victim.status = RequestStatus.SWAPPED if swapped else RequestStatus.PREEMPTED
        victim.num_preemptions += 1
        self.counts["swap" if swapped else "recompute"] += 1
        logger.warning(
            "request %s[%d] preempted: %d blocks needed, %d free; %d computed tokens %s",
            victim.request_id,
            victim.index,
            needed,
            num_free,
            computed,
            "are swapped out to the host" if swapped else "will be computed again",
        )

    def _prefers_swap(self, victim: Request) -> bool:
        if self._mode == "recompute" or self._space.host is None:
            return False
        num_blocks = sum(block > 0 for table in victim.tables for block in table.ids)
        if self._mode == "swap" or self.cost is None:
            return self._mode == "swap"
        return self.cost.prefers_swap(num_blocks, victim.num_computed_tokens)
