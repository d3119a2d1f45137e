"""The policy on Ray Serve's request router: runs in every process that sends requests to the engines."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from .fleet import Fleet, fleet_of
from .messages import Order
from .policy import RoutingSettings


class WorkRouter(RequestRouter):  # type: ignore[misc]  # Ray is untyped here
    """Ranks replicas by `RoutingTable`; requests that are no orders go to any."""

    def initialize_state(self, **settings: float) -> None:
        """Take the routing settings of the application.

        Args:
            settings: fields of `RoutingSettings`.
        """
        self._fleet: Fleet = fleet_of(str(self._deployment_id))
        self._fleet.configure(RoutingSettings(**settings))  # type: ignore[arg-type]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica in each rank, so that Ray takes the first that is not full."""
        order = _order_of(pending_request)
        if order is None or pending_request is None:
            return [candidate_replicas]
        # Without it Ray asks again at once, again and again, while all replicas are full.
        pending_request.routing_context.should_backoff = True
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[name]] for name in self._fleet.choose(order.demand, by_name)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Count the work where it went."""
        order = _order_of(pending_request)
        if order is not None:
            self._fleet.routed(order.demand, replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take note of replicas that have come, gone, or reported."""
        super().update_replicas(replicas)
        self._tell_fleet()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Take note of one that is gone before Ray's controller says so."""
        super().on_replica_actor_died(replica_id)
        self._tell_fleet()

    def _tell_fleet(self) -> None:
        self._fleet.set_replicas({key.unique_id: replica.routing_stats for key, replica in self.curr_replicas.items()})


def _order_of(pending: PendingRequest | None) -> Order | None:
    """The order in a request's arguments, before they are pickled."""
    if pending is None or not pending.args or not isinstance(pending.args[0], Order):
        return None
    return pending.args[0]
