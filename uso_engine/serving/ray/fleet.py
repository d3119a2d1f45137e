"""The replicas as one process sees them: the router that chooses and the engine's stand-in that sends share this."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping

from .demand import Demand
from .policy import RoutingSettings, RoutingTable
from .report import Report, read_report

logger = logging.getLogger(__name__)


class Fleet:
    """A `RoutingTable` under a lock: Ray's router has a thread of its own.

    Args:
        settings: of the choice.
        clock: seconds that never go back.
    """

    def __init__(self, settings: RoutingSettings | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.ingress = secrets.token_hex(6)
        """What this process calls itself to the replicas."""
        self._clock = clock
        self._lock = threading.Lock()
        self._table = RoutingTable(self.ingress, settings)
        self._active: set[str] = set()

    def configure(self, settings: RoutingSettings) -> None:
        """Choose by other settings from now on; what is known of replicas is learnt anew from their next reports."""
        with self._lock:
            self._table = RoutingTable(self.ingress, settings)

    def set_replicas(self, reports: Mapping[str, Mapping[str, object]]) -> None:
        """Say which replicas there are, each with its last report, which is empty before the first."""
        with self._lock:
            before = self._table.refused
            self._table.set_replicas(reports)
            for replica, plain in reports.items():
                if plain:
                    self._take(replica, plain)
            refused = self._table.refused
        for replica in sorted(refused - before):
            logger.error("replica %s computes with another version or other weights than most; it gets no requests", replica)

    def choose(self, demand: Demand, replicas: Collection[str]) -> list[str]:
        """Replicas for a request, the best first, for which it counts from now on.

        Args:
            demand: the request's.
            replicas: of those that there are, the ones that may be chosen now.
        """
        with self._lock:
            found = [replica for replica in self._table.choose(demand, self._clock()) if replica in replicas]
            if found and demand.id in self._active:
                self._table.sent(demand, found[0])
            return found

    def begin(self, request: str) -> None:
        """A request is to be sent."""
        with self._lock:
            self._active.add(request)

    def routed(self, demand: Demand, replica: str) -> None:
        """A replica has taken a request; it may be another one than the best."""
        with self._lock:
            if demand.id in self._active:  # It may have been given up meanwhile.
                self._table.sent(demand, replica)

    def end(self, request: str) -> None:
        """A request is over."""
        with self._lock:
            self._active.discard(request)
            self._table.ended(request)

    @property
    def reports(self) -> dict[str, Report]:
        """The last report of each replica that there is."""
        with self._lock:
            return self._table.reports

    @property
    def refused(self) -> frozenset[str]:
        """As `RoutingTable.refused`."""
        with self._lock:
            return self._table.refused

    def _take(self, replica: str, plain: Mapping[str, object]) -> None:
        try:
            report = read_report(plain)
        except ValueError as error:
            logger.error("replica %s: %s", replica, error)
            return
        self._table.report(replica, report, self._clock())


_fleets: dict[str, Fleet] = {}
_making = threading.Lock()


def fleet_of(deployment: str) -> Fleet:
    """The fleet of a deployment in this process; the same one for the same name."""
    with _making:
        return _fleets.setdefault(deployment, Fleet())
