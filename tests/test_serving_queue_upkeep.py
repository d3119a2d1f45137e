"""Upkeep of fal's queue among servers: who is alive by the watch of who looks, whatever clocks say; names that two have."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import pytest
from queue_parts import MemoryStorage, queued

from uso_engine.serving.files import ImageFiles
from uso_engine.serving.queue_records import QueuedRequest, QueueRecords
from uso_engine.serving.queue_runner import QueueRunner
from uso_engine.serving.queue_upkeep import QueueUpkeep

LEASE_S = 30.0
NOON = 1_800_000_000.0


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

    def __post_init__(self) -> None:
        def take_up(request: QueuedRequest) -> None:
            self.taken.append(request.id)

        runner = SimpleNamespace(has=self.taken.__contains__, take_up=take_up)
        self.upkeep = QueueUpkeep(
            cast("QueueRunner", runner),
            QueueRecords(self.storage),
            cast("ImageFiles", SimpleNamespace(sweep=lambda: 0)),
            self.owner,
            expiry_s=60.0,
            lease_s=LEASE_S,
            clock=lambda: self.clock_s,
            watch=lambda: self.watch_s,
        )

    def round(self, passed_s: float) -> None:
        """One round of its upkeep, so many seconds after the last."""
        self.clock_s, self.watch_s = self.clock_s + passed_s, self.watch_s + passed_s
        asyncio.run(self.upkeep.once())


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
    records.renew("other", NOON)
    looking = Server(storage, "looking")
    looking.round(10)
    assert looking.taken == []
    records.leave("other")
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


def test_two_servers_of_one_name_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """As on two machines that were copied from one: each would take the other's requests for what it had before a restart."""
    storage = MemoryStorage()
    first = Server(storage, "vm-8000")
    for _ in range(5):
        first.round(10)
    Server(storage, "vm-8000", NOON + 300).round(10)  # After a restart it is the only one.
    assert caplog.records == []
    storage = MemoryStorage()
    first, second = Server(storage, "vm-8000"), Server(storage, "vm-8000", NOON + 3)
    for _ in range(2):
        first.round(10)
        second.round(10)
    assert "another server calls itself vm-8000 in this storage" in caplog.text


def test_answers_are_swept_on_though_the_clock_is_set_back() -> None:
    storage = MemoryStorage()
    server = Server(storage, "server", NOON)
    swept: list[float] = []
    server.upkeep._records.sweep = lambda now, expiry_s: swept.append(now)  # type: ignore[method-assign]
    server.round(100)
    server.clock_s -= 86_400
    server.round(100)
    assert swept == [NOON + 100, NOON + 200 - 86_400]
