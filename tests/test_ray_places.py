"""How many requests an ingress lets in before many replicas. Without Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from uso_engine.config import load_config
from uso_engine.serving.ray.fleet import Fleet
from uso_engine.serving.ray.messages import Message, Order
from uso_engine.serving.ray.remote_engine import RemoteEngine
from uso_engine.serving.ray.report import Identity, Report

CONFIG = load_config("uso-tiny")
SAME, OTHER = Identity("configuration", "1", "aaaa"), Identity("configuration", "1", "b")


def nobody(order: Order) -> AbstractAsyncContextManager[AsyncIterator[Message]]:
    raise AssertionError("nothing is sent")


def test_places_are_those_of_every_replica_and_of_who_may_wait() -> None:
    """Not those of one engine: a burst at idle replicas is let in as far as they can take it."""
    fleet = Fleet()
    one = RemoteEngine(CONFIG, fleet, nobody, max_queued=10)
    third = RemoteEngine(CONFIG, fleet, nobody, max_queued=10, ingresses=3)
    assert CONFIG.queue.max_requests == 64
    assert (one.places, third.places) == (74, 31)  # One is there, though it has not reported.
    fleet.set_replicas({"a": Report(SAME, 1.0).plain()})
    assert one.places == 74
    fleet.set_replicas({name: Report(OTHER if name == "c" else SAME, 1.0).plain() for name in "abc"})
    assert fleet.refused == {"c"}
    assert (one.places, third.places) == (2 * 64 + 10, 2 * 64 // 3 + 10)
    fleet.set_replicas({})
    assert one.places == 74
