"""Ray's view of ``prefix_routing``: ranks replicas for the calls of ``Replica.respond``.

It runs in the process of each ingress. Loads are what that ingress has sent and not got back; where Ray knows of
more, from other ingresses, that counts.
"""

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from jaxpaged.serve.prefix_routing import LoadBound, placement

KEYS, AVOID = "keys", "avoid"  # the arguments of a call that are for the router


class PrefixRouter(RequestRouter):
    """Sends a request to the replica that knows its beginning, within a bound on the load.

    Invariant: ``num_under_way[name]`` is how many calls have been sent to a replica and have not ended.
    """

    def initialize_state(self, **options: Any) -> None:
        """Ray gives it the ``request_router_kwargs``: fields of ``LoadBound``."""
        self.bound = LoadBound(**options)
        self.num_under_way: Counter[str] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each, best first; Ray takes the first that has room."""
        call: dict[Any, Any] = {}
        if pending_request is not None:
            call = pending_request.kwargs
            # If none has room, wait a little before the next try.
            pending_request.routing_context.should_backoff = True
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self._load(replica.replica_id) for name, replica in replicas.items()}
        avoided = frozenset(call.get(AVOID, ()))
        order = placement(call.get(KEYS, ()), loads, self.bound)
        order.sort(key=avoided.__contains__)
        return [[replicas[name]] for name in order]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """A call goes out."""
        super().on_send_request(replica_id)
        self.num_under_way[replica_id.unique_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A call has ended, well or not."""
        name = replica_id.unique_id
        self.num_under_way[name] -= 1
        if self.num_under_way[name] <= 0:
            del self.num_under_way[name]

    def _load(self, replica_id: ReplicaID) -> int:
        return max(
            self.num_under_way[replica_id.unique_id], self.replica_queue_len_cache.get(replica_id) or 0
        )
