"""Scheduling policies: who is admitted next, and who gives way when memory is short. Ints and floats only.

A policy orders the requests; ``waiting_queue`` keeps the order and adds fairness across tenants.
"""

import importlib
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, cast
from weakref import ReferenceType, WeakKeyDictionary, ref

from jaxpaged.errors import InvalidRequestError
from jaxpaged.request import Request


class SchedulingPolicy(Protocol):
    """What a scheduling policy decides.

    A policy may have an attribute ``window`` (an integer of at least 1; without it, 1): how many of the waiting
    requests, in the order of their keys, ``choose`` looks at. The methods must not change the requests.
    """

    @abstractmethod
    def key(self, request: Request) -> Any:
        """The request's place in the waiting queue: the smallest key comes first.

        Comparable with the keys of all other requests. Asked when the request is queued, and again when it is
        queued after a preemption; the answer holds while it waits. ``(arrival_index, index)`` breaks ties.
        """

    @abstractmethod
    def choose(self, candidates: Sequence[Request], num_cached_tokens: Callable[[Request], int]) -> int:
        """The index of the one to admit next.

        What is chosen need not be admitted (it may have to wait for memory), so the question may come again.

        Args:
          candidates: the first ``window`` waiting requests in the order of their keys, or fewer when there are
            fewer; all of one tenant. A single one is not asked about.
          num_cached_tokens: how many tokens of a candidate need not be computed if it is admitted now.
        """

    @abstractmethod
    def victim(self, running: Sequence[Request]) -> Request:
        """The one of ``running`` (at least one) that gives up its blocks because memory is short.

        The largest key is a safe answer: then the request with the smallest key always gets on. Two running
        requests that the policy lets push each other out in turn would compute for ever and finish nothing.
        """


def _last_in_order(policy: SchedulingPolicy, running: Sequence[Request]) -> Request:
    return max(running, key=lambda request: (policy.key(request), request.arrival_index, request.index))


@dataclass(frozen=True)
class Fcfs:
    """First come, first served. The one that arrived last gives way."""

    def key(self, request: Request) -> int:
        """The number of its arrival."""
        return request.arrival_index

    def choose(self, candidates: Sequence[Request], num_cached_tokens: Callable[[Request], int]) -> int:
        """The first."""
        return 0

    def victim(self, running: Sequence[Request]) -> Request:
        """The one that arrived last."""
        return _last_in_order(self, running)


@dataclass(frozen=True, kw_only=True)
class Priority:
    """The smallest ``priority`` first; who waits gains on those that come later, so nobody starves.

    A request gains one level for every ``aging_seconds`` that it waits: at time ``now`` its level is
    ``priority - (now - arrival_time) / aging_seconds``. ``now`` is the same for all that are compared, so leaving
    it out changes no order: the key is ``priority + arrival_time / aging_seconds``, and it is constant. A request
    that is ``d`` levels behind is passed only by those that arrive within ``d * aging_seconds`` after it.

    The largest key gives way.

    Attributes:
      aging_seconds: seconds of waiting that are worth one level; None turns aging off, and then a steady flow of
        more urgent requests starves the others.

    Raises:
      InvalidRequestError: ``aging_seconds`` is not positive and finite.
    """

    aging_seconds: float | None = 60.0

    def __post_init__(self) -> None:
        if self.aging_seconds is not None:
            _check_number("aging_seconds", self.aging_seconds, zero=False)

    def key(self, request: Request) -> float:
        """Its priority, in levels; later arrivals count as less urgent."""
        if self.aging_seconds is None:
            return request.priority
        return request.priority + request.arrival_time / self.aging_seconds

    def choose(self, candidates: Sequence[Request], num_cached_tokens: Callable[[Request], int]) -> int:
        """The first."""
        return 0

    def victim(self, running: Sequence[Request]) -> Request:
        """The least urgent."""
        return _last_in_order(self, running)


@dataclass(frozen=True, kw_only=True)
class ShortestPromptFirst:
    """The shortest prompt first, which makes the mean wait short; aging keeps long prompts from starving.

    A prompt counts as shorter by ``aging_tokens_per_second`` for every second that it waits. As with ``Priority``,
    only the differences matter, so the key ``num_prompt_tokens + aging_tokens_per_second * arrival_time`` is
    constant. A prompt of ``p`` tokens is passed only by those that arrive within ``p / aging_tokens_per_second``
    seconds after it. The largest key gives way.

    Attributes:
      aging_tokens_per_second: tokens that a second of waiting is worth; 0 turns aging off.

    Raises:
      InvalidRequestError: ``aging_tokens_per_second`` is negative or not finite.
    """

    aging_tokens_per_second: float = 100.0

    def __post_init__(self) -> None:
        _check_number("aging_tokens_per_second", self.aging_tokens_per_second, zero=True)

    def key(self, request: Request) -> float:
        """Its prompt's length, in tokens; later arrivals count as longer."""
        return request.num_prompt_tokens + self.aging_tokens_per_second * request.arrival_time

    def choose(self, candidates: Sequence[Request], num_cached_tokens: Callable[[Request], int]) -> int:
        """The first."""
        return 0

    def victim(self, running: Sequence[Request]) -> Request:
        """The one that would be admitted last."""
        return _last_in_order(self, running)


class LongestPrefixMatch:
    """Of the first ``window`` by arrival, the one with the most cached tokens: cached blocks serve before they go.

    Longest-shared-prefix-first of RadixAttention (Zheng et al., "SGLang", arXiv:2312.07104) with a bound: while a
    request is the first of its queue it is passed over at most ``max_skips`` times, then it is next. Ties go to
    the earliest. The one that arrived last gives way.

    Only what was admitted counts as a skip, not every question. The counts are kept by weak reference to the
    request that was passed over, so they live as long as it does and may be shared by tenants, whose queues are
    asked in turn, and by engines.

    Attributes:
      window: waiting requests that are looked at.
      max_skips: times that the first may be passed over; 0 is first come, first served.

    Raises:
      InvalidRequestError: ``window`` is not an integer of at least 1, or ``max_skips`` not one of at least 0.
    """

    def __init__(self, *, window: int = 32, max_skips: int = 16) -> None:
        _check_int("window", window, 1)
        _check_int("max_skips", max_skips, 0)
        self.window = window
        self.max_skips = max_skips
        # Of a request that was passed over: how often, and who was chosen instead and may have been admitted since,
        # with its num_preemptions at that time.
        self._skips: WeakKeyDictionary[Request, tuple[int, ReferenceType[Request] | None, int]]
        self._skips = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"LongestPrefixMatch(window={self.window}, max_skips={self.max_skips})"

    def key(self, request: Request) -> int:
        """The number of its arrival."""
        return request.arrival_index

    def choose(self, candidates: Sequence[Request], num_cached_tokens: Callable[[Request], int]) -> int:
        """The one with the most cached tokens, or the first if it has been passed over often enough."""
        head = candidates[0]
        num_skips, best = self._count_skips(candidates), 0
        if num_skips < self.max_skips:
            best = max(range(len(candidates)), key=lambda index: num_cached_tokens(candidates[index]))
        if best > 0:
            self._skips[head] = (num_skips, ref(candidates[best]), candidates[best].num_preemptions)
        elif head in self._skips:
            self._skips[head] = (num_skips, None, 0)
        return best

    def _count_skips(self, candidates: Sequence[Request]) -> int:
        """How often the first has been passed over: once more if the one chosen last was admitted meanwhile."""
        num_skips, chosen, num_preemptions = self._skips.get(candidates[0], (0, None, 0))
        if chosen is None:
            return num_skips
        # One that waits still, or again: if it was preempted since, it was admitted.
        waits = any(chosen() is other and other.num_preemptions == num_preemptions for other in candidates)
        return num_skips if waits else num_skips + 1

    def victim(self, running: Sequence[Request]) -> Request:
        """The one that arrived last."""
        return _last_in_order(self, running)


POLICIES: Mapping[str, Callable[[], SchedulingPolicy]] = MappingProxyType(
    {
        "fcfs": Fcfs,
        "priority": Priority,
        "shortest-prompt-first": ShortestPromptFirst,
        "longest-prefix-match": LongestPrefixMatch,
    }
)


def policy_from(spec: object) -> SchedulingPolicy:
    """The policy that ``spec`` stands for.

    A dotted name imports a module, which runs its code: it is chosen by whoever builds the engine and must never
    come from a client's request.

    Args:
      spec: a name in ``POLICIES``, a dotted name "package.module.Class", a class that can be built without
        arguments, or an object with the methods of ``SchedulingPolicy``.

    Raises:
      InvalidRequestError: it is none of these, cannot be imported or built, lacks a method, or its ``window`` is
        not an integer of at least 1.
    """
    found: object = spec
    if isinstance(spec, str):
        found = POLICIES[spec] if spec in POLICIES else _imported(spec)
    if isinstance(found, type):
        try:
            found = found()
        except Exception as error:
            raise _invalid(spec, f"cannot be built without arguments: {error}") from error
    missing = [name for name in ("key", "choose", "victim") if not callable(getattr(found, name, None))]
    if missing:
        raise _invalid(spec, f"is no scheduling policy: it has no method {', '.join(missing)}")
    window = getattr(found, "window", 1)
    if not _is_int(window, 1):
        raise _invalid(spec, f"its window must be an integer of at least 1, not {window!r}")
    return cast(SchedulingPolicy, found)


def _imported(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    if not module:
        raise _invalid(name, f"must be one of {', '.join(POLICIES)}, or a dotted name package.module.Class")
    try:
        # A module of the user's own: whatever it raises is the answer to this name.
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise _invalid(name, f"cannot be imported: {type(error).__name__}: {error}") from error


def _invalid(spec: object, reason: str) -> InvalidRequestError:
    return InvalidRequestError("scheduling_policy", spec, reason)


def _is_int(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _check_int(name: str, value: object, low: int) -> None:
    if not _is_int(value, low):
        raise InvalidRequestError(name, value, f"must be an integer of at least {low}")


def _check_number(name: str, value: object, *, zero: bool) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 < cast(float, value) < math.inf or (zero and value == 0)):
        raise InvalidRequestError(name, value, f"must be {'at least 0' if zero else 'positive'} and finite")
