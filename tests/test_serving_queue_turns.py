"""fal's queue, interrupted at every hand-over of the event loop: a request is on the disk and answered for, or it never was."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from loop_turns import Interruption, at_every_hand_over

from uso_engine.config import load_config
from uso_engine.errors import OutputError
from uso_engine.serving.in_thread import in_thread
from uso_engine.serving.queue_records import QueuedRequest, QueueRecords, new_id
from uso_engine.serving.queue_runner import QueueRunner
from uso_engine.serving.service import Service
from uso_engine.serving.settings import RequestBounds
from uso_engine.serving.wire_request import wire_request

CONFIG = load_config("uso-tiny")


class MemoryStorage:
    """Files in a dictionary; writing those of a kind fails as often as a test says."""

    def __init__(self, fails: str = "", times: int = 0) -> None:
        self.files: dict[str, bytes] = {}
        self._fails, self.times = fails, times
        self.lost: list[bytes] = []

    def write(self, name: str, data: bytes, content_type: str) -> None:
        if self._fails and self._fails in name and self.times:
            self.times -= 1
            self.lost.append(data)
            raise OutputError(f"{name} cannot be written")
        self.files[name] = data

    def read(self, name: str) -> bytes:
        try:
            return self.files[name]
        except KeyError:
            raise FileNotFoundError(name) from None

    def names(self, folder: str) -> list[str]:
        return sorted(name.removeprefix(f"{folder}/") for name in self.files if name.startswith(f"{folder}/"))

    def delete(self, name: str) -> None:
        self.files.pop(name, None)

    def signed_url(self, name: str, seconds: float) -> str:
        raise NotImplementedError


class Work:
    """What a queue asks of a service: an engine that takes some turns, and delivery."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(queue_width=1, max_waiting=4, expiry_s=60.0, bounds=RequestBounds())
        self.config, self.request_type = CONFIG, wire_request(CONFIG, RequestBounds())
        self.state = SimpleNamespace(phase="ready", ready=lambda: self)
        self.computing = 0
        self.begun = asyncio.Event()

    async def generate(self, request: object, *, priority: int, timeout_s: float) -> str:
        self.computing += 1
        self.begun.set()
        try:
            for _ in range(4):
                await asyncio.sleep(0)
            return "result"
        finally:
            self.computing -= 1

    async def deliver(self, call: object, result: str, base_url: str) -> bytes:
        await asyncio.to_thread(int)
        return b"answer"


@asynccontextmanager
async def queue(storage: MemoryStorage) -> AsyncIterator[tuple[QueueRunner, QueueRecords, Work]]:
    """A queue that works."""
    records, work = QueueRecords(storage), Work()
    runner = QueueRunner(cast("Service", work), records, "server")
    async with runner.running():
        yield runner, records, work


def queued() -> QueuedRequest:
    fields: dict[str, Any] = {"prompt": "a fish", "seed": 1, "image_urls": [], "model": "bytedance/uso"}
    return QueuedRequest(id=new_id(), model="fal-ai/uso", fields=fields, key="anonymous", base_url="http://127.0.0.1")


async def ended(runner: QueueRunner, identifier: str) -> None:
    """Wait until a queue does not answer for a request any more."""
    async with asyncio.timeout(20):
        while runner.has(identifier):
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("again", [None, 1, 2])
def test_a_call_in_a_thread_that_is_cancelled_has_ended(again: int | None) -> None:
    async def scenario(interruption: Interruption) -> None:
        done, may_write = list[str](), threading.Event()

        def write(text: str) -> None:
            assert may_write.wait(20)
            done.append(text)

        asyncio.get_running_loop().call_later(0.005, may_write.set)
        task = await interruption.of(in_thread(None, write, "written"))
        assert done == ["written"] or interruption.callbacks == 0  # Then it was never called.
        assert task.cancelled() == interruption.happened

    assert at_every_hand_over(scenario, again=again) >= 2


async def goes_on(storage: MemoryStorage, runner: QueueRunner, records: QueueRecords, work: Work) -> None:
    """The queue answers the next request, and holds nothing of those before."""
    storage.times = 0
    last = queued()
    await runner.submit(last)
    await ended(runner, last.id)
    assert records.result(last.id) == b"answer"
    assert work.computing == 0 and runner.waiting == 0


@pytest.mark.parametrize("again", [None, 1, 2])
@pytest.mark.parametrize("fails", ["", "state"])
def test_a_submission_that_is_broken_off_leaves_nothing(fails: str, again: int | None) -> None:
    """Its client was told of no identifier: a request that stayed would be computed for nobody."""

    async def scenario(interruption: Interruption) -> None:
        storage, request = MemoryStorage(fails, 1), queued()
        records = QueueRecords(storage)
        runner = QueueRunner(cast("Service", Work()), records, "server")
        task = await interruption.of(runner.submit(request))
        if task.cancelled() or task.exception():
            assert storage.files == {}
            assert not runner.has(request.id) and runner.waiting == 0
        else:
            assert task.result() == 0
            assert runner.has(request.id)
            assert list(records.unfinished()) == [request.id]
        runner._threads.shutdown()

    assert at_every_hand_over(scenario, again=again) >= 2


@pytest.mark.parametrize("fails", ["", "result"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_request_whose_cancelling_is_broken_off_is_answered_or_goes_on(begun: bool, fails: str) -> None:
    async def scenario(interruption: Interruption) -> None:
        storage, request = MemoryStorage(fails, 1), queued()
        async with queue(storage) as (runner, records, work):
            before = queued() if not begun else None
            if before is not None:
                await runner.submit(before)
                await work.begun.wait()
            await runner.submit(request)
            if begun:
                await work.begun.wait()
            task = await interruption.of(runner.cancel(request.id, request.key, request.model))
            assert task.cancelled() or isinstance(task.exception(), OutputError) or task.result() in ("requested", "completed")
            await ended(runner, request.id)
            state = records.state(request.id)
            if state is not None and state.status == "COMPLETED":
                assert records.unfinished().keys() <= {before.id if before else ""}
                assert state.error in (None, "The request was cancelled.")
            else:  # The storage failed: it is taken up again from there.
                assert fails and request.id in records.unfinished()
            await goes_on(storage, runner, records, work)

    assert at_every_hand_over(scenario) >= 1


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("fails", ["", "result", "state"])
def test_a_request_that_is_cancelled_in_any_turn_ends_and_the_queue_goes_on(fails: str, times: int) -> None:
    async def scenario(interruption: Interruption) -> None:
        storage, request = MemoryStorage(fails, int(fails == "result")), queued()
        cancelling = list[asyncio.Task[Any]]()
        async with queue(storage) as (runner, records, work):

            def cancel() -> None:
                storage.times = int(not storage.lost)
                for _ in range(times):
                    cancelling.append(asyncio.ensure_future(runner.cancel(request.id, request.key, request.model)))

            await runner.submit(request)
            await interruption.of(ended(runner, request.id), cancel)
            answers = await asyncio.gather(*cancelling, return_exceptions=True)
            await ended(runner, request.id)
            state = records.state(request.id)
            if state is not None and state.status == "COMPLETED":
                assert state.error == ("The request was cancelled." if records.result(request.id) != b"answer" else None)
                assert records.unfinished() == {}
            else:
                assert fails and list(records.unfinished()) == [request.id]  # It is taken up again from there,
                if storage.lost == [b"answer"] and "requested" in answers:
                    assert records.unfinished()[request.id]  # and cancelled then.
            await goes_on(storage, runner, records, work)

    assert at_every_hand_over(scenario) > 10


@pytest.mark.parametrize("again", [None, 1, 2, 3])
def test_a_server_that_ends_in_any_turn_leaves_a_request_or_its_answer(again: int | None) -> None:
    async def scenario(interruption: Interruption) -> None:
        storage, request = MemoryStorage(), queued()
        works = list[Work]()

        async def serve() -> None:
            async with queue(storage) as (runner, _, work):
                works.append(work)
                await runner.submit(request)
                await ended(runner, request.id)

        task = await interruption.of(serve())
        records = QueueRecords(storage)
        state = records.state(request.id)
        if state is not None:
            answered = state.status == "COMPLETED"
            assert list(records.unfinished()) == ([] if answered else [request.id])
            assert records.result(request.id) == (b"answer" if answered else None)
        else:
            assert storage.files == {} and task.cancelled()
        assert sum(work.computing for work in works) == 0

    assert at_every_hand_over(scenario, again=again) > 10
