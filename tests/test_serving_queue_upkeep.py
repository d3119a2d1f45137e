"""Upkeep of fal's queue among servers: who is alive by the watch of who looks, whatever clocks say; names that two have."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import pytest
from queue_parts import MemoryStorage, queued

from uso_engine.serving.files import ImageFiles
from uso_engine.serving.leases import Leases, server_name
from uso_engine.serving.queue_records import QueuedRequest, QueueRecords, accepted_at, begun_state
from uso_engine.serving.queue_runner import QueueRunner
from uso_engine.serving.queue_upkeep import QueueUpkeep

LEASE_S = 30.0
NOON = 1_800_000_000.0
MUCH_LATER = "fa000000-0000-7000-8000-000000000000"


@dataclass
class Server:
    """A server whose rounds a test begins, with a clock of its own.

    Args:
        storage: shared with others.
        owner: what it calls itself.
        clock_s: seconds since 1970, as it takes them to be.
    """

    storage: MemoryStorage
    owner: str
    clock_s: float = NOON
    watch_s: float = 0.0
    taken: list[str] = field(default_factory=list)
    takes_up: bool = True

    def __post_init__(self) -> None:
        def take_up(request: QueuedRequest) -> None:
            self.taken.append(request.id)

        runner = SimpleNamespace(has=self.taken.__contains__, take_up=take_up, takes_up=self.takes_up, unbegun=set)
        clocks = {"clock": lambda: self.clock_s, "watch": lambda: self.watch_s}
        self.upkeep = QueueUpkeep(
            cast("QueueRunner", runner),
            QueueRecords(self.storage),
            cast("ImageFiles", SimpleNamespace(sweep=lambda: 0)),
            Leases(self.storage, self.owner, LEASE_S, **clocks),
            expiry_s=60.0,
            **clocks,
        )

    def round(self, passed_s: float) -> None:
        """One round of its upkeep, so many seconds after the last."""
        self.clock_s, self.watch_s = self.clock_s + passed_s, self.watch_s + passed_s

        async def renew_and_look() -> None:
            await self.upkeep.renew()
            await self.upkeep.look()

        asyncio.run(renew_and_look())


@pytest.mark.parametrize("ahead_s", [0.0, 3600.0, -3600.0], ids=["same clock", "ahead", "behind"])
def test_a_server_is_dead_when_it_says_nothing_for_a_lease_whatever_the_clocks_say(ahead_s: float) -> None:
    storage = MemoryStorage()
    alive, looking = Server(storage, "alive"), Server(storage, "looking", NOON + ahead_s)
    request = queued()
    QueueRecords(storage).accept(request, "alive")
    alive.taken.append(request.id)
    for at in range(12):
        if at == 6:
            looking.clock_s += 7200  # It is set, or one of them was.
            alive.clock_s -= 7200
        alive.round(10)
        looking.round(10)
    assert looking.taken == []
    looking.round(10)
    looking.round(10)
    assert looking.taken == []  # It has said nothing for twenty seconds.
    looking.round(10)
    assert looking.taken == [request.id]


def test_what_a_server_left_on_its_end_is_taken_up_at_once() -> None:
    storage = MemoryStorage()
    records, request = QueueRecords(storage), queued()
    records.accept(request, "other")
    other = Leases(storage, "other", LEASE_S)
    other.renew(takes_up=True)
    looking = Server(storage, "looking")
    looking.round(10)
    assert looking.taken == []
    other.leave()
    looking.round(10)
    assert looking.taken == [request.id]


def test_a_request_that_is_half_accepted_is_waited_for_by_the_watch() -> None:
    storage = MemoryStorage()
    records, request = QueueRecords(storage), queued()  # Of now, which is long before the server's clock.
    records.accept(request, "other")
    storage.delete(f"queue/{request.id}.state.json")
    looking = Server(storage, "looking", NOON * 2)
    for _ in range(3):
        looking.round(10)
    assert looking.taken == []
    looking.round(10)
    assert looking.taken == [request.id]


def test_two_servers_of_one_host_and_port_do_not_take_each_others_requests() -> None:
    """As on two machines that were copied from one: neither takes the other's for what it had before a restart."""
    storage, request = MemoryStorage(), queued()
    first, second = Server(storage, server_name("vm", 8000)), Server(storage, server_name("vm", 8000), NOON + 3)
    first.round(10)
    QueueRecords(storage).accept(request, first.owner)
    first.taken.append(request.id)
    for _ in range(10):
        second.round(10)
        first.round(10)
    assert second.taken == []
    for _ in range(4):
        second.round(10)
    assert second.taken == [request.id]


def test_answers_are_swept_on_though_the_clock_is_set_back() -> None:
    storage = MemoryStorage()
    server = Server(storage, "server", NOON)
    swept: list[float] = []
    server.upkeep._records.sweep = lambda now, expiry_s: swept.append(now)  # type: ignore[method-assign]
    server.round(100)
    server.clock_s -= 86_400
    server.round(100)
    assert swept == [NOON + 100, NOON + 200 - 86_400]


def test_what_a_dead_server_left_is_shared_and_nothing_is_taken_up_twice() -> None:
    """The rounds of several servers meet between any two requests."""
    storage = MemoryStorage()
    requests = [queued() for _ in range(60)]
    servers = [Server(storage, server_name("vm", 8000)) for _ in range(3)]
    ending = Server(storage, "ending", takes_up=False)
    for one in (*servers, ending):
        one.round(10)
    for request in requests:
        QueueRecords(storage).accept(request, "dead")

    async def at_once() -> None:
        await asyncio.gather(*(one.upkeep.look() for one in (*servers, ending)))

    asyncio.run(at_once())
    taken = [identifier for one in servers for identifier in one.taken]
    assert sorted(taken) == sorted(request.id for request in requests)
    assert min(len(one.taken) for one in servers) > 5 and ending.taken == []


def test_a_server_says_that_it_is_alive_however_long_a_round_takes() -> None:
    """As the first of one that finds ten thousand requests: others would take it for dead, and compute what it computes."""
    storage = MemoryStorage()
    records, leases = QueueRecords(storage), Leases(storage, "server", 0.03)
    looking, may_end, said = threading.Event(), threading.Event(), set[bytes]()

    def unfinished() -> dict[str, bool]:
        looking.set()
        assert may_end.wait(60)
        return {}

    records.unfinished = unfinished  # type: ignore[method-assign]
    runner = SimpleNamespace(has=lambda identifier: False, takes_up=True, unbegun=set)
    files = SimpleNamespace(sweep=lambda: 0)
    upkeep = QueueUpkeep(cast("QueueRunner", runner), records, cast("ImageFiles", files), leases, expiry_s=60.0)

    async def run() -> None:
        async with asyncio.timeout(60), upkeep.running():
            assert await asyncio.to_thread(looking.wait, 60)
            while len(said) < 4:
                said.add(storage.files.get("owners/server.json", b""))
                await asyncio.sleep(0.005)
            may_end.set()

    asyncio.run(run())


def test_what_nobody_can_answer_is_removed_when_it_would_have_expired() -> None:
    """A state without its request, as an end between two removals leaves it; a request that no server can read."""
    storage = MemoryStorage()
    records, stray, odd, waiting, young = QueueRecords(storage), *(queued() for _ in range(4))
    for request in (stray, odd, waiting, young):
        records.accept(request, "dead")
    for request in (stray, young):
        storage.delete(f"queue/{request.id}.request.json")
    storage.files[f"queue/{odd.id}.request.json"] = b'{"of": "another version"}'
    storage.files[f"queue/{odd.id}.cancel.json"] = b"{}"
    records.sweep(accepted_at(stray.id) - 1 + 60, 60.0)
    assert len(storage.files) == 7
    # A younger one is left alone, and what is waited for is however old it is.
    storage.files = {name.replace(young.id, MUCH_LATER): data for name, data in storage.files.items()}
    records.sweep(accepted_at(waiting.id) + 61, 60.0)
    assert set(storage.files) == {
        f"queue/{waiting.id}.request.json",
        f"queue/{waiting.id}.state.json",
        f"queue/{MUCH_LATER}.state.json",
    }


def test_an_old_request_that_is_answered_while_it_is_looked_at_keeps_its_answer() -> None:
    """It waited for longer than answers are kept."""
    storage = MemoryStorage()
    records, request = QueueRecords(storage), queued()
    records.accept(request, "other")
    over = begun_state(request, "other").model_copy(update={"status": "COMPLETED", "status_code": 200, "expires": 4e9})
    looked = records.request

    def then_answered(identifier: str) -> QueuedRequest | None:
        QueueRecords(storage).finish(identifier, over, b"answer")
        return looked(identifier)

    records.request = then_answered  # type: ignore[method-assign]
    records.sweep(accepted_at(request.id) + 61, 60.0)
    assert records.state(request.id) == over and records.result(request.id) == b"answer"


def test_who_is_waited_for_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    storage = MemoryStorage()
    for _ in range(3):
        QueueRecords(storage).accept(queued(), "other")
    Leases(storage, "other", LEASE_S).renew(takes_up=True)
    looking = Server(storage, "looking")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            looking.round(10)
    said = [record.getMessage() for record in caplog.records if "says nothing" in record.getMessage()]
    assert said == ["server other has requests; they are taken up if it says nothing for 30 s"]
