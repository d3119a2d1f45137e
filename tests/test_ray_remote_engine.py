"""Requests that go to replicas: run again where one is lost, cancelled, given up in time, and told once. Without Ray."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from PIL import Image

from uso_engine.api.events import Conditioning, Decoding, Done, Event, Queued, Stepped
from uso_engine.api.request import GenerationRequest
from uso_engine.api.result import GenerationResult
from uso_engine.api.statistics import EngineStatistics
from uso_engine.conditioning.cache_statistics import CacheStatistics
from uso_engine.config import load_config
from uso_engine.errors import (
    EngineDeadError,
    EngineDrainingError,
    ImageError,
    QueueFullError,
    RequestTimeoutError,
    USOError,
)
from uso_engine.sampling.graph_statistics import GraphStatistics
from uso_engine.serving.ray.demand import demand_of, work_of
from uso_engine.serving.ray.fleet import Fleet
from uso_engine.serving.ray.messages import Failed, Message, Order, Refused, Taken, failed, fields_of
from uso_engine.serving.ray.remote_engine import RemoteEngine, ReplicaLostError, summed
from uso_engine.serving.ray.report import Identity, Report

CONFIG = load_config("uso-tiny")
SAME = Identity("configuration", "1", "aaaa")
Reply = Callable[[Order], AsyncGenerator[Message, None]]


def result(seed: int) -> GenerationResult:
    picture = Image.new("RGB", (8, 8), (seed % 256, 0, 0))
    return GenerationResult((picture,), seed, (seed,), (False,), "", 8, 8, {"denoise": 0.1}, 10, {})


def request(**fields: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "a fish", "enable_safety_checker": False, **fields})


async def whole(order: Order, *, replica: str = "a", stop: int | None = None) -> AsyncGenerator[Message, None]:
    """Everything that a replica says, or as much as it says before it is lost."""
    seed = order.request().seed
    assert seed is not None
    steps = [Stepped(index, 3) for index in range(3)]
    said: list[Message] = [Taken(replica, SAME.digest), Queued(0), Conditioning(), *steps, Decoding(), Done(result(seed))]
    for message in said[:stop]:
        yield message
    if stop is not None:
        raise ReplicaLostError(f"replica {replica} is gone")


@dataclass
class Replicas:
    """What stands where Ray is: a reply for each order, in turn.

    Args:
        replies: of each.
    """

    replies: list[Reply]
    orders: list[Order] = field(default_factory=list)
    left: int = 0

    @asynccontextmanager
    async def send(self, order: Order) -> AsyncIterator[AsyncIterator[Message]]:
        pickled: Order = pickle.loads(pickle.dumps(order))  # noqa: S301 - as between processes
        self.orders.append(pickled)
        messages = self.replies[len(self.orders) - 1](pickled)
        try:
            yield messages
        finally:
            await messages.aclose()
            self.left += 1

    def engine(self) -> RemoteEngine:
        return RemoteEngine(CONFIG, Fleet(), self.send, max_queued=4)


async def events_of(engine: RemoteEngine, **fields: Any) -> list[Event]:
    return [event async for event in engine.stream(request(**fields))]


def test_a_request_is_answered_and_its_seed_is_drawn_before_it_is_sent() -> None:
    replicas = Replicas([whole])
    found = asyncio.run(replicas.engine().generate(request()))
    (order,) = replicas.orders
    assert order.fields["seed"] == found.seed and not order.events
    assert replicas.left == 1


def test_a_lost_replica_costs_one_more_run_with_the_same_seed_and_weights_elsewhere() -> None:
    replicas = Replicas([lambda order: whole(order, stop=5), lambda order: whole(order, replica="b")])
    found = asyncio.run(events_of(replicas.engine()))
    first, second = replicas.orders
    assert first.fields == second.fields and first.demand.id == second.demand.id
    assert (first.demand.identity, first.demand.avoid) == (None, frozenset())
    assert (second.demand.identity, second.demand.avoid) == (SAME.digest, frozenset({"a"}))
    # Nothing is told twice, and nothing is left out.
    assert [type(event) for event in found] == [Queued, Conditioning, Stepped, Stepped, Stepped, Decoding, Done]
    assert [event.index for event in found if isinstance(event, Stepped)] == [0, 1, 2]
    assert isinstance(found[-1], Done) and found[-1].result.seed == second.fields["seed"]


@pytest.mark.parametrize("stop", [0, 1])
def test_a_replica_that_is_lost_before_it_has_begun(stop: int) -> None:
    replicas = Replicas([lambda order: whole(order, stop=stop), whole])
    assert asyncio.run(events_of(replicas.engine()))[-1] is not None
    assert replicas.orders[1].demand.avoid == ({"a"} if stop else frozenset())


def test_an_engine_that_died_is_lost_too() -> None:
    async def dead(order: Order) -> AsyncGenerator[Message, None]:
        yield Taken("a", SAME.digest)
        yield Failed(EngineDeadError("its thread failed"))

    replicas = Replicas([dead, whole])
    assert asyncio.run(replicas.engine().generate(request(seed=3))).seed == 3


def test_a_second_loss_is_an_error_and_not_a_third_run() -> None:
    replicas = Replicas([lambda order: whole(order, stop=3), lambda order: whole(order, stop=4, replica="b"), whole])
    with pytest.raises(EngineDeadError, match="again with another: replica b"):
        asyncio.run(replicas.engine().generate(request()))
    assert len(replicas.orders) == replicas.left == 2


def test_an_answer_that_just_ends_is_a_loss() -> None:
    async def short(order: Order) -> AsyncGenerator[Message, None]:
        yield Taken("a", SAME.digest)

    with pytest.raises(EngineDeadError, match="ended the answer"):
        asyncio.run(Replicas([short, short]).engine().generate(request()))


def test_replicas_with_other_weights_do_not_finish_a_request() -> None:
    async def other(order: Order) -> AsyncGenerator[Message, None]:
        yield Refused("b", "ffff")

    replicas = Replicas([lambda order: whole(order, stop=4), other])
    with pytest.raises(EngineDeadError, match=f"expected {SAME.digest}, got ffff of b"):
        asyncio.run(replicas.engine().generate(request()))


def test_what_a_request_does_wrong_is_its_own_error_and_is_not_run_again() -> None:
    async def refusing(order: Order) -> AsyncGenerator[Message, None]:
        yield Taken("a", SAME.digest)
        full = QueueFullError("max_requests", 4, 5, 2.5)
        yield pickle.loads(pickle.dumps(failed(full)))  # noqa: S301 - as between processes

    replicas = Replicas([refusing])
    with pytest.raises(QueueFullError, match=r"max_requests is 4, with this request it would be 5") as caught:
        asyncio.run(replicas.engine().generate(request()))
    assert caught.value.retry_after_s == 2.5 and len(replicas.orders) == 1


def test_errors_cross_processes_with_what_can_be_pickled() -> None:
    error = ImageError("not a picture")
    error.__cause__ = RuntimeError(open)
    crossed = pickle.loads(pickle.dumps(failed(error)))  # noqa: S301 - as between processes
    assert type(crossed.error) is ImageError and str(crossed.error) == "not a picture"

    class LocalError(USOError):
        pass

    assert str(failed(LocalError("x")).error) == "LocalError: x"


def test_a_cancelled_caller_cancels_its_replica() -> None:
    async def run() -> tuple[int, int]:
        begun, cancelled = asyncio.Event(), list[str]()

        async def endless(order: Order) -> AsyncGenerator[Message, None]:
            yield Taken("a", SAME.digest)
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(order.demand.id)
                raise

        replicas = Replicas([endless])
        engine = replicas.engine()
        task = asyncio.create_task(engine.generate(request()))
        await begun.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled() and await engine.drain(1.0) == 0
        return len(cancelled), replicas.left

    assert asyncio.run(run()) == (1, 1)


def test_the_wait_for_a_replica_counts_as_time_of_the_request() -> None:
    async def never(order: Order) -> AsyncGenerator[Message, None]:
        await asyncio.Event().wait()
        yield Taken("a", SAME.digest)

    replicas = Replicas([never])
    with pytest.raises(RequestTimeoutError, match=r"in the 0\.05 s it had"):
        asyncio.run(replicas.engine().generate(request(), timeout_s=0.05))
    assert replicas.left == 1


def test_draining_finishes_what_runs_and_takes_nothing() -> None:
    async def run() -> tuple[int, GenerationResult]:
        begun, going = asyncio.Event(), asyncio.Event()

        async def held(order: Order) -> AsyncGenerator[Message, None]:
            begun.set()
            await going.wait()
            async for message in whole(order):
                yield message

        engine = Replicas([held]).engine()
        task = asyncio.create_task(engine.generate(request()))
        await begun.wait()
        assert await engine.drain(0.01) == 1
        with pytest.raises(EngineDrainingError):
            await engine.generate(request())
        going.set()
        return await engine.drain(60.0), await task

    left, found = asyncio.run(run())
    assert left == 0 and found.images


def test_work_in_flight_is_over_whatever_happens() -> None:
    fleet = Fleet()
    fleet.set_replicas({"a": Report(SAME, 1.0).plain()})
    loads: list[int] = []

    @asynccontextmanager
    async def send(order: Order) -> AsyncIterator[AsyncIterator[Message]]:
        assert fleet.choose(order.demand, ["a"]) == ["a"]
        loads.append(fleet._table.load("a"))
        yield whole(order, stop=2)

    engine = RemoteEngine(CONFIG, fleet, send, max_queued=4)
    with pytest.raises(EngineDeadError):
        asyncio.run(engine.generate(request()))
    assert loads == [work_of(request(), CONFIG)] * 2 and fleet._table.load("a") == 0
    # What comes too late, when the request was given up, is not counted.
    fleet.routed(demand_of("late", request(), CONFIG), "a")
    assert fleet._table.load("a") == 0


def test_a_report_of_another_version_is_said_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet()
    fleet.set_replicas({"a": {"something": "else"}, "b": {}, "c": Report(SAME, 1.0).plain()})
    assert "replica a: expected a replica's report" in caplog.text
    assert set(fleet.reports) == {"c"}
    fleet.set_replicas({"c": Report(SAME, 1.0).plain(), "d": Report(Identity("configuration", "1", "b"), 2.0).plain()})
    assert "replica d computes with another version or other weights" in caplog.text and fleet.refused == {"d"}


def test_reports_survive_the_way_and_statistics_add_up() -> None:
    cache = {"hits": 3, "misses": 1, "evictions": 0, "entries": 1, "size_bytes": 10, "limit_bytes": 20}
    counts = {"queued": 1, "running": 2, "steps": 10, "tokens": 100, "occupancy": 2.0, "outcomes": {"done": 4}}
    report = Report(SAME, 1.0, {"me": 5}, frozenset({"k"}), engine={**counts, "caches": {"prompts": cache}})
    fleet = Fleet()
    fleet.set_replicas({"a": report.plain(), "b": report.plain()})
    assert fleet.reports == {"a": report, "b": report}
    graphs = {"mode": "auto", "reason": None, "kept": 2, "captured": 3, "replayed": 20, "failures": ["no room"]}
    first, second = {**counts, "caches": {"prompts": cache}, "graphs": graphs}, {**counts, "steps": 30, "occupancy": 4.0}
    found = summed([first, {**second, "graphs": {**graphs, "replayed": 1, "failures": []}}])
    assert found.graphs == GraphStatistics("auto", None, kept=4, captured=6, replayed=21, failures=("no room",))
    assert isinstance(found, EngineStatistics)
    assert (found.queued, found.running, found.steps, found.occupancy) == (2, 4, 40, 3.5)
    assert found.outcomes == {"done": 8} and found.caches == {"prompts": CacheStatistics(**cache)}
    assert summed([]).occupancy == 0.0


def test_what_a_request_asks_for_is_counted_as_the_engine_counts_it() -> None:
    sized = {"image_size": {"width": 128, "height": 128}, "num_inference_steps": 4}
    assert work_of(request(**sized), CONFIG) == 4 * (20 + 64)
    assert work_of(request(**sized, num_images=3, negative_prompt="x"), CONFIG) == 4 * 3 * 2 * (20 + 64)
    pictures = ["data:image/png;base64,AAAA", "data:image/png;base64,BBBB"]
    assert work_of(request(**sized, images=pictures, content_long_side=128), CONFIG) == 4 * (20 + 64 + 64 + 3 * 4)
    first = demand_of("1", request(images=pictures), CONFIG)
    swapped = demand_of("2", request(images=pictures[::-1]), CONFIG)
    other_side = demand_of("3", request(images=pictures, content_long_side=64), CONFIG)
    assert first.prompts == swapped.prompts and len(first.pictures) == 2
    assert not first.pictures & swapped.pictures and len(first.pictures & other_side.pictures) == 1


def test_fields_are_what_was_set() -> None:
    assert fields_of(request(seed=4)) == {"prompt": "a fish", "enable_safety_checker": False, "seed": 4}
