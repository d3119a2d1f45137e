"""A simulated replica: one GPU whose time is shared as the engine's scheduler shares steps, with caches of conditions."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from .requests import SimulatedRequest

CACHED = 64
"""Conditions of each kind that a replica keeps."""


@dataclass(eq=False)
class Job:
    """A request on a replica.

    Args:
        request: it.
        left_s: seconds of the GPU that it still needs.
    """

    request: SimulatedRequest
    left_s: float


class SimulatedReplica:
    """A GPU with requests in flight.

    Half of its time goes to the request that came first, half to the one with the least left: what steps shared between those
    two lines come to when a step is short against a request.

    Args:
        name: of it.
        zone: where it stands.
        now_s: when it begins.
    """

    def __init__(self, name: str, zone: int, now_s: float) -> None:
        self.name, self.zone = name, zone
        self.jobs: list[Job] = []
        self.busy_s = 0.0
        self.hits = self.lookups = 0
        self._now_s = now_s
        self._keys: frozenset[str] | None = None
        self._caches: dict[str, OrderedDict[str, None]] = {
            "prompt": OrderedDict(),
            "content": OrderedDict(),
            "style": OrderedDict(),
        }

    @property
    def keys(self) -> frozenset[str]:
        """Of what is cached."""
        if self._keys is None:
            self._keys = frozenset(key for cache in self._caches.values() for key in cache)
        return self._keys

    @property
    def work(self) -> int:
        """Tokens of requests in flight."""
        return sum(job.request.demand.work for job in self.jobs)

    def begin(self, request: SimulatedRequest, now_s: float) -> None:
        """Take a request."""
        self.advance(now_s)
        self.jobs.append(Job(request, request.compute_s + self._encode(request)))

    def advance(self, now_s: float) -> None:
        """Compute until a moment; nobody may be done before it."""
        passed_s, self._now_s = now_s - self._now_s, now_s
        if self.jobs and passed_s > 0:
            self.busy_s += passed_s
            for job, share in self._shares():
                job.left_s -= share * passed_s

    def next_end_s(self) -> float | None:
        """When the next request is done if none comes meanwhile; None without any."""
        if not self.jobs:
            return None
        return self._now_s + min(max(0.0, job.left_s) / share for job, share in self._shares())

    def take_done(self) -> list[SimulatedRequest]:
        """Requests that are done now."""
        done = [job for job in self.jobs if job.left_s <= 1e-9]
        self.jobs = [job for job in self.jobs if job.left_s > 1e-9]
        return [job.request for job in done]

    def _shares(self) -> list[tuple[Job, float]]:
        first, shortest = self.jobs[0], min(self.jobs, key=lambda job: job.left_s)
        return [(first, 1.0)] if first is shortest else [(first, 0.5), (shortest, 0.5)]

    def _encode(self, request: SimulatedRequest) -> float:
        """Seconds for the conditions that are not cached, which they are from then on."""
        seconds = 0.0
        for key, cost_s in request.encoding_s.items():
            cache = self._caches[key.split()[0]]
            self.lookups += 1
            if key in cache:
                self.hits += 1
            else:
                seconds += cost_s
                self._keys = None
            cache[key] = None
            cache.move_to_end(key)
            if len(cache) > CACHED:
                cache.popitem(last=False)
        return seconds
