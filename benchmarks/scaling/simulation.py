"""Discrete events: requests come, are routed by `RoutingTable` or another rule, end; replicas come, report, and are lost."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from uso_engine.serving.ray.policy import RoutingSettings, RoutingTable
from uso_engine.serving.ray.report import Identity, Report
from uso_engine.serving.ray.scaling import ScalingSettings, wanted_replicas

from .replica import SimulatedReplica
from .requests import SimulatedRequest

Rule = Literal["ours", "two choices", "random"]
ZONES = 3
REPORT_S = 2.0
SCALING_S = 5.0
GIVEN_UP_S = 3600.0
"""After the last arrival; what is not answered then is lost."""
STARTING_S = 90.0
"""From the decision for a replica until it takes requests: a pod, and 24 GB of weights that a node has on its disk."""
ROUTING, SCALING = RoutingSettings(alternatives=0), ScalingSettings()
IDENTITY = Identity("simulated", "simulated", "simulated")


@dataclass(frozen=True)
class Deployment:
    """What is simulated.

    Args:
        replicas: at the beginning.
        ingresses: processes that route, each with a table of its own.
        rule: of routing: ours, the less loaded of two drawn ones (Ray Serve's own), or any.
        routing: of ours.
        most: replicas that there may be; None leaves their number alone.
        scaling: of their number.
        lost_zone_s: when a third of them is lost at once.
        most_waiting: requests that a replica takes before others are refused.
        seed: of what is drawn.
    """

    replicas: int
    ingresses: int = 2
    rule: Rule = "ours"
    routing: RoutingSettings = ROUTING
    most: int | None = None
    scaling: ScalingSettings = SCALING
    lost_zone_s: float | None = None
    most_waiting: int = 64
    seed: int = 1


@dataclass
class Outcome:
    """What became of a trace.

    Args:
        ended: moment of arrival, seconds until the result, kind; of each request that was answered.
        refused: requests for which there was no room.
        run_again: requests that were lost with a replica and ran again.
        lost: requests that were not answered in an hour.
        hits: conditions that were cached.
        lookups: conditions that were needed.
        replicas: moments, and how many took requests then.
        busy: share of the replicas' time that was used.
        end_s: of the last.
    """

    ended: list[tuple[float, float, str]] = field(default_factory=list)
    refused: int = 0
    run_again: int = 0
    lost: int = 0
    hits: int = 0
    lookups: int = 0
    replicas: list[tuple[float, int]] = field(default_factory=list)
    busy: float = 0.0
    end_s: float = 0.0


class Simulation:
    """One trace through one deployment.

    Args:
        deployment: what there is.
        trace: what comes, in order.
    """

    def __init__(self, deployment: Deployment, trace: Sequence[SimulatedRequest]) -> None:
        self._deployment, self._trace = deployment, trace
        self._drawn = random.Random(deployment.seed)
        self._tables = [RoutingTable(f"ingress {n}", deployment.routing) for n in range(deployment.ingresses)]
        self._senders: dict[str, int] = {}
        self._replicas: dict[str, SimulatedReplica] = {}
        self._names: list[str] = []
        self._versions: dict[str, int] = {}
        self._events: list[tuple[float, int, str, Any]] = []
        self._number = 0
        self._left = len(trace)
        self._started = self._pending = 0
        self._wanted_down_since: float | None = None
        self._busy_before: dict[str, float] = {}
        self._replica_s = self._gone_busy_s = 0.0
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """All of it."""
        for _ in range(self._deployment.replicas):
            self._start(0.0)
        for request in self._trace:
            self._at(request.at_s, "arrival", request)
        self._at(REPORT_S, "report", None)
        if self._deployment.most is not None:
            self._at(SCALING_S, "scaling", None)
        if self._deployment.lost_zone_s is not None:
            self._at(self._deployment.lost_zone_s, "loss", None)
        now_s, last_s = 0.0, self._trace[-1].at_s + GIVEN_UP_S
        while self._left and now_s < last_s:
            before_s, (now_s, _, kind, what) = now_s, heapq.heappop(self._events)
            self._replica_s += (now_s - before_s) * len(self._replicas)
            getattr(self, f"_on_{kind}")(now_s, what)
        self._finish(now_s)
        return self.outcome

    def _at(self, when_s: float, kind: str, what: object) -> None:
        self._number += 1
        heapq.heappush(self._events, (when_s, self._number, kind, what))

    def _on_arrival(self, now_s: float, request: SimulatedRequest) -> None:
        ingress = self._senders.setdefault(request.demand.id, self._drawn.randrange(len(self._tables)))
        name = self._route(request, self._tables[ingress], now_s)
        if name is None or len(self._replicas[name].jobs) >= self._deployment.most_waiting:
            self.outcome.refused += 1
            self._left -= 1
            return
        self._tables[ingress].sent(request.demand, name)
        self._replicas[name].begin(request, now_s)
        self._plan(name)

    def _route(self, request: SimulatedRequest, table: RoutingTable, now_s: float) -> str | None:
        if not self._names:
            return None
        if self._deployment.rule == "ours":
            return table.choose(request.demand, now_s)[0]
        drawn = [self._drawn.choice(self._names) for _ in range(1 if self._deployment.rule == "random" else 2)]
        # Ray Serve asks both for their requests when it has to choose.
        return min(drawn, key=lambda name: len(self._replicas[name].jobs))

    def _on_end(self, now_s: float, what: tuple[str, int]) -> None:
        name, version = what
        if name not in self._replicas or self._versions[name] != version:
            return  # Others came meanwhile, or it is gone.
        replica = self._replicas[name]
        replica.advance(now_s)
        for request in replica.take_done():
            self._forget(request)
            self.outcome.ended.append((request.at_s, now_s - request.at_s, request.kind))
            self._left -= 1
        self._plan(name)

    def _on_report(self, now_s: float, _: object) -> None:
        for name, replica in self._replicas.items():
            by_sender: dict[str, int] = {}
            for job in replica.jobs:
                sender = f"ingress {self._senders[job.request.demand.id]}"
                by_sender[sender] = by_sender.get(sender, 0) + job.request.demand.work
            report = Report(IDENTITY, 0.0, by_sender, replica.keys)
            if self._deployment.rule == "ours":
                for table in self._tables:
                    table.report(name, report, now_s)
        self._at(now_s + REPORT_S, "report", None)

    def _on_scaling(self, now_s: float, _: object) -> None:
        """The autoscaler's decision, with Ray's delay before replicas are taken away."""
        deployment = self._deployment
        assert deployment.most is not None
        for replica in self._replicas.values():
            replica.advance(now_s)
        waiting_s = sum(job.left_s for replica in self._replicas.values() for job in replica.jobs)
        recent = [replica.busy_s - self._busy_before.get(name, 0.0) for name, replica in self._replicas.items()]
        self._busy_before = {name: replica.busy_s for name, replica in self._replicas.items()}
        count = len(self._replicas)
        wanted = wanted_replicas(
            count,
            waiting_s=waiting_s,
            busy=min(1.0, sum(recent) / (SCALING_S * max(1, count))),
            queued=0,
            settings=deployment.scaling,
            least=deployment.replicas,
            most=deployment.most,
        )
        for _ in range(wanted - count - self._pending):
            self._pending += 1
            self._at(now_s + STARTING_S, "start", None)
        self._remove_idle(count - wanted if not self._pending else 0, now_s)
        self._at(now_s + SCALING_S, "scaling", None)

    def _remove_idle(self, surplus: int, now_s: float, patience_s: float = 120.0) -> None:
        if surplus <= 0:
            self._wanted_down_since = None
            return
        if self._wanted_down_since is None:
            self._wanted_down_since = now_s
        if now_s - self._wanted_down_since < patience_s:
            return
        for name in [name for name, replica in self._replicas.items() if not replica.jobs][:surplus]:
            self._stop(name)
        self._wanted_down_since = None

    def _on_start(self, now_s: float, _: object) -> None:
        self._pending -= 1
        self._start(now_s)

    def _on_loss(self, now_s: float, _: object) -> None:
        """A zone is gone: its requests run again elsewhere, and as many replicas are started."""
        gone = [replica for replica in self._replicas.values() if replica.zone == 0]
        for replica in gone:
            replica.advance(now_s)
            self._stop(replica.name)
            self._pending += 1
            self._at(now_s + STARTING_S, "start", None)
        for replica in gone:
            for job in replica.jobs:
                self.outcome.run_again += 1
                self._forget(job.request)
                demand = replace(job.request.demand, avoid=frozenset({replica.name}), identity=IDENTITY.digest)
                self._on_arrival(now_s, replace(job.request, demand=demand))

    def _start(self, now_s: float) -> None:
        name = f"replica {self._started}"
        self._replicas[name] = SimulatedReplica(name, self._started % ZONES, now_s)
        self._versions[name] = 0
        self._started += 1
        self._members_changed(now_s)

    def _stop(self, name: str) -> None:
        replica = self._replicas.pop(name)
        self._gone_busy_s += replica.busy_s
        self.outcome.hits += replica.hits
        self.outcome.lookups += replica.lookups
        self._members_changed(replica._now_s)

    def _members_changed(self, now_s: float) -> None:
        self._names = list(self._replicas)
        self.outcome.replicas.append((now_s, len(self._names)))
        if len(self._names) >= self._deployment.replicas or now_s > 0:
            for table in self._tables:
                table.set_replicas(self._names)

    def _forget(self, request: SimulatedRequest) -> None:
        self._tables[self._senders[request.demand.id]].ended(request.demand.id)

    def _plan(self, name: str) -> None:
        self._versions[name] += 1
        end_s = self._replicas[name].next_end_s()
        if end_s is not None:
            self._at(end_s, "end", (name, self._versions[name]))

    def _finish(self, now_s: float) -> None:
        outcome = self.outcome
        outcome.hits += sum(replica.hits for replica in self._replicas.values())
        outcome.lookups += sum(replica.lookups for replica in self._replicas.values())
        used_s = self._gone_busy_s + sum(replica.busy_s for replica in self._replicas.values())
        outcome.busy, outcome.end_s = used_s / max(1e-9, self._replica_s), now_s
        outcome.lost = self._left
