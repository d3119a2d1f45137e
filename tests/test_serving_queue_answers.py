"""Answers of the queue: images of one that nobody is told of do not stay, and another server's answer stands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from living_application import application, living
from queue_parts import ended, queued
from served_double import DoubleEngine

from uso_engine.api.result import GenerationResult
from uso_engine.errors import OutputError
from uso_engine.serving import retry
from uso_engine.serving.delivery import Delivery
from uso_engine.serving.image_call import ImageCall
from uso_engine.serving.queue_records import QueuedRequest, QueueRecords, QueueState, begun_state
from uso_engine.serving.queue_runner import QueueRunner
from uso_engine.serving.refusal import Refusal
from uso_engine.serving.storage import FolderStorage


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again without a wait."""
    monkeypatch.setattr(retry, "_RETRY_S", 0.0)


class FullStorage(FolderStorage):
    """A disk on which files of some kinds find no room, so often; what a test does before a kind is written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.refused: dict[str, int] = {}
        self.keeps_all_the_same = self.unreadable = False
        self.before: dict[str, Callable[[], None]] = {}

    def write(self, name: str, data: bytes, content_type: str) -> None:
        kind = "done" if b'"COMPLETED"' in data else name.split(".")[-2]
        self.before.pop(kind, lambda: None)()
        if self.refused.get(kind):
            self.refused[kind] -= 1
            if self.keeps_all_the_same:
                super().write(name, data, content_type)
            raise OutputError(f"cannot write {name}: No space left on device")
        super().write(name, data, content_type)

    def read(self, name: str) -> bytes:
        if self.unreadable and name.endswith(".state.json"):
            raise OutputError(f"cannot read {name}")
        return super().read(name)


class Served:
    """A queue on a disk, its engine and its records."""

    def __init__(self, folder: Path) -> None:
        made = application(folder)
        self.service, self.storage = made.runner._service, FullStorage(folder)
        self.service.files._storage = self.storage
        self.engine = DoubleEngine(self.service.config)
        made.state._phase, made.state._engine = "ready", self.engine
        self.records, self.state = QueueRecords(self.storage), made.state
        self.request = queued()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[QueueRunner]:
        runner = QueueRunner(self.service, self.records, "server")
        async with asyncio.timeout(60), runner.running():
            yield runner

    def answered(self) -> QueueState | None:
        """Submit the request and wait until it is off this server's hands; its state then."""

        async def run() -> None:
            async with self.running() as runner:
                await runner.submit(self.request)
                await ended(runner, self.request.id)

        asyncio.run(run())
        self.service.close()
        return self.records.state(self.request.id)

    def images(self) -> list[str]:
        return self.storage.names("files")

    def told(self) -> bool:
        """Whether the images that are stored are those of the answer."""
        answer = self.records.result(self.request.id) or b""
        return len(self.images()) == 1 and self.images()[0].encode() in answer


@pytest.mark.parametrize("kind", ["result", "done"])
def test_an_answer_that_finds_room_later_has_its_images_and_is_computed_once(kind: str, tmp_path: Path) -> None:
    served = Served(tmp_path)
    served.storage.refused = {kind: 2}
    state = served.answered()
    assert state is not None and state.status_code == 200 and served.told()
    assert served.engine.begun == ["a fish"] and served.records.unfinished() == {}


def test_an_answer_for_which_there_is_no_room_is_a_failure_without_images(tmp_path: Path) -> None:
    """As one with images in it, on a disk that has room for small files alone."""
    served = Served(tmp_path)
    served.storage.refused = {"result": 5}
    state = served.answered()
    assert state is not None and (state.status_code, state.error) == (503, "The storage failed.")
    assert served.images() == [] and served.engine.begun == ["a fish"]


@pytest.mark.parametrize("kind", ["result", "done"])
def test_images_of_a_request_whose_end_cannot_be_written_do_not_stay(kind: str, tmp_path: Path) -> None:
    served = Served(tmp_path)
    served.storage.refused = {kind: 99}
    state = served.answered()
    assert state is not None and state.status == "IN_PROGRESS"
    assert served.images() == [] and list(served.records.unfinished()) == [served.request.id]


def test_images_of_an_answer_that_was_written_all_the_same_stay(tmp_path: Path) -> None:
    """A store whose answer was lost on the way: a client may have read the state, and has to find the images."""
    served = Served(tmp_path)
    served.storage.refused, served.storage.keeps_all_the_same = {"done": 1}, True
    state = served.answered()
    assert state is not None and state.status_code == 200 and served.told()


def test_images_of_an_answer_of_which_nobody_can_say_whether_it_was_told_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(tmp_path)
    served.storage.refused, served.storage.keeps_all_the_same = {"done": 1}, True
    served.storage.before["done"] = lambda: setattr(served.storage, "unreadable", True)

    async def run() -> None:
        async with served.running() as runner:
            await runner.submit(served.request)
            while "left to expire" not in caplog.text:
                await asyncio.sleep(0.001)
            served.storage.unreadable = False
            await ended(runner, served.request.id)

    asyncio.run(run())
    served.service.close()
    assert served.told()


@pytest.mark.parametrize("fails", [False, True], ids=["an image", "a failure"])
@pytest.mark.parametrize("at", ["state", "png"], ids=["before it is begun", "while it is computed"])
def test_the_answer_of_a_server_that_took_a_request_up_stands(at: str, fails: bool, tmp_path: Path) -> None:
    """This one was held up for longer than its lease."""
    served, others = Served(tmp_path), QueueRecords(FolderStorage(tmp_path))
    if fails:
        served.request = served.request.model_copy(
            update={"fields": {**served.request.fields, "prompt": "raise:image steps:1"}}
        )
    over = begun_state(served.request, "other").model_copy(update={"status": "COMPLETED", "status_code": 200})

    async def run() -> None:
        async with served.running() as runner:
            generate = served.engine.generate

            async def taken(*given: object, **named: object) -> object:
                others.finish(served.request.id, over, b"the other's answer")
                return await generate(*given, **named)  # type: ignore[arg-type]

            if at == "png":
                served.engine.generate = taken  # type: ignore[assignment,method-assign]
            else:
                accept = served.records.accept

                def then_lost(request: QueuedRequest, owner: str) -> bool:
                    accept(request, owner)
                    others.finish(request.id, over, b"the other's answer")
                    return True

                served.records.accept = then_lost  # type: ignore[method-assign]
            await runner.submit(served.request)
            await ended(runner, served.request.id)

    asyncio.run(run())
    served.service.close()
    assert served.records.state(served.request.id) == over
    assert served.records.result(served.request.id) == b"the other's answer"
    assert served.images() == [] and len(served.engine.begun) == (0 if at == "state" else 1)


@pytest.mark.parametrize("status", [200, 503])
def test_an_answer_that_was_told_as_its_request_was_taken_up_stands(status: int, tmp_path: Path) -> None:
    """Its server was taken for dead; this one had read the request, and says that it is its own after the answer."""
    served, others = Served(tmp_path), QueueRecords(FolderStorage(tmp_path))
    body = b'{"images": []}' if status == 200 else Refusal(503, "The storage failed.", errors=["so"]).body("/queue", "id")
    over = begun_state(served.request, "other").model_copy(update={"status": "COMPLETED", "status_code": status})

    async def run() -> None:
        async with served.running() as runner:
            others.accept(served.request, "other")
            others.finish(served.request.id, over, body)
            assert served.records.adopt(served.request, "server")
            runner.take_up(served.request)
            await ended(runner, served.request.id)

    asyncio.run(run())
    served.service.close()
    state = served.records.state(served.request.id)
    assert state is not None and (state.status, state.status_code) == ("COMPLETED", status)
    assert state.error == (None if status == 200 else "The storage failed.; so") and state.expires is not None
    assert served.records.result(served.request.id) == body and served.engine.begun == []


def test_a_server_that_ends_is_alive_until_it_has_delivered(tmp_path: Path) -> None:
    """Without its lease others would take up what it is delivering."""
    made, storage = application(tmp_path), FolderStorage(tmp_path)

    async def run() -> None:
        service, delivering, may_deliver = made.runner._service, asyncio.Event(), asyncio.Event()
        deliver = service.deliver

        async def slowly(call: ImageCall, result: GenerationResult, delivery: Delivery) -> bytes:
            delivering.set()
            await may_deliver.wait()
            return await deliver(call, result, delivery)

        service.deliver = slowly  # type: ignore[method-assign]

        async def ask_and_leave() -> None:
            async with living(made) as client:
                await client.post("/queue/fal-ai/uso", json={"prompt": "", "image_size": {"width": 64, "height": 64}})
                await delivering.wait()

        ending = asyncio.create_task(ask_and_leave())
        while made.runner.takes_up:
            await asyncio.sleep(0.001)
        assert len(storage.names("owners")) == 1
        may_deliver.set()
        await ending

    asyncio.run(run())
    assert storage.names("owners") == [] and QueueRecords(storage).unfinished() == {}
    assert len(storage.names("files")) == 1


def test_a_request_whose_file_is_gone_ends_with_an_error(tmp_path: Path) -> None:
    """Otherwise whoever follows it would wait for ever."""
    served = Served(tmp_path)
    accept = served.records.accept

    def then_gone(request: QueuedRequest, owner: str) -> bool:
        accepted = accept(request, owner)
        served.storage.delete(f"queue/{request.id}.request.json")
        return accepted

    served.records.accept = then_gone  # type: ignore[method-assign]
    state = served.answered()
    assert state is not None and (state.status, state.status_code) == ("COMPLETED", 500)
