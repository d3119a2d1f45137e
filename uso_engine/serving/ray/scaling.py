"""How many replicas there should be: enough that what waits is soon done, and no more than are kept busy. Pure, as `policy`."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScalingSettings:
    """When replicas are added and taken away.

    Args:
        queue_s: seconds of work that a replica may have before it; beyond it replicas are added.
        busy: the share of their time that replicas are to be busy; they are taken away until it is reached.

    Raises:
        ValueError: seconds that are not positive, or a share that is not between 0 and 1.
    """

    queue_s: float = 20.0
    busy: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.queue_s < math.inf:
            raise ValueError(f"queue_s must be a positive number of seconds, got {self.queue_s}")
        if not 0 < self.busy <= 1:
            raise ValueError(f"busy must be above 0 and at most 1, got {self.busy}")


def wanted_replicas(
    replicas: int, *, waiting_s: float, busy: float, queued: float, settings: ScalingSettings, least: int, most: int
) -> int:
    """Replicas that the present load needs.

    Args:
        replicas: that there are.
        waiting_s: seconds that all of them together have before them, summed over replicas.
        busy: mean share of their time in which they have a request, from 0 to 1.
        queued: requests that no replica has taken yet.
        settings: what is aimed at.
        least: the fewest there may be.
        most: the most there may be.

    Returns:
        From `least` to `most`.
    """
    if replicas < 1:
        return max(least, min(1, most))
    by_time = math.ceil(waiting_s / settings.queue_s)
    by_busy = math.ceil(replicas * busy / settings.busy)
    wanted = max(by_time, by_busy)
    if queued >= 1 or waiting_s > replicas * settings.queue_s:
        wanted = max(wanted, replicas + 1)
    else:
        # Busy replicas alone are no reason for more: a replica with one request at a time is as busy as one with a queue.
        wanted = min(wanted, replicas)
    return max(least, min(wanted, most))
