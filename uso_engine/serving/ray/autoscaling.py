"""The scaling policy on Ray Serve's autoscaler, which applies its delays and bounds."""

from __future__ import annotations

from collections.abc import Mapping

from ray.serve.config import AutoscalingContext

from .scaling import ScalingSettings, wanted_replicas


class WorkScaling:
    """Replicas by seconds of work that wait, and by how busy they are.

    Args:
        settings: fields of `ScalingSettings`.
    """

    def __init__(self, **settings: float) -> None:
        self._settings = ScalingSettings(**settings)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, object]]:
        """How many there should be.

        Args:
            context: Ray's, with what replicas record.

        Returns:
            Their number, and no state.
        """
        metrics: Mapping[str, Mapping[object, float]] = context.aggregated_metrics or {}
        busy = list(metrics.get("busy", {}).values())
        wanted = wanted_replicas(
            context.current_num_replicas,
            waiting_s=sum(metrics.get("waiting_s", {}).values()),
            busy=sum(busy) / len(busy) if busy else 0.0,
            queued=float(context.total_queued_requests or 0),
            settings=self._settings,
            least=context.capacity_adjusted_min_replicas,
            most=context.capacity_adjusted_max_replicas,
        )
        return wanted, {}
