"""How full the pool is, and what a step should do about it: three levels, ints only.

Founding idea: watch memory and change behaviour before it runs out, rather than at the moment it does. A pool
that is nearly full first takes no newcomers, who would soon push somebody out; a fuller one also computes less
a step and may let go of prefixes that are only held to be found again. What a step does when blocks run out all
the same is the scheduler's business (preemption).
"""

import enum
import logging
import math
import time
from dataclasses import dataclass

from jaxpaged.errors import InvalidRequestError

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0  # a small pool may enter a level every few steps


class MemoryLevel(enum.Enum):
    """How full the pool is; a larger value is fuller."""

    NORMAL = 0
    WARNING = 1
    CRITICAL = 2


@dataclass(frozen=True, slots=True)
class MemoryAdvice:
    """What the next step may do: take newcomers in, compute so many tokens, release pinned prefixes."""

    level: MemoryLevel
    admit: bool
    max_batched_tokens: int
    release_pins: bool


class MemoryMonitor:
    """Watches the share of live blocks and advises each step.

    A level begins when the share reaches its threshold and ends when the share is below the threshold by more
    than ``hysteresis``, so that one block more or less does not switch it at every step. A threshold of 1
    turns its level off.

    ========  ==========================  ===============  ==============
    level     newcomers                   tokens of a step  pins
    ========  ==========================  ===============  ==============
    NORMAL    yes                         all              stay
    WARNING   only when nothing runs      all              stay
    CRITICAL  only when nothing runs      half             may go
    ========  ==========================  ===============  ==============

    Half the tokens are still one for every request that runs: nobody's decoding stops. With nothing running the
    advice is always to admit, with all tokens, so whatever holds the blocks cannot bring the engine to a halt.

    Each change is logged, but the beginning of NORMAL or WARNING at most once in ``LOG_SECONDS``.

    Invariants (``check_invariants``): ``level`` was entered as often as ``num_transitions`` says, so one other than
    NORMAL at least once; the last ``usage`` is within what its level allows.

    Args:
      warning, critical: shares of the usable blocks, ``0 < warning <= critical <= 1``.
      hysteresis: share, ``0 <= hysteresis < warning``.

    Raises:
      InvalidRequestError: ``memory_warning``, ``memory_critical`` or ``memory_hysteresis`` is out of range.
    """

    def __init__(self, warning: float = 0.95, critical: float = 0.99, hysteresis: float = 0.02) -> None:
        _check(
            "memory_warning", warning, 0 < _number(warning) <= 1, "must be a share in (0, 1]; 1 turns it off"
        )
        _check(
            "memory_critical",
            critical,
            warning <= _number(critical) <= 1,
            f"must be a share in [memory_warning={warning}, 1]; 1 turns it off",
        )
        _check(
            "memory_hysteresis",
            hysteresis,
            0 <= _number(hysteresis) < warning,
            f"must be a share in [0, memory_warning={warning})",
        )
        self.warning = warning
        self.critical = critical
        self.hysteresis = hysteresis
        self.level = MemoryLevel.NORMAL
        self.usage = 0.0
        self.num_transitions = dict.fromkeys(MemoryLevel, 0)  # how often each level was entered
        self._logged = dict.fromkeys(MemoryLevel, -math.inf)  # when its last beginning was logged

    def observe(self, num_live: int, num_usable: int, num_running: int, token_budget: int) -> MemoryAdvice:
        """Takes in the state before a step and advises it.

        Args:
          num_live: blocks that somebody holds, pins included.
          num_usable: blocks of the pool without the dummy.
          num_running: requests that run.
          token_budget: tokens that a step may compute.

        Returns:
          Advice with ``max_batched_tokens`` in ``[min(num_running, token_budget), token_budget]``.
        """
        assert 0 <= num_live <= num_usable, "more live blocks than there are"
        self.usage = num_live / num_usable
        level = self._level_at(self.usage)
        if level is not self.level:
            self._enter(level, num_usable - num_live)
        critical = level is MemoryLevel.CRITICAL
        if num_running == 0:
            return MemoryAdvice(level, True, token_budget, critical)
        if critical:
            token_budget = min(token_budget, max(token_budget // 2, num_running))
        return MemoryAdvice(level, level is MemoryLevel.NORMAL, token_budget, critical)

    def _level_at(self, usage: float) -> MemoryLevel:
        for level, threshold in (
            (MemoryLevel.CRITICAL, self.critical),
            (MemoryLevel.WARNING, self.warning),
        ):
            is_on = self.level.value >= level.value
            if threshold < 1 and usage >= (threshold - self.hysteresis if is_on else threshold):
                return level
        return MemoryLevel.NORMAL

    def _enter(self, level: MemoryLevel, num_free: int) -> None:
        self.level = level
        self.num_transitions[level] += 1
        now = time.monotonic()
        if now - self._logged[level] < LOG_SECONDS:
            return
        self._logged[level] = now
        logger.log(
            logging.INFO if level is MemoryLevel.NORMAL else logging.WARNING,
            "KV memory %s: %.1f%% of the blocks in use, %d free",
            level.name.lower(),
            100 * self.usage,
            num_free,
        )

    def check_invariants(self) -> None:
        """Asserts the invariants."""
        entered = self.num_transitions
        others = entered[MemoryLevel.WARNING] + entered[MemoryLevel.CRITICAL]
        if self.level is MemoryLevel.NORMAL:
            assert (entered[MemoryLevel.NORMAL] > 0) == (others > 0), "left for NORMAL, or never left"
        else:
            assert entered[self.level] > 0, "at a level that was never entered"
        assert entered[MemoryLevel.NORMAL] <= others, "more ways back than out"
        assert self._level_at(self.usage) is self.level, "the level does not fit the usage"


def _number(value: object) -> float:
    """``value`` as a float; NaN, which no comparison holds for, where it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)


def _check(argument: str, value: object, fits: bool, reason: str) -> None:
    if not fits:
        raise InvalidRequestError(argument, value, reason)
