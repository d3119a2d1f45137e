"""A replica: one engine in a process of its own, on its GPU, as Ray Serve runs it."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from ray import serve

from uso_engine.api.events import Done, Event
from uso_engine.config import EngineConfig
from uso_engine.errors import EngineDeadError, USOError
from uso_engine.serving.engine_opening import EngineOptions, opened_engine
from uso_engine.serving.json_log import log_as_json

from .messages import Message, Order, Refused, Taken, failed
from .report import Identity, Report, digest_of
from .usage import Meter, Usage

if TYPE_CHECKING:
    from uso_engine.async_engine import AsyncUSOEngine

logger = logging.getLogger(__name__)


class EngineReplica:
    """An engine that takes orders.

    Args:
        config: of the engine, with absolute paths or names that this machine knows.
        options: of the engine.
        weights: digest that its weights must have; None for any.

    Raises:
        EngineDeadError: other weights.
        USOError: the engine cannot be loaded.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: EngineConfig, options: EngineOptions, weights: str | None = None
    ) -> None:
        log_as_json()
        self._stack = AsyncExitStack()
        self._engine: AsyncUSOEngine = await self._stack.enter_async_context(opened_engine(config, options))
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._identity = identity_of(self._engine, config)
        if weights not in (None, self._identity.weights):
            await self._stack.aclose()
            raise EngineDeadError(f"replica {self._name}: expected weights {weights}, got {self._identity.weights}")
        self._started_s = time.time()
        self._usage = Usage(time.monotonic)
        self._routing = Meter(self._usage, self._tokens, time.monotonic)
        self._scaling = Meter(self._usage, self._tokens, time.monotonic)
        self._tokens_per_s: float | None = None
        logger.info("replica %s is ready: weights %s, %s", self._name, self._identity.weights, self._identity.version)

    async def run(self, order: Order) -> AsyncIterator[Message]:
        """Compute a request; ending the iteration early cancels it at its next step.

        Args:
            order: the request.

        Yields:
            That it is taken, what happens if that was asked for, then its result or its error.
        """
        wanted = order.demand.identity
        if wanted not in (None, self._identity.digest):
            yield Refused(self._name, self._identity.digest)
            return
        self._usage.begin(order.demand, order.ingress)
        encoded = False
        try:
            yield Taken(self._name, self._identity.digest)
            events = self._engine.stream(
                order.request(), previews=order.previews, priority=order.priority, timeout_s=order.timeout_s
            )
            async with aclosing(events) as told:
                async for event in told:
                    encoded = True
                    if order.events or isinstance(event, Done):
                        yield _without_latents(event)
        except USOError as error:
            yield failed(error)
        finally:
            self._usage.end(order.demand, order.ingress, encoded=encoded)

    async def ping(self) -> str:
        """The digest of its identity: it answers once it is loaded."""
        return self._identity.digest

    def check_health(self) -> None:
        """Let Ray replace an engine that can compute no more.

        Raises:
            EngineDeadError: it is one.
        """
        if self._engine.failure is not None:
            raise EngineDeadError(f"replica {self._name}: {self._engine.failure}")

    def record_routing_stats(self) -> dict[str, object]:
        """Its report, for the routers."""
        period = self._routing.read()
        report = Report(
            self._identity,
            self._started_s,
            self._usage.work,
            self._usage.keys,
            tokens_per_s=period.tokens_per_s,
            busy=period.busy,
            engine=_plain(self._engine),
        )
        return report.plain()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Seconds of work before it, and how busy it is, for `autoscaling`."""
        period = self._scaling.read()
        if period.tokens_per_s is not None:
            self._tokens_per_s = period.tokens_per_s
        work = sum(self._usage.work.values())
        return {"waiting_s": work / self._tokens_per_s if self._tokens_per_s else 0.0, "busy": period.busy}

    async def __del__(self) -> None:
        await self._stack.aclose()

    def _tokens(self) -> int:
        return self._engine.statistics().tokens


def identity_of(engine: AsyncUSOEngine, config: EngineConfig) -> Identity:
    """What decides the bits of an engine's pictures."""
    from uso_engine.parallel.identity import identity

    found = identity(engine.engine.pipeline.transformer)
    weights = found.pop("weights")
    return Identity(
        configuration=digest_of(config.model_dump(mode="json")),
        version=", ".join(f"{name} {value}" for name, value in sorted(found.items())),
        weights=weights[:16],
    )


def _without_latents(event: Event) -> Event:
    """Nobody asks for them over HTTP, and whoever reads a tensor has to import torch."""
    return Done(replace(event.result, latents=None)) if isinstance(event, Done) else event


def _plain(engine: AsyncUSOEngine) -> Mapping[str, object]:
    return asdict(engine.statistics())
