"""The waiting requests: in the policy's order within a tenant, fair across tenants. Ints and floats only."""

import sys
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any

from jaxpaged.errors import InvalidRequestError
from jaxpaged.policies import SchedulingPolicy
from jaxpaged.request import Request

# Order, then the request: the policy's key, arrival_index, index, and the number of the push, which no two share.
Entry = tuple[Any, int, int, int, Request]
# A tenant's place among tenants: its counter and the order of its first entry, as they were when it took it.
Place = tuple[float, tuple[Any, int, int, int], "_Tenant"]


class _Tenant:
    """One tenant's counter and its waiting entries, sorted."""

    __slots__ = ("counter", "entries", "name", "place", "weight")

    def __init__(self, name: str, weight: float, counter: float) -> None:
        self.name = name
        self.weight = weight
        self.counter = counter  # tokens it was given, over its weight
        # A plain list: moving 10,000 pointers takes a microsecond or two, less than a cleverer structure's steps.
        self.entries: list[Entry] = []
        self.place: Place | None = None  # the one valid place in the queue's heap; None while nothing waits

    @property
    def head(self) -> Entry:
        """The first entry."""
        return self.entries[0]

    def discard(self, entry: Entry) -> None:
        position = bisect_left(self.entries, entry)
        if position == len(self.entries) or self.entries[position] is not entry:
            # Keys of a user's policy without a total order, such as nan: the order suffers, no request is lost.
            position = self.entries.index(entry)
        del self.entries[position]


class WaitingQueue:
    """Requests that wait, in the policy's order within each tenant, and fair across tenants.

    Across tenants the Virtual Token Counter decides (Sheng et al., "Fairness in Serving Large Language Models",
    OSDI 2024, arXiv:2401.00588). Each tenant has a counter of the tokens it was given, divided by its weight; the
    next request is one of the waiting tenant with the smallest counter, ties going to the smaller key. So tenants
    that keep the queue filled get tokens in proportion to their weights, however many requests they send. The
    policy orders the requests of one tenant only: with ``Priority``, a tenant's urgent request goes before its
    other ones, never before another tenant's turn.

    Being idle earns nothing. A tenant whose first request joins is lifted to the smallest counter among those that
    wait or, when nobody waits, to that of the tenant that was last to leave; that level never falls. It works only
    if ``charge`` is called as tokens are scheduled, before the next ``peek``: a counter that is charged late lets one
    tenant take a whole step's places.

    Clients may make up tenants' names, so counters of tenants without a waiting request are not kept for ever: of
    more than ``max_idle_tenants`` the half with the smallest counters is forgotten. A forgotten tenant starts again
    at the level that everybody is lifted to, so it is forgiven only what it had been given beyond that, which is
    least where the counter is smallest. Fairness is for tenants whose names were verified before they came here:
    a client that takes a new name for every request is a new tenant every time.

    ``push``, ``peek``, ``remove`` and ``charge`` take microseconds with 10,000 waiting, of one tenant or of as many.
    ``peek`` looks at the policy's ``window`` requests of one tenant.

    Invariants (``check_invariants``):
      * a waiting request is in exactly one tenant's entries, which are sorted;
      * each tenant that waits has exactly one valid place in the heap, not behind where it belongs;
      * the heap and the number of idle tenants are bounded.

    Args:
      policy: orders the requests of a tenant.
      tenant_weights: shares of the tenants, positive and finite; 1 for those not named.
      max_idle_tenants: counters kept of tenants without a waiting request.

    Raises:
      InvalidRequestError: a weight is not positive and finite, or a name no string.
    """

    def __init__(
        self,
        policy: SchedulingPolicy,
        tenant_weights: Mapping[str, float] | None = None,
        *,
        max_idle_tenants: int = 1024,
    ) -> None:
        assert max_idle_tenants >= 1
        self._policy = policy
        self._window: int = getattr(policy, "window", 1)
        self._weights = _checked_weights(tenant_weights)
        self._max_idle_tenants = max_idle_tenants
        self._entries: dict[Request, tuple[_Tenant, Entry]] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._num_waiting_tenants = 0
        self._num_pushed = 0
        self._last_left: _Tenant | None = None
        # Counters grow and heads go, so a place that has become outdated is too far ahead, never too far behind: it
        # is put right when it comes up. Only a smaller head needs a new place at once, and leaves a dead one.
        self._places: list[Place] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request: object) -> bool:
        return request in self._entries

    def __iter__(self) -> Iterator[Request]:
        """All of them, tenant after tenant, each tenant's in order; the queue must not change meanwhile."""
        for tenant in self._tenants.values():
            yield from (entry[4] for entry in tenant.entries)

    def push(self, request: Request) -> None:
        """Queues a request, a preempted one as well.

        Raises:
          ValueError: it waits already.
        """
        if request in self._entries:
            raise ValueError(f"{request!r} waits already")
        key = self._policy.key(request)
        self._num_pushed += 1
        entry: Entry = (key, request.arrival_index, request.index, self._num_pushed, request)
        tenant = self._tenant(request.tenant)
        was_idle = not tenant.entries
        insort(tenant.entries, entry)
        if was_idle:
            tenant.counter = max(tenant.counter, self._level())
            self._num_waiting_tenants += 1
        self._entries[request] = (tenant, entry)
        if tenant.head is entry:
            self._take_place(tenant)

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is.

        Raises:
          ValueError: it does not wait.
        """
        found = self._entries.pop(request, None)
        if found is None:
            raise ValueError(f"{request!r} does not wait")
        tenant, entry = found
        tenant.discard(entry)
        if not tenant.entries:
            tenant.place = None
            self._last_left = tenant
            self._num_waiting_tenants -= 1
            self._bound_places()
            self._forget_idle()

    def peek(self, num_cached_tokens: Callable[[Request], int]) -> Request | None:
        """The one to admit next, which stays in the queue; None when nobody waits.

        Args:
          num_cached_tokens: for the policy, see ``SchedulingPolicy.choose``.

        Raises:
          IndexError: the policy chose none of the candidates.
        """
        tenant = self._next_tenant()
        if tenant is None:
            return None
        if self._window == 1:
            return tenant.head[4]
        candidates = [entry[4] for entry in tenant.entries[: self._window]]
        if len(candidates) == 1:
            return candidates[0]
        chosen = self._policy.choose(candidates, num_cached_tokens)
        if not 0 <= chosen < len(candidates):
            raise IndexError(f"{self._policy!r} chose {chosen!r} of {len(candidates)} candidates")
        return candidates[chosen]

    def charge(self, request: Request, num_tokens: int) -> None:
        """Counts tokens, prompt and output alike, that the request's tenant was given; it need not wait."""
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            tenant = self._tenant(request.tenant)
            tenant.counter += num_tokens / tenant.weight
            self._forget_idle()
        else:
            tenant.counter += num_tokens / tenant.weight

    def counter(self, tenant: str) -> float:
        """The tenant's virtual counter, in tokens over its weight; that of a new tenant if it is not known."""
        known = self._tenants.get(tenant)
        return self._level() if known is None else known.counter

    def _tenant(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            # Not 0: what a forgotten tenant that still runs is charged would vanish when it is lifted.
            tenant = _Tenant(name, self._weights.get(name, 1.0), self._level())
            self._tenants[name] = tenant
        return tenant

    def _level(self) -> float:
        """What the counter of a tenant that joins is lifted to."""
        tenant = self._next_tenant() or self._last_left
        return 0.0 if tenant is None else tenant.counter

    def _next_tenant(self) -> _Tenant | None:
        """The waiting tenant with the smallest counter, then the smallest head."""
        places = self._places
        while places:
            place = places[0]
            counter, order, tenant = place
            if tenant.place is not place:
                heappop(places)
            elif counter != tenant.counter or order[3] != tenant.head[3]:
                tenant.place = (tenant.counter, tenant.head[:4], tenant)
                heapreplace(places, tenant.place)
            else:
                return tenant
        return None

    def _take_place(self, tenant: _Tenant) -> None:
        """Gives a tenant the place of its present head; the place it had is dead."""
        tenant.place = (tenant.counter, tenant.head[:4], tenant)
        heappush(self._places, tenant.place)
        self._bound_places()

    def _bound_places(self) -> None:
        if len(self._places) > self._max_places:
            self._places = [place for place in self._places if place[2].place is place]
            heapify(self._places)

    @property
    def _max_places(self) -> int:
        return 2 * self._num_waiting_tenants + 16

    def _forget_idle(self) -> None:
        """Half of them at once: a search at every forgetting would cost too much."""
        if len(self._tenants) - self._num_waiting_tenants <= self._max_idle_tenants:
            return
        tenants = self._tenants.values()
        # The one that left last sets the level while nobody waits.
        idle = [tenant for tenant in tenants if not tenant.entries and tenant is not self._last_left]
        idle.sort(key=lambda tenant: tenant.counter)
        for tenant in idle[: (len(idle) + 1) // 2]:
            del self._tenants[tenant.name]

    def check_invariants(self) -> None:
        """Asserts the invariants."""
        waiting = [tenant for tenant in self._tenants.values() if tenant.entries]
        assert all(name == tenant.name for name, tenant in self._tenants.items()), (
            "a tenant under another's name"
        )
        for tenant in waiting:
            assert tenant.entries == sorted(tenant.entries), "entries out of order"
            assert all(self._entries[entry[4]] == (tenant, entry) for entry in tenant.entries), (
                "entry misplaced"
            )
            assert tenant.place is not None, "a waiting tenant without a place"
            assert tenant.place[:2] <= (tenant.counter, tenant.head[:4]), "a place too far behind"
        assert sum(len(tenant.entries) for tenant in waiting) == len(self._entries), (
            "a waiting request is lost"
        )
        assert len(waiting) == self._num_waiting_tenants, "tenants miscounted"
        places = self._places
        valid = [place for place in places if place[2].place is place]
        assert {id(place[2]) for place in valid} == set(map(id, waiting)), (
            "a waiting tenant's place is missing"
        )
        assert len(valid) == len(waiting), "a tenant has two places"
        assert all(places[(i - 1) // 2][:2] <= places[i][:2] for i in range(1, len(places))), "not a heap"
        assert len(places) <= self._max_places, "too many dead places"
        assert len(self._tenants) - len(waiting) <= self._max_idle_tenants, "too many idle tenants"


def _checked_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    if weights is None:
        return {}
    if not isinstance(weights, Mapping):
        raise InvalidRequestError("tenant_weights", weights, "must map tenants to their weights")
    for name, weight in weights.items():
        if not isinstance(name, str):
            raise InvalidRequestError("tenant_weights", weights, f"the tenant {name!r} must be a string")
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight <= sys.float_info.max:
            raise InvalidRequestError(
                "tenant_weights",
                weights,
                f"the weight of {name!r} must be positive and finite, not {weight!r}",
            )
    return {name: float(weight) for name, weight in weights.items()}
