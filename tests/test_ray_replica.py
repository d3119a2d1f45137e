"""A replica with the tests' engine: what it takes, refuses, reports and cancels. Needs Ray, but starts none."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from served_double import DoubleEngine

from uso_engine.api.events import Conditioning, Decoding, Done, Queued, Stepped
from uso_engine.api.request import GenerationRequest
from uso_engine.config import EngineConfig, load_config
from uso_engine.errors import EngineDeadError, QueueFullError
from uso_engine.serving.engine_opening import EngineOptions

pytest.importorskip("ray", reason="Ray is not installed: pip install 'uso-engine[ray]' (310 MB)")

from uso_engine.serving.ray import replica as replica_module
from uso_engine.serving.ray.demand import demand_of
from uso_engine.serving.ray.messages import Failed, Message, Order, Refused, Taken, fields_of
from uso_engine.serving.ray.replica import EngineReplica
from uso_engine.serving.ray.report import Identity, read_report

# Ray awaits it before the object goes.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'EngineReplica.__del__' was never awaited:RuntimeWarning")
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Replicas go while that warning is ignored, and not in another file's test, which it would fail."""
    yield
    gc.collect()


CONFIG = load_config("uso-tiny")
SAME = Identity("configuration", "1", "a" * 16)


def order(prompt: str, *, identity: str | None = None, events: bool = False) -> Order:
    request = GenerationRequest(prompt=prompt, seed=7)
    demand = replace(demand_of("1", request, CONFIG), identity=identity)
    return Order(demand, "me", fields_of(request), events=events)


@pytest.fixture
def with_replica(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a function with a replica, in an event loop of its own."""
    engines: list[DoubleEngine] = []

    @asynccontextmanager
    async def opened(config: EngineConfig, options: EngineOptions) -> AsyncIterator[DoubleEngine]:
        engines.append(DoubleEngine(config, most_at_once=2))
        yield engines[-1]

    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    monkeypatch.setattr(replica_module, "opened_engine", opened)
    monkeypatch.setattr(replica_module, "identity_of", lambda engine, config: SAME)
    monkeypatch.setattr(replica_module, "log_as_json", lambda: None)
    monkeypatch.setattr("uso_engine.serving.ray.replica.serve.get_replica_context", lambda: context)

    def run(work: Callable[[EngineReplica, DoubleEngine], Awaitable[Any]], weights: str | None = None) -> Any:
        async def inside() -> Any:
            made = EngineReplica.__new__(EngineReplica)
            await made.__init__(CONFIG, EngineOptions(), weights)  # type: ignore[misc]
            return await work(made, engines[-1])

        return asyncio.run(inside())

    return run


async def all_of(messages: AsyncIterator[Message]) -> list[Message]:
    return [message async for message in messages]


def test_a_request_is_taken_told_and_done(with_replica: Run) -> None:
    async def work(made: EngineReplica, _: DoubleEngine) -> list[list[Message]]:
        return [await all_of(made.run(order("steps:2", events=events))) for events in (True, False)]

    told, silent = with_replica(work)
    assert told[0] == silent[0] == Taken("r1", SAME.digest)
    assert [type(one) for one in told[1:]] == [Queued, Conditioning, Stepped, Stepped, Decoding, Done]
    assert [type(one) for one in silent[1:]] == [Done]
    assert isinstance(silent[1], Done) and silent[1].result.seed == 7 and silent[1].result.latents is None


def test_a_request_that_began_on_other_weights_is_refused_by_hash(with_replica: Run) -> None:
    async def work(made: EngineReplica, engine: DoubleEngine) -> tuple[list[Message], list[Message], list[str]]:
        refused = await all_of(made.run(order("a", identity="b" * 16)))
        return refused, await all_of(made.run(order("b", identity=SAME.digest))), engine.begun

    refused, taken, begun = with_replica(work)
    assert refused == [Refused("r1", SAME.digest)] and begun == ["b"]
    assert isinstance(taken[-1], Done)


def test_weights_that_were_not_asked_for_do_not_start(with_replica: Run) -> None:
    async def work(made: EngineReplica, _: DoubleEngine) -> str:
        return await made.ping()

    assert with_replica(work, "a" * 16) == SAME.digest
    with pytest.raises(EngineDeadError, match=f"expected weights {'c' * 16}, got {'a' * 16}"):
        with_replica(work, "c" * 16)


def test_errors_of_the_engine_are_messages(with_replica: Run) -> None:
    async def work(made: EngineReplica, _: DoubleEngine) -> list[Message]:
        return [(await all_of(made.run(order(f"raise:{name}"))))[-1] for name in ("image", "full", "safety")]

    found = with_replica(work)
    assert all(isinstance(one, Failed) for one in found)
    assert isinstance(found[1].error, QueueFullError) and found[1].error.retry_after_s == 2.4


def test_an_iteration_that_is_left_cancels_the_request_and_its_work(with_replica: Run) -> None:
    async def work(made: EngineReplica, engine: DoubleEngine) -> tuple[dict[str, int], dict[str, object], int]:
        messages = made.run(order("steps:1000", events=True))
        while not isinstance(await anext(messages), Stepped):
            pass
        during = read_report(made.record_routing_stats())
        await messages.aclose()  # type: ignore[attr-defined]
        return dict(during.work), dict(read_report(made.record_routing_stats()).work), engine.running

    during, after, running = with_replica(work)
    assert during == {"me": demand_of("1", GenerationRequest(prompt="steps:1000"), CONFIG).work}
    assert after == {} and running == 0


def test_an_engine_that_is_dead_is_unhealthy(with_replica: Run) -> None:
    async def work(made: EngineReplica, _: DoubleEngine) -> Message:
        made.check_health()
        last = (await all_of(made.run(order("die"))))[-1]
        with pytest.raises(EngineDeadError, match="replica r1: the loop is dead"):
            made.check_health()
        return last

    last = with_replica(work)
    assert isinstance(last, Failed) and isinstance(last.error, EngineDeadError)


def test_reports_say_what_was_encoded(with_replica: Run) -> None:
    async def work(made: EngineReplica, _: DoubleEngine) -> dict[str, object]:
        await all_of(made.run(order("a fish")))
        return made.record_routing_stats()

    report = read_report(with_replica(work))
    assert report.identity == SAME and report.keys == demand_of("1", GenerationRequest(prompt="a fish"), CONFIG).keys
    assert report.engine["outcomes"] == {"done": 1}
