"""An engine that is many: each request goes to a replica, and to another one if that is lost. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from uso_engine.api.events import Conditioning, Done, Event, Queued, Stepped
from uso_engine.api.request import GenerationRequest
from uso_engine.api.result import GenerationResult
from uso_engine.api.statistics import EngineStatistics
from uso_engine.conditioning.cache_statistics import CacheStatistics
from uso_engine.config import EngineConfig
from uso_engine.errors import EngineClosedError, EngineDeadError, EngineDrainingError, RequestTimeoutError
from uso_engine.sampling.graph_statistics import GraphStatistics

from .demand import demand_of
from .fleet import Fleet
from .messages import Failed, Message, Order, Refused, Taken, fields_of

logger = logging.getLogger(__name__)

Send = Callable[[Order], AbstractAsyncContextManager[AsyncIterator[Message]]]
"""Sends an order and gives what comes back; leaving it cancels what is not done. Raises `ReplicaLostError`."""
_SUMMED = (
    *("queued", "running", "queued_bytes", "steps", "tokens", "tokens_in_step", "requests_in_step"),
    *("batches_formed", "lora_switches", "memory_retries"),
)
_SUMMED_OF_GRAPHS = ("kept", "held_bytes", "captured", "replayed", "eager", "evicted")
_ENDED = (EngineDeadError, EngineClosedError, EngineDrainingError)


class ReplicaLostError(Exception):
    """A replica ended, or cannot be reached, before it had answered."""


@dataclass
class _Told:
    """What a caller has heard of a request, so that another run of it does not tell it again."""

    kinds: set[type[Event]] = field(default_factory=set)
    steps: int = 0

    def is_new(self, event: Event) -> bool:
        if isinstance(event, Stepped):
            new = event.index >= self.steps
            self.steps = max(self.steps, event.index + 1)
            return new
        new = type(event) not in self.kinds and not (self.steps and isinstance(event, (Queued, Conditioning)))
        self.kinds.add(type(event))
        return new


class RemoteEngine:
    """A `ServedEngine` whose requests are computed by replicas.

    Args:
        config: of the replicas' engines.
        fleet: what is known of them here.
        send: reaches them.
        max_queued: requests that may wait here for a replica.
        ingresses: processes that send to the replicas, this one among them.
    """

    def __init__(self, config: EngineConfig, fleet: Fleet, send: Send, *, max_queued: int, ingresses: int = 1) -> None:
        self.config = config
        self.failure: BaseException | None = None  # Ray starts another replica for one that is lost.
        self._fleet, self._send, self._max_queued, self._ingresses = fleet, send, max_queued, ingresses
        self._draining = False
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def places(self) -> int:
        """This ingress's share of what the replicas that there are take at once, and those that may wait here for one."""
        replicas = max(1, len(self._fleet.reports.keys() - self._fleet.refused))  # The first is there before it has reported.
        return replicas * self.config.queue.max_requests // self._ingresses + self._max_queued

    async def generate(
        self, request: GenerationRequest, /, *, priority: int = 0, timeout_s: float | None = None
    ) -> GenerationResult:
        """The images of a request; cancelling the task cancels it on its replica.

        Raises:
            EngineDeadError: the replica was lost, and so was the next one.
            EngineDrainingError: no requests are taken any more.
            RequestTimeoutError: it was not done in time, its wait for a replica included.
            QueueFullError: more would have to wait than may.
            Exception: whatever the engine says of the request.
        """
        async with aclosing(self._run(request, priority, timeout_s, events=False, previews=False)) as events:
            async for event in events:
                if isinstance(event, Done):
                    return event.result
        raise EngineDeadError("a replica ended a request without its result")

    async def stream(
        self, request: GenerationRequest, /, *, previews: bool = False, priority: int = 0, timeout_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """What happens to a request; another run of it tells only what the first has not.

        Raises:
            Exception: as for `generate`.
        """
        async with aclosing(self._run(request, priority, timeout_s, events=True, previews=previews)) as events:
            async for event in events:
                yield event

    async def drain(self, deadline_s: float) -> int:
        """Accept no more and finish what runs."""
        self._draining = True
        try:
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        except TimeoutError:
            return self._running
        return 0

    def statistics(self) -> EngineStatistics:
        """Sums over the replicas' last reports."""
        return summed([report.engine for report in self._fleet.reports.values()])

    async def _run(
        self, request: GenerationRequest, priority: int, timeout_s: float | None, *, events: bool, previews: bool
    ) -> AsyncGenerator[Event, None]:
        if self._draining:
            raise EngineDrainingError("the server finishes what it has and accepts no more requests")
        seeded = request.with_seed()
        demand = demand_of(secrets.token_hex(8), seeded, self.config)
        order = Order(demand, self._fleet.ingress, fields_of(seeded), priority, timeout_s, events, previews)
        end_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        self._running += 1
        self._idle.clear()
        try:
            async with aclosing(self._runs(order, end_s)) as told:
                async for event in told:
                    yield event
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _runs(self, order: Order, end_s: float | None) -> AsyncGenerator[Event, None]:
        """The events of the first run and, if its replica is lost, of one more."""
        told, taken = _Told(), list[Taken]()
        for attempt in range(2):
            try:
                async with aclosing(self._once(order, end_s, taken)) as events:
                    async for event in events:
                        if told.is_new(event):
                            yield event
                return
            except ReplicaLostError as lost:
                if attempt:
                    raise EngineDeadError(f"the request was lost with a replica, and again with another: {lost}") from lost
                logger.warning("request %s is run again: %s", order.demand.id, lost)
                order = _again(order, taken)

    async def _once(self, order: Order, end_s: float | None, taken: list[Taken]) -> AsyncGenerator[Event, None]:
        """The events of one run."""
        self._fleet.begin(order.demand.id)
        try:
            async with self._send(order) as messages:
                while True:
                    message = await _next(messages, end_s, order.timeout_s)
                    if isinstance(message, Taken):
                        taken.append(message)
                    elif isinstance(message, Refused):
                        raise EngineDeadError(
                            "the replica that had the request was lost, and those that are left compute with another version "
                            f"or other weights: expected {order.demand.identity}, got {message.identity} of {message.replica}"
                        )
                    elif isinstance(message, Failed):
                        if isinstance(message.error, _ENDED):
                            raise ReplicaLostError(str(message.error)) from message.error
                        raise message.error
                    else:
                        yield message
                    if isinstance(message, Done):
                        return
        finally:
            self._fleet.end(order.demand.id)


def _again(order: Order, taken: list[Taken]) -> Order:
    """The same request for another replica, with the same weights as the one that had it."""
    if not taken:
        return order
    last = taken[-1]
    return replace(order, demand=replace(order.demand, identity=last.identity, avoid=order.demand.avoid | {last.replica}))


async def _next(messages: AsyncIterator[Message], end_s: float | None, timeout_s: float | None) -> Message:
    try:
        async with asyncio.timeout_at(end_s):
            return await anext(messages)
    except TimeoutError:
        raise RequestTimeoutError(f"the request was not done in the {timeout_s:g} s it had") from None
    except StopAsyncIteration:
        raise ReplicaLostError("its replica ended the answer before the result") from None


def summed(engines: Sequence[Mapping[str, object]]) -> EngineStatistics:
    """Counters of several engines as those of one.

    Args:
        engines: each as `EngineStatistics` in plain JSON.

    Raises:
        ValueError: a counter of another kind, as of a replica of another version.
    """
    outcomes: Counter[str] = Counter()
    caches: dict[str, Counter[str]] = {}
    for engine in engines:
        outcomes.update(_counts(engine, "outcomes"))
        for name in _counts(engine, "caches"):
            caches.setdefault(name, Counter()).update(_counts(_counts(engine, "caches"), name))
    steps = sum(_number(engine, "steps") for engine in engines)
    weighted = sum(_number(engine, "occupancy") * _number(engine, "steps") for engine in engines)
    return EngineStatistics(
        **{name: int(sum(_number(engine, name) for engine in engines)) for name in _SUMMED},
        occupancy=weighted / steps if steps else 0.0,
        outcomes=dict(outcomes),
        caches={name: CacheStatistics(**counts) for name, counts in caches.items()},
        graphs=_summed_graphs([_counts(engine, "graphs") for engine in engines]),
    )


def _summed_graphs(engines: Sequence[Mapping[str, object]]) -> GraphStatistics:
    """Of several engines of one configuration: modes and reasons that some of them have, and sums."""
    modes, reasons = (
        sorted({str(engine[name]) for engine in engines if engine.get(name) is not None}) for name in ("mode", "reason")
    )
    failures = {str(entry) for engine in engines for entry in _entries(engine, "failures")}
    return GraphStatistics(
        mode=", ".join(modes),
        reason="; ".join(reasons) or None,
        **{name: int(sum(_number(engine, name) for engine in engines)) for name in _SUMMED_OF_GRAPHS},
        failures=tuple(sorted(failures)),
    )


def _entries(engine: Mapping[str, object], name: str) -> Sequence[object]:
    value = engine.get(name, ())
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _not_a_counter(name, "a list", value)
    return value


def _number(engine: Mapping[str, object], name: str) -> float:
    value = engine.get(name, 0)
    if not isinstance(value, int | float):
        raise _not_a_counter(name, "a number", value)
    return float(value)


def _counts(engine: Mapping[str, object], name: str) -> Mapping[str, Any]:
    found = engine.get(name, {})
    if not isinstance(found, Mapping):
        raise _not_a_counter(name, "an object", found)
    return found


def _not_a_counter(name: str, expected: str, value: object) -> ValueError:
    return ValueError(f"a replica's {name!r} must be {expected}, got {str(value)[:60]}")
