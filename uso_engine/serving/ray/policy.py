"""Which replica gets a request: one with the fewest tokens in flight and, among equals, one that has its conditions encoded.

Pure: no Ray, no clock, no chance. Whoever asks says which replicas there are, what they have reported, and what time it is, so
that tests, the simulator and the adapter on Ray Serve run the same code. Not for several threads at once: `Fleet` has the lock.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from statistics import median
from zlib import crc32

from .demand import Demand
from .report import Identity, Report


@dataclass(frozen=True)
class RoutingSettings:
    """How replicas are compared.

    Args:
        equal_share: loads that differ by less than this share of the request's own work count as equal.
        slow_ratio: a replica that computes fewer tokens a second than this share of the median is slow.
        rest_s: seconds for which a slow one gets no requests.
        alternatives: replicas that are named beside the best, for when it is full.

    Raises:
        ValueError: a share outside 0 to 1, or a time that is not positive.
    """

    equal_share: float = 0.1
    slow_ratio: float = 0.33
    rest_s: float = 60.0
    alternatives: int = 7

    def __post_init__(self) -> None:
        for name in ("equal_share", "slow_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not self.rest_s > 0 or self.alternatives < 0:
            raise ValueError(f"expected a positive rest_s and no negative alternatives, got {self.rest_s}, {self.alternatives}")


class RoutingTable:
    """What one ingress knows of the replicas, and the choice among them.

    Args:
        ingress: its own name: what it has sent itself it knows better than any report.
        settings: of the choice.
    """

    def __init__(self, ingress: str, settings: RoutingSettings | None = None) -> None:
        self._ingress, self._settings = ingress, settings or RoutingSettings()
        self._sent: dict[str, tuple[str, int]] = {}  # request: replica, work
        self._own: dict[str, int] = {}
        self._load: dict[str, int] = {}
        self._reports: dict[str, Report] = {}
        self._holders: dict[str, set[str]] = {}
        self._keys: dict[str, set[str]] = {}
        self._resting: dict[str, float] = {}
        self._refused: frozenset[str] = frozenset()

    @property
    def reports(self) -> dict[str, Report]:
        """The last report of each replica that there is."""
        return dict(self._reports)

    @property
    def refused(self) -> frozenset[str]:
        """Replicas that get nothing: they should compute with the same as the others of their configuration, and do not."""
        return self._refused

    def load(self, replica: str) -> int:
        """Tokens in flight on a replica, as far as they are known here."""
        return self._load.get(replica, 0)

    def set_replicas(self, replicas: Collection[str]) -> None:
        """Say which replicas there are; what is known of others is forgotten, but not what was sent to them."""
        present = set(replicas)
        for gone in self._load.keys() - present:
            self._forget(gone)
        for replica in present - self._load.keys():
            self._load[replica] = self._own.get(replica, 0)
        self._refused = refused_of(self._reports)

    def report(self, replica: str, report: Report, now_s: float) -> None:
        """Take a replica's word for what it does; nothing happens for one that is not there.

        Args:
            replica: which.
            report: of it.
            now_s: seconds on any clock, the same for all calls.
        """
        if replica not in self._load or self._reports.get(replica) == report:
            return
        known = self._reports.get(replica)
        self._reports[replica] = report
        others = sum(work for ingress, work in report.work.items() if ingress != self._ingress)
        self._load[replica] = self._own.get(replica, 0) + others
        held = self._keys.get(replica, set())
        self._drop_keys(replica, held - report.keys)
        self._add_keys(replica, report.keys - held)
        if known is None or known.identity != report.identity:
            self._refused = refused_of(self._reports)
        if report.tokens_per_s is not None and self._is_slow(report.tokens_per_s):
            self._resting[replica] = now_s + self._settings.rest_s

    def choose(self, demand: Demand, now_s: float) -> list[str]:
        """The replicas that a request may go to, the best first.

        Args:
            demand: the request's.
            now_s: as for `report`.

        Returns:
            The best and some alternatives by load; empty where there is no replica at all.
        """
        usable = self._usable(demand, now_s)
        if not usable:
            return []
        best = self._best(demand, usable)
        if not self._settings.alternatives or len(usable) == 1:
            return [best]
        others = [replica for replica in usable if replica != best]
        return [best, *heapq.nsmallest(self._settings.alternatives, others, key=self._load.__getitem__)]

    def sent(self, demand: Demand, replica: str) -> None:
        """A request goes to a replica; another call moves it."""
        self.ended(demand.id)
        self._sent[demand.id] = replica, demand.work
        self._add_work(replica, demand.work)
        if replica in self._load:
            self._add_keys(replica, demand.keys)

    def ended(self, request: str) -> None:
        """A request is over, however; nothing happens for one that is not in flight."""
        entry = self._sent.pop(request, None)
        if entry is not None:
            self._add_work(entry[0], -entry[1])

    def _usable(self, demand: Demand, now_s: float) -> list[str]:
        """Replicas that are not ruled out; where all are, the least of reasons is passed over."""
        for replica in [replica for replica, until in self._resting.items() if until <= now_s]:
            del self._resting[replica]
        replicas: Iterable[str] = self._load
        # From what may never be to what is only unwise.
        wrong = self._refused | (self._of_other_identity(demand) if demand.identity is not None else frozenset())
        for ruled_out in (wrong, demand.avoid, self._resting):
            if ruled_out:
                left = [replica for replica in replicas if replica not in ruled_out]
                replicas = left or list(replicas)
        return list(replicas)

    def _best(self, demand: Demand, usable: list[str]) -> str:
        load = self._load
        margin = demand.work * self._settings.equal_share
        limit = min(map(load.__getitem__, usable)) + margin
        equal = [replica for replica in usable if load[replica] <= limit]
        if len(equal) == 1:
            return equal[0]
        matching = self._most_matching(demand, equal)
        # The same pictures go the same way from every ingress, and requests without any are spread.
        seed = min(demand.pictures or demand.prompts or {demand.id}).encode()
        return min(matching, key=lambda replica: (crc32(replica.encode(), crc32(seed)), replica))

    def _most_matching(self, demand: Demand, equal: list[str]) -> list[str]:
        """Those with the LoRAs first, since weights change for others; then with most of the pictures, then of the prompts."""
        merged = [replica for replica in equal if self._loras_of(replica) == demand.loras]
        equal = merged or equal
        for keys in (demand.pictures, demand.prompts):
            held = [self._holders[key] for key in keys if key in self._holders]
            if held:
                counts = {replica: sum(replica in holders for holders in held) for replica in equal}
                most = max(counts.values())
                equal = [replica for replica in equal if counts[replica] == most]
        return equal

    def _loras_of(self, replica: str) -> str:
        report = self._reports.get(replica)
        return "" if report is None else report.loras

    def _of_other_identity(self, demand: Demand) -> frozenset[str]:
        return frozenset(replica for replica, report in self._reports.items() if report.identity.digest != demand.identity)

    def _is_slow(self, tokens_per_s: float) -> bool:
        rates = [report.tokens_per_s for report in self._reports.values() if report.tokens_per_s is not None]
        return len(rates) > 1 and tokens_per_s < self._settings.slow_ratio * median(rates)

    def _add_work(self, replica: str, work: int) -> None:
        left = self._own.get(replica, 0) + work
        if left:
            self._own[replica] = left
        else:
            self._own.pop(replica, None)
        if replica in self._load:
            self._load[replica] += work

    def _add_keys(self, replica: str, keys: Iterable[str]) -> None:
        held = self._keys.setdefault(replica, set())
        for key in keys:
            held.add(key)
            self._holders.setdefault(key, set()).add(replica)

    def _drop_keys(self, replica: str, keys: Iterable[str]) -> None:
        for key in keys:
            self._keys[replica].discard(key)
            holders = self._holders[key]
            holders.discard(replica)
            if not holders:
                del self._holders[key]

    def _forget(self, replica: str) -> None:
        del self._load[replica]
        self._reports.pop(replica, None)
        self._resting.pop(replica, None)
        self._drop_keys(replica, list(self._keys.get(replica, ())))
        self._keys.pop(replica, None)


def refused_of(reports: dict[str, Report]) -> frozenset[str]:
    """Replicas whose versions or weights differ from most of those with the same configuration.

    Where as many say one thing as another, those that were loaded first are right. Every ingress that has the same reports
    comes to the same answer, and some replica of each configuration always stays.
    """
    groups: dict[str, list[tuple[str, Report]]] = {}
    for replica, report in reports.items():
        groups.setdefault(report.identity.configuration, []).append((replica, report))
    refused: set[str] = set()
    for members in groups.values():
        agreed = _agreed([report for _, report in members])
        refused |= {replica for replica, report in members if report.identity != agreed}
    return frozenset(refused)


def _agreed(reports: list[Report]) -> Identity:
    votes = Counter(report.identity for report in reports)
    oldest = {identity: min(r.started_s for r in reports if r.identity == identity) for identity in votes}
    return max(votes, key=lambda identity: (votes[identity], -oldest[identity], identity.digest))
