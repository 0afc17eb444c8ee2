"""Random configurations of a scheduler: small, so that everything runs short, and all features together."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from jaxpaged.memory_monitor import MemoryMonitor
from jaxpaged.policies import POLICIES, LongestPrefixMatch, Priority, SchedulingPolicy
from jaxpaged.preemption import Preemption, PreemptionMode
from jaxpaged.preemption_cost import PreemptionCost
from jaxpaged.request import Request
from jaxpaged.scheduler import Scheduler
from tests.core.pool_model import make_scheduler

TENANTS = ("", "a", "b")


class HostilePolicy:
    """Arbitrary order, and the request that has come furthest gives way: the most work is lost."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self.window = self._random.randint(1, 4)

    def key(self, request: Request) -> int:
        """Another one each time."""
        return self._random.randrange(5)

    def choose(self, candidates: Sequence[Request], num_cached_tokens: Callable[[Request], int]) -> int:
        """Anyone."""
        for candidate in candidates:
            assert 0 <= num_cached_tokens(candidate) < candidate.num_tokens + 1
        return self._random.randrange(len(candidates))

    def victim(self, running: Sequence[Request]) -> Request:
        """The eldest."""
        return min(running, key=lambda request: (request.arrival_index, request.index))


@dataclass(frozen=True)
class Settings:
    """What a scheduler is made of; small integers that shrink to the plainest."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    budget: int
    watermark: float
    caching: bool
    windows: tuple[int | None, ...]
    num_host_blocks: int | None
    mode: PreemptionMode
    policy: str
    policy_seed: int
    has_tenants: bool
    thresholds: tuple[float, float] | None
    num_scheduler_steps: int
    overlap: bool
    max_live: int  # no requests are added beyond

    @classmethod
    def draw(cls, rng: Random) -> "Settings":
        """Any of them."""
        windows = rng.choice([(None,), (None,), (3,), (None, 3), (2, None, 5)])
        warning = rng.choice([0.3, 0.6, 0.9])
        return cls(
            num_blocks=rng.randint(2, 20) + (len(windows) - 1) * rng.randint(2, 20),
            block_size=rng.randint(1, 4),
            max_num_seqs=rng.randint(1, 5),
            budget=rng.randint(1, 16),
            watermark=rng.choice([0.0, 0.0, 0.2]),
            caching=rng.choice([True, True, True, False]),
            windows=windows,
            num_host_blocks=rng.choice([None, 0, 2, 6, 30]),
            mode=rng.choice(["recompute", "swap", "auto"]),
            policy=rng.choice(["fcfs", *POLICIES, "hostile"]),
            policy_seed=rng.randrange(1000),
            has_tenants=rng.choice([False, False, True]),
            thresholds=rng.choice([None, None, (warning, rng.choice([warning, 0.95, 1.0]))]),
            num_scheduler_steps=rng.choice([1, 2, 4]),
            overlap=rng.choice([False, True, True]),
            max_live=rng.choice([30, 12, 6, 2]),
        )

    def scheduler(self) -> Scheduler:
        """A scheduler made of this."""
        made = make_scheduler(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            budget=self.budget,
            watermark=self.watermark,
            caching=self.caching,
            windows=self.windows,
            num_host_blocks=self.num_host_blocks,
            num_scheduler_steps=self.num_scheduler_steps,
            policy=self._policy(),
            tenant_weights={"a": 2.0, "b": 0.5} if self.has_tenants else None,
            monitor=None if self.thresholds is None else MemoryMonitor(*self.thresholds, hysteresis=0.05),
        )
        cost = PreemptionCost(100, bytes_per_second=1000.0, min_step_tokens=1)
        made.preemption = Preemption(made.space, self.mode, cost)
        return made

    def _policy(self) -> SchedulingPolicy:
        if self.policy == "hostile":
            return HostilePolicy(self.policy_seed)
        if self.policy == "priority":
            return Priority(aging_seconds=2.0)
        if self.policy == "longest-prefix-match":
            return LongestPrefixMatch(window=3, max_skips=2)
        return POLICIES[self.policy]()

    def __str__(self) -> str:
        values: dict[str, Any] = asdict(self)
        return ", ".join(f"{name}={value}" for name, value in values.items())
