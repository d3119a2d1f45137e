"""What a replica counts to report it: work in flight by sender, conditions lately used, time in which it was busy."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .demand import Demand


@dataclass(frozen=True)
class Period:
    """What happened between two reports.

    Args:
        busy: share of the time with at least one request, from 0 to 1.
        tokens_per_s: tokens computed in a second of that time; None without any.
    """

    busy: float
    tokens_per_s: float | None


class Usage:
    """Counts of one replica. From its event loop alone.

    Args:
        clock: seconds that never go back.
        most_keys: conditions that are remembered; the engine's caches are bounded by bytes, so this is an estimate of theirs.
    """

    def __init__(self, clock: Callable[[], float], most_keys: int = 64) -> None:
        self._clock, self._most_keys = clock, most_keys
        self._work: Counter[str] = Counter()
        self._keys: OrderedDict[str, None] = OrderedDict()
        self._running = 0
        self._busy_s, self._began_s = 0.0, 0.0

    @property
    def work(self) -> dict[str, int]:
        """Tokens of the requests in flight, by sender."""
        return dict(self._work)

    @property
    def keys(self) -> frozenset[str]:
        """Conditions that were used lately."""
        return frozenset(self._keys)

    @property
    def busy_s(self) -> float:
        """Seconds with at least one request, so far."""
        return self._busy_s + (self._clock() - self._began_s if self._running else 0.0)

    def begin(self, demand: Demand, sender: str) -> None:
        """A request has come."""
        if not self._running:
            self._began_s = self._clock()
        self._running += 1
        self._work[sender] += demand.work

    def end(self, demand: Demand, sender: str, *, encoded: bool) -> None:
        """A request is over; `encoded` where its conditions were computed or found."""
        self._running -= 1
        if not self._running:
            self._busy_s += self._clock() - self._began_s
        self._work[sender] -= demand.work
        if not self._work[sender]:
            del self._work[sender]
        if encoded:
            self._remember(demand.keys)

    def _remember(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._most_keys:
            self._keys.popitem(last=False)


class Meter:
    """Speed and occupancy between looks; who looks for something else has another one.

    Args:
        usage: what is looked at.
        tokens: tokens computed so far.
        clock: as of `usage`.
    """

    def __init__(self, usage: Usage, tokens: Callable[[], int], clock: Callable[[], float]) -> None:
        self._usage, self._tokens, self._clock = usage, tokens, clock
        self._last = clock(), usage.busy_s, tokens()

    def read(self) -> Period:
        """What has happened since the last time."""
        now = self._clock(), self._usage.busy_s, self._tokens()
        passed_s, busy_s, tokens = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        busy = min(1.0, busy_s / passed_s) if passed_s > 0 else 0.0
        return Period(busy, tokens / busy_s if busy_s > 0 and tokens > 0 else None)
