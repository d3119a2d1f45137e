"""fal's queue, interrupted at every hand-over of the event loop: a request is on the disk and answered for, or it never was."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any, cast

import pytest
from living_application import application
from loop_turns import Interruption, at_every_hand_over
from queue_parts import MemoryStorage, Work, ended, queue, queued, upkeep_of
from served_double import DoubleEngine

from uso_engine.errors import OutputError
from uso_engine.serving import retry
from uso_engine.serving.in_thread import in_thread
from uso_engine.serving.queue_records import QueuedRequest, QueueRecords, QueueState, Submission
from uso_engine.serving.queue_runner import QueueRunner
from uso_engine.serving.queue_submission import submitted_once
from uso_engine.serving.service import Service
from uso_engine.serving.settings import ServerSettings
from uso_engine.serving.storage import FolderStorage


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again without a wait."""
    monkeypatch.setattr(retry, "_RETRY_S", 0.0)


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


@pytest.mark.parametrize("again", [None, 1, 2])
def test_a_submission_with_a_key_that_is_broken_off_is_kept_as_soon_as_its_key_is(again: int | None) -> None:
    """Whoever sent it again at that moment was told of it."""
    kept = set[bool]()

    async def scenario(interruption: Interruption) -> None:
        storage, request = MemoryStorage(), queued()
        request = request.model_copy(update={"submission": Submission(name="name", fingerprint="what")})
        records = QueueRecords(storage)
        runner = QueueRunner(cast("Service", Work()), records, "server")
        task = await interruption.of(runner.submit(request))
        found = records.submitted("name")
        kept.add(task.cancelled() and found is not None)
        if found is None:
            assert storage.files == {} and task.cancelled()
        else:
            assert found.id == request.id and list(records.unfinished()) == [request.id]
            assert records.state(request.id) is not None and runner.has(request.id) != task.cancelled()
        runner._threads.shutdown()

    assert at_every_hand_over(scenario, again=again) >= 2
    assert kept == {False, True}


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
                storage.times, computed = 0, work.times
                await upkeep_of(runner, storage).look()
                await ended(runner, request.id)
                state = records.state(request.id)
                assert state is not None and state.status == "COMPLETED"
                if "requested" in answers:  # and cancelled then, without being computed once more.
                    assert (state.error, work.times) == ("The request was cancelled.", computed)
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


@pytest.mark.parametrize("again", [None, 1])
def test_a_request_that_is_cancelled_in_any_turn_leaves_no_images_but_those_of_its_answer(
    again: int | None, tmp_path: Path
) -> None:
    made = application(tmp_path, ServerSettings(page=False))
    made.state._phase = "ready"
    service, storage = made.runner._service, FolderStorage(tmp_path)
    answered = set[bool]()

    async def scenario(interruption: Interruption) -> None:
        made.state._engine = DoubleEngine(service.config)
        records, request = QueueRecords(storage), queued()
        runner = QueueRunner(service, records, "server")
        cancelling = list[asyncio.Task[Any]]()

        def cancel() -> None:
            cancelling.append(asyncio.ensure_future(runner.cancel(request.id, request.key, request.model)))

        async with runner.running():
            await runner.submit(request)
            await interruption.of(ended(runner, request.id), cancel)
            await asyncio.gather(*cancelling)
            await ended(runner, request.id)
        answer = records.result(request.id)
        assert answer is not None
        names = storage.names("files")
        answered.add(b".png" in answer)
        assert len(names) == answer.count(b'"images":[{') and all(name.encode() in answer for name in names)
        for name in names:
            service.files.remove(name)

    assert at_every_hand_over(scenario, again=again) > 10
    service.close()
    assert answered == {True, False}


def test_a_submission_that_is_broken_off_after_another_one_with_its_key_was_cancelled() -> None:
    """The second was told of the request before the first was, and had it removed."""
    storage, claimed, may_end = MemoryStorage(), threading.Event(), threading.Event()
    request = queued().model_copy(update={"submission": Submission(name="name", fingerprint="what")})

    async def run() -> None:
        async with queue(storage) as (runner, records, _), asyncio.timeout(20):
            accept = records.accept

            def slowly(request: QueuedRequest, owner: str) -> bool:
                accepted = accept(request, owner)
                claimed.set()
                assert may_end.wait(20)
                return accepted

            records.accept = slowly  # type: ignore[method-assign]
            first = asyncio.create_task(runner.submit(request))
            assert await asyncio.to_thread(claimed.wait, 20)
            assert await runner.cancel(request.id, request.key, request.model) == "requested"
            first.cancel()
            may_end.set()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert not runner.has(request.id)
            state = records.state(request.id)
            assert state is not None and (state.status, state.status_code) == ("COMPLETED", 400)

    asyncio.run(run())


def test_of_two_that_find_a_key_to_lead_nowhere_the_slower_one_does_not_make_it_lead_nowhere_again() -> None:
    """Both send the same submission again; the faster one's request is the second one's, too."""
    storage = MemoryStorage()
    old, new, late = (queued().model_copy(update={"submission": Submission(name="name", fingerprint="what")}) for _ in range(3))

    async def run() -> None:
        async with queue(storage) as (runner, records, work), asyncio.timeout(20):
            work.may_end.clear()
            records.accept(old, "other")
            for kind in ("request", "state"):
                storage.delete(f"queue/{old.id}.{kind}.json")
            look = records.state

            def then_faster(identifier: str) -> QueueState | None:
                found = look(identifier)
                if identifier == old.id:
                    records.forget("name", old.id)
                    assert records.accept(new, "other")
                return found

            records.state = then_faster  # type: ignore[method-assign]
            assert await submitted_once(runner, late) == (new.id, 0)
            assert set(records.unfinished()) == {new.id}

    asyncio.run(run())
