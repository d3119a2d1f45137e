"""A storage that is away or slow: no server is taken for dead because of it, and none is alive that nobody can see."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import httpx
import pytest
from living_application import application, living
from queue_parts import MemoryStorage, queue, queued
from test_serving_queue_upkeep import LEASE_S, Server

from uso_engine.errors import OutputError
from uso_engine.serving.files import ImageFiles
from uso_engine.serving.leases import Leases
from uso_engine.serving.queue_records import QueueRecords, begun_state
from uso_engine.serving.queue_runner import QueueRunner
from uso_engine.serving.queue_upkeep import QueueUpkeep, pause_s
from uso_engine.serving.settings import ServerSettings


class AwayStorage(MemoryStorage):
    """A storage that is away when a test says so."""

    away = False

    def _check(self) -> None:
        if self.away:
            raise OutputError("the storage is away")

    def write(self, name: str, data: bytes, content_type: str) -> None:
        self._check()
        super().write(name, data, content_type)

    def read(self, name: str) -> bytes:
        self._check()
        return super().read(name)

    def names(self, folder: str) -> list[str]:
        self._check()
        return super().names(folder)


def passed(servers: tuple[Server, ...], seconds: float) -> None:
    for one in servers:
        one.clock_s, one.watch_s = one.clock_s + seconds, one.watch_s + seconds


def tried(server: Server, work: str) -> None:
    try:
        asyncio.run(getattr(server.upkeep, work)())
    except OutputError:
        assert cast("AwayStorage", server.storage).away


@pytest.mark.parametrize("away_s", [21, 29, 60, 600])
@pytest.mark.parametrize("renews_first", [False, True], ids=["looks first", "renews first"])
def test_nobody_has_died_of_a_storage_that_was_away(away_s: int, renews_first: bool) -> None:
    storage = AwayStorage()
    alive, looking = servers = Server(storage, "alive"), Server(storage, "looking")
    request = queued()
    QueueRecords(storage).accept(request, "alive")
    alive.taken.append(request.id)
    for one in servers:
        for work in ("renew", "look"):
            tried(one, work)
    passed(servers, 9)
    storage.away = True
    for second in range(away_s):
        passed(servers, 1)
        if second % 10 == 1:
            for one in servers:
                for work in ("renew", "look"):
                    tried(one, work)
    storage.away = False
    # The one that looks is back first, with both of its loops.
    for work in ("renew", "look") if renews_first else ("look", "renew", "look"):
        tried(looking, work)
    passed(servers, 2)
    tried(looking, "look")
    tried(alive, "renew")
    assert looking.taken == [] and "owners/alive.json" in storage.files
    for _ in range(4):
        looking.round(10)
    assert looking.taken == [request.id]  # Whoever ends after that is found out as soon as ever.


@pytest.mark.parametrize("write_s", [20.0, 45.0])
def test_nobody_has_died_where_writing_takes_long(write_s: float) -> None:
    storage = MemoryStorage()
    alive, looking = servers = Server(storage, "alive"), Server(storage, "looking")
    request = queued()
    QueueRecords(storage).accept(request, "alive")
    alive.taken.append(request.id)
    alive.round(0)
    write = storage.write

    def slowly(name: str, data: bytes, content_type: str) -> None:
        passed(servers, write_s)
        write(name, data, content_type)

    for _ in range(5):
        tried(looking, "look")
        passed(servers, pause_s(LEASE_S, write_s, succeeded=True))
        storage.write = slowly  # type: ignore[method-assign]
        looking.upkeep._leases.renew(takes_up=True)
        storage.write = write  # type: ignore[method-assign]
        tried(looking, "look")  # The other one's is written in the same moment, but after this look.
        alive.upkeep._leases.renew(takes_up=True)
    assert looking.taken == []


def test_a_lease_is_renewed_in_time_however_long_that_takes() -> None:
    assert pause_s(30.0, 0.1, succeeded=True) == pytest.approx(9.9)
    for took_s in (5.0, 10.0, 20.0, 28.0):
        assert 1.0 <= pause_s(30.0, took_s, succeeded=True) < 30.0 - took_s
    assert pause_s(30.0, 0.1, succeeded=False) == 2.0 and pause_s(30.0, 25.0, succeeded=False) == 2.0


def test_a_lease_is_renewed_though_every_thread_of_the_loop_waits() -> None:
    storage, may_end, said = MemoryStorage(), threading.Event(), set[bytes]()
    runner = SimpleNamespace(has=lambda identifier: False, takes_up=True, unbegun=set)
    files = cast("ImageFiles", SimpleNamespace(sweep=lambda: 0))
    leases = Leases(storage, "server", 0.03)
    upkeep = QueueUpkeep(cast("QueueRunner", runner), QueueRecords(storage), files, leases, expiry_s=60.0)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        async with asyncio.timeout(60), upkeep.running():
            waits = loop.run_in_executor(None, may_end.wait, 60)
            try:
                while len(said) < 4:
                    said.add(storage.files.get("owners/server.json", b""))
                    await asyncio.sleep(0.005)
            finally:
                may_end.set()
                await waits

    asyncio.run(run())
    assert "owners/server.json" not in storage.files


def test_nothing_is_accepted_before_the_others_know_that_a_server_is_alive(tmp_path: Path) -> None:
    """A request of one without a lease is a dead one's for them, and would be computed by both."""
    made = application(tmp_path, ServerSettings(lease_s=1.0, page=False))
    storage = made.runner._records._storage
    may_write, write = threading.Event(), storage.write

    def refused(name: str, data: bytes, content_type: str) -> None:
        if name.startswith("owners/") and not may_write.is_set():
            raise OutputError(f"cannot write {name}")
        write(name, data, content_type)

    storage.write = refused  # type: ignore[method-assign]

    async def asked(client: httpx.AsyncClient) -> None:
        body = {"prompt": "", "image_size": {"width": 64, "height": 64}}
        answer = await client.post("/queue/fal-ai/uso", json=body)
        assert (answer.status_code, answer.json()["message"]) == (503, "The storage failed.")
        assert storage.names("queue") == []
        may_write.set()
        while storage.names("owners") == []:
            await asyncio.sleep(0.01)
        while (await client.post("/queue/fal-ai/uso", json=body)).status_code != 200:
            await asyncio.sleep(0.01)

    async def run() -> None:
        async with asyncio.timeout(60), living(made) as client:
            await asked(client)

    asyncio.run(run())


def test_what_another_server_has_answered_does_not_wait_here() -> None:
    """This one was held up for longer than its lease; whoever asks it about the request would be told that it waits."""
    storage = MemoryStorage()

    async def run() -> None:
        async with queue(storage) as (runner, records, work), asyncio.timeout(20):
            upkeep = QueueUpkeep(
                runner,
                records,
                cast("ImageFiles", SimpleNamespace(sweep=lambda: 0)),
                Leases(storage, "server", 30.0),
                expiry_s=60.0,
            )
            work.may_end.clear()
            running, answered, waits = queued(), queued(), queued()
            for request in (running, answered, waits):
                await runner.submit(request)
            await work.begun.wait()
            over = begun_state(answered, "other").model_copy(update={"status": "COMPLETED", "status_code": 200, "expires": 4e9})
            records.finish(answered.id, over, b"the other's answer")
            await upkeep.look()
            view = await runner.view(answered.id, answered.key, answered.model)
            assert view is not None and view.state == over
            assert [runner.has(one.id) for one in (running, answered, waits)] == [True, False, True]
            assert runner.unbegun() == {waits.id}
            work.may_end.set()

    asyncio.run(run())
