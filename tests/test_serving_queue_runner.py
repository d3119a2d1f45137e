"""What fal's queue writes down, in the order in which it happened, whenever a request is cancelled."""

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from queue_parts import MemoryStorage, Work, ended, queue, queued, upkeep_of

from uso_engine.errors import OutputError
from uso_engine.serving import queue_runner, retry
from uso_engine.serving.delivery import Delivery
from uso_engine.serving.files import ImageFiles
from uso_engine.serving.leases import Leases
from uso_engine.serving.queue_records import QueuedRequest, QueueRecords, QueueState, new_id
from uso_engine.serving.queue_runner import QueueRunner
from uso_engine.serving.queue_upkeep import QueueUpkeep
from uso_engine.serving.service import Service
from uso_engine.serving.storage import FolderStorage, Storage


class SlowRecords(QueueRecords):
    """Storage that takes as long as a test wants to write that a request is in progress."""

    def __init__(self, folder: Path) -> None:
        super().__init__(FolderStorage(folder))
        self.writing, self.may_write = threading.Event(), threading.Event()

    def put_state(self, identifier: str, state: QueueState) -> None:
        if state.status == "IN_PROGRESS":
            self.writing.set()
            assert self.may_write.wait(60)
        super().put_state(identifier, state)


@pytest.mark.parametrize("times", [1, 2])
def test_cancelled_while_its_beginning_is_written_it_ends_as_cancelled(times: int, tmp_path: Path) -> None:
    """The beginning, written late, must not stand over the end: whoever follows the request would wait for ever."""
    records = SlowRecords(tmp_path)
    settings = SimpleNamespace(queue_width=1, max_waiting=4, expiry_s=60.0)
    request = QueuedRequest(id=new_id(), model="fal-ai/uso", fields={}, key="anonymous", base_url="http://127.0.0.1")

    async def cancel_it() -> None:
        async with asyncio.timeout(60):
            await cancel_while_its_beginning_is_written()

    async def cancel_while_its_beginning_is_written() -> None:
        runner = QueueRunner(cast("Service", SimpleNamespace(settings=settings)), records, "server")
        async with runner.running():
            await runner.submit(request)
            assert await asyncio.to_thread(records.writing.wait, 60)
            for _ in range(times):
                assert await runner.cancel(request.id, request.key, request.model) == "requested"
                await asyncio.sleep(0.1)  # Time in which an end could be written too early.
            records.may_write.set()
            while runner.has(request.id):
                await asyncio.sleep(0.01)

    asyncio.run(cancel_it())
    state = records.state(request.id)
    assert state is not None
    assert (state.status, state.error) == ("COMPLETED", "The request was cancelled.")
    assert records.unfinished() == {}


def upkeep_with(leases: Leases, storage: Storage) -> QueueUpkeep:
    """The upkeep of a server that has no requests."""
    runner, files = SimpleNamespace(has=lambda identifier: False, takes_up=True), SimpleNamespace(sweep=lambda: None)
    return QueueUpkeep(cast("QueueRunner", runner), QueueRecords(storage), cast("ImageFiles", files), leases, expiry_s=60.0)


class SlowRenewal(Leases):
    """Storage that takes as long as a test wants to write that a server is alive."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage, "server", 60.0)
        self.writing, self.may_write = threading.Event(), threading.Event()
        self.begun = False

    def renew(self, *, takes_up: bool) -> None:
        if self.begun:  # The first is written before the server begins.
            self.writing.set()
            assert self.may_write.wait(60)
        self.begun = True
        super().renew(takes_up=takes_up)


def test_a_server_that_ends_while_it_says_that_it_is_alive_has_ended(tmp_path: Path) -> None:
    """Otherwise the others would wait for a whole lease before they take up what it leaves."""
    storage = FolderStorage(tmp_path)
    leases = SlowRenewal(storage)

    async def begin_and_end() -> None:
        threading.Timer(0.3, leases.may_write.set).start()  # Time in which its end could be written too early.
        async with upkeep_with(leases, storage).running():
            assert storage.names("owners") == ["server.json"]
            assert await asyncio.to_thread(leases.writing.wait, 60)

    asyncio.run(begin_and_end())
    assert leases.may_write.is_set()
    assert storage.names("owners") == [] and leases.has_ended("server")


class OddLeases(Leases):
    """Storage that fails in a way that nobody foresaw, the first time."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage, "server", 0.03)
        self.renewals = 0
        self.renewed_again = threading.Event()

    def renew(self, *, takes_up: bool) -> None:
        self.renewals += 1
        if self.renewals == 1:
            raise RuntimeError("an odd failure")
        super().renew(takes_up=takes_up)
        self.renewed_again.set()


def test_a_failure_that_nobody_foresaw_does_not_end_the_upkeep(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = FolderStorage(tmp_path)
    leases = OddLeases(storage)

    async def until_renewed() -> list[str]:
        async with upkeep_with(leases, storage).running():
            assert await asyncio.to_thread(leases.renewed_again.wait, 60)
            return storage.names("owners")

    assert asyncio.run(until_renewed()) == ["server.json"]
    assert "upkeep of the queue: an odd failure" in caplog.text
    assert storage.names("owners") == [] and leases.has_ended("server")


@pytest.mark.parametrize("restarted", [False, True], ids=["", "restarted"])
@pytest.mark.parametrize("begun", [False, True], ids=["waits", "runs"])
@pytest.mark.parametrize("fails", ["result", "state"])
def test_a_cancelled_request_whose_end_cannot_be_written_is_ended_later_and_not_computed(
    fails: str, begun: bool, restarted: bool
) -> None:
    async def scenario() -> None:
        storage, request, before = MemoryStorage(), queued(), queued()
        async with queue(storage) as (runner, records, work):
            work.may_end.clear()
            if not begun:
                await runner.submit(before)
            await runner.submit(request)
            await work.begun.wait()
            storage.fails, storage.times = fails, 1
            assert await runner.cancel(request.id, request.key, request.model) == "requested"
            await ended(runner, request.id)
            assert len(storage.lost) == 1 and records.unfinished()[request.id]
            work.may_end.set()
            await ended(runner, before.id)
            if not restarted:
                await ends(storage, runner, work)
        if restarted:
            async with queue(storage) as (runner, _, work):
                await ends(storage, runner, work)

    async def ends(storage: MemoryStorage, runner: QueueRunner, work: Work) -> None:
        records, computed = QueueRecords(storage), work.times
        (identifier,) = records.unfinished()
        await upkeep_of(runner, storage).look()
        await ended(runner, identifier)
        state = records.state(identifier)
        assert state is not None
        assert (state.status, state.error) == ("COMPLETED", "The request was cancelled.")
        assert records.unfinished() == {} and work.times == computed

    asyncio.run(scenario())


def test_a_wish_to_cancel_that_cannot_be_kept_is_refused_and_changes_nothing() -> None:
    async def scenario() -> None:
        storage, request = MemoryStorage("cancel", 1), queued()
        async with queue(storage) as (runner, records, work):
            await runner.submit(request)
            await work.begun.wait()
            with pytest.raises(OutputError, match="cancel"):
                await runner.cancel(request.id, request.key, request.model)
            await ended(runner, request.id)
            assert records.result(request.id) == b"answer"

    asyncio.run(scenario())


@pytest.mark.parametrize("fails", [2, 9])
def test_what_cannot_be_stored_is_not_computed_again(fails: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_RETRY_S", 0.0)

    async def scenario() -> None:
        storage, request, left = MemoryStorage(), queued(), [fails]
        async with queue(storage) as (runner, records, work):
            deliver = work.deliver

            async def fail_first(call: object, result: str, delivery: Delivery) -> bytes:
                if left[0]:
                    left[0] -= 1
                    raise OutputError("no room")
                return await deliver(call, result, delivery)

            monkeypatch.setattr(work, "deliver", fail_first)
            await runner.submit(request)
            await ended(runner, request.id)
            state = records.state(request.id)
            assert state is not None and work.times == 1
            assert (state.status_code, state.error) == ((200, None) if fails == 2 else (503, "The storage failed."))

    asyncio.run(scenario())


def test_a_request_that_is_gone_from_the_storage_is_said(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> str:
        storage, before, request = MemoryStorage(), queued(), queued()
        async with queue(storage) as (runner, _, work):
            work.may_end.clear()
            await runner.submit(before)
            await runner.submit(request)
            await work.begun.wait()
            storage.files.clear()
            work.may_end.set()
            await ended(runner, request.id)
            return request.id

    assert f"queue request {asyncio.run(scenario())} is not in the storage any more" in caplog.text


def test_a_queue_that_ends_does_not_wait_for_an_engine_that_is_not_ready_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_runner, "_DELIVERY_S", 3600.0)

    async def scenario() -> None:
        storage, request = MemoryStorage(), queued()
        async with asyncio.timeout(20), queue(storage) as (runner, records, work):
            work.state.phase = "draining"
            await runner.submit(request)
            while (state := records.state(request.id)) is None or state.status != "IN_PROGRESS":
                await asyncio.sleep(0.01)
        assert list(records.unfinished()) == [request.id] and work.times == 0

    asyncio.run(scenario())


def test_what_was_cancelled_while_it_waited_is_held_no_longer() -> None:
    """Its places are free for the next: without an end, whoever submits and cancels in turn would fill the memory."""

    async def scenario() -> None:
        storage, first, last = MemoryStorage(), queued(), queued()
        async with queue(storage) as (runner, records, work):
            work.may_end.clear()
            await runner.submit(first)
            await work.begun.wait()
            for _ in range(20):
                request = queued()
                assert await runner.submit(request) == 0
                assert await runner.cancel(request.id, request.key, request.model) == "requested"
            assert await runner.submit(last) == 0
            assert (len(runner._heap), runner.waiting) == (1, 2)
            work.may_end.set()
            await ended(runner, last.id)
            assert records.result(last.id) == b"answer" and work.times == 2

    asyncio.run(scenario())
