"""The loop's bounds, faults and endings, turned by hand and told the time."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from random_models import small_transformer
from small_requests import CPU, HandTurnedLoop, SmallWork, alone, image_jobs

from uso_engine.api.events import Conditioning, Decoding, Done, Queued, Stepped
from uso_engine.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineDrainingError,
    QueueFullError,
    RequestCancelledError,
    RequestTimeoutError,
)
from uso_engine.scheduling.handle import RequestHandle
from uso_engine.scheduling.loop import RequestLoop

TRANSFORMER = small_transformer()
IMAGES = image_jobs(TRANSFORMER, 0, 3)


def work(fault: str | None = None, size_bytes: int = 0) -> SmallWork:
    return SmallWork(list(IMAGES), fault, size_bytes)


def hand_turned(**limits: float) -> HandTurnedLoop:
    return HandTurnedLoop(TRANSFORMER, **limits)


def test_a_request_tells_what_happens_to_it_in_order() -> None:
    loop = hand_turned()
    first, second = loop.submit(work()), loop.submit(work())
    loop.run()
    kinds = [Queued, Conditioning, Stepped, Stepped, Stepped, Decoding, Done]
    assert [type(message) for message in first.read()] == kinds
    assert [type(message) for message in second.read()] == kinds
    assert second.messages[0] == Queued(1)
    assert [message for message in first.messages if isinstance(message, Stepped)] == [Stepped(i, 3) for i in range(3)]
    assert torch.equal(first.latents[0], alone(TRANSFORMER, first.work)[0])


def test_previews_come_with_the_steps() -> None:
    loop = hand_turned()
    request = loop.submit(work(), wants_previews=True)
    loop.run()
    steps = [message for message in request.read() if isinstance(message, Stepped)]
    assert [step.index for step in steps] == [0, 1, 2]
    assert any(step.preview is not None for step in steps)


def test_more_requests_than_there_may_be_are_refused_at_once() -> None:
    loop = hand_turned(max_requests=2)
    kept = [loop.submit(work()) for _ in range(2)]
    with pytest.raises(
        QueueFullError, match=r"queue\.max_requests is 2, with this request it would be 3; try again in"
    ) as full:
        loop.submit(work())
    assert (full.value.bound, full.value.limit, full.value.value) == ("max_requests", 2, 3)
    assert full.value.retry_after_s > 0
    loop.run()
    assert all(isinstance(request.read()[-1], Done) for request in kept)
    loop.submit(work())
    loop.run()
    assert loop.queue.counters.outcomes == {"done": 3, "refused": 1}


def test_more_bytes_than_there_may_be_are_refused() -> None:
    loop = hand_turned(max_mib=1)
    loop.submit(work(size_bytes=600_000))
    with pytest.raises(QueueFullError, match=r"queue\.max_mib is 1, with this request it would be 1\.14"):
        loop.submit(work(size_bytes=600_000))
    loop.run()
    loop.submit(work(size_bytes=600_000))
    loop.run()
    assert loop.queue.requests == ()
    assert loop.queue.counters.outcomes == {"done": 2, "refused": 1}


def test_time_runs_out_before_a_request_begins_and_after() -> None:
    loop = hand_turned(max_queue_s=10, max_request_s=100)
    late, slow, short = loop.submit(work()), loop.submit(work(), wants_steps=True), loop.submit(work(), timeout_s=5)
    loop.clock.now_s = 5
    loop.turn()
    assert isinstance(short.error, RequestTimeoutError)
    assert "not done in the 5 s it had" in str(short.error)
    loop.clock.now_s = 6
    loop.run()
    loop.clock.now_s = 99
    loop.turn()
    assert slow.handle.looking
    loop.clock.now_s = 100
    loop.run()
    assert "not done in the 100 s it had" in str(slow.error)
    assert isinstance(late.read()[-1], Done)
    waiting = loop.submit(work())
    loop.clock.now_s = 110
    loop.turn()
    assert isinstance(waiting.error, RequestTimeoutError)
    assert "queue.max_queue_s is 10" in str(waiting.error)
    assert loop.queue.counters.outcomes["timed_out"] == 3


def test_a_stage_that_fails_fails_its_request_alone() -> None:
    loop = hand_turned()
    requests = {fault: loop.submit(work(fault)) for fault in ("encode", "admit", "finish")}
    sound = loop.submit(work())
    loop.run()
    for fault, request in requests.items():
        assert str(request.error) == f"{fault} fails"
    assert torch.equal(sound.latents[0], alone(TRANSFORMER, sound.work)[0])
    assert loop.queue.counters.outcomes == {"done": 1, "failed": 3}


def test_a_step_that_one_request_cannot_take_fails_it_alone() -> None:
    loop = hand_turned()
    sound, broken = loop.submit(work()), loop.submit(work())
    while not broken.request.jobs:
        loop.turn()
    broken.request.jobs[0].latent = torch.zeros(3, 5)
    loop.run()
    assert isinstance(broken.error, RuntimeError)
    assert torch.equal(sound.latents[0], alone(TRANSFORMER, sound.work)[0])


def test_a_device_that_is_lost_ends_everything_with_the_cause() -> None:
    loop = HandTurnedLoop(TRANSFORMER)
    threaded = RequestLoop(loop.queue, loop.machine, CPU)
    loop.loop = threaded
    loop.machine.fault = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    # All have to be in line before the first step is taken: nobody gets in after it.
    loop.machine.may_step.clear()
    requests = [loop.submit(work()) for _ in range(3)]
    loop.machine.may_step.set()
    for request in requests:
        request.handle.wait_until_ended()
    threaded.join()
    for call in (
        lambda: loop.submit(work()),
        lambda: threaded.change_loras("x"),
        lambda: threaded.call(threaded.decoding, lambda: None),
    ):
        with pytest.raises(EngineDeadError, match="AcceleratorError: CUDA error: an illegal memory access") as dead:
            call()
        assert dead.value.__cause__ is loop.machine.fault
    threaded.close()


@pytest.mark.parametrize("owner", ["scheduler", "worker"])
def test_a_fault_in_a_thread_of_the_loop_ends_everything(owner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    others = set(threading.enumerate())
    loop = HandTurnedLoop(TRANSFORMER)
    threaded = loop.loop = RequestLoop(loop.queue, loop.machine, CPU)

    def fail(*given: object) -> None:
        raise ZeroDivisionError("a fault of the loop")

    if owner == "scheduler":
        monkeypatch.setattr(loop.queue.scheduler, "choose", fail)
    else:
        monkeypatch.setattr(threaded._stages, "condition", fail)
    waiting = [RequestHandle() for _ in range(3)]
    for handle in waiting:
        try:
            request = loop.queue.accept(handle)
            loop.queue.enqueue(request, work(), tokens=1)
            threaded.submit(request)
        except EngineDeadError:
            loop.queue.withdraw(handle)
    for handle in waiting:
        if handle.ended or not handle._messages.empty():
            handle.wait_until_ended()
    threaded.join()
    assert isinstance(loop.queue.acceptance.failure, ZeroDivisionError)
    assert loop.queue.requests == ()
    assert set(threading.enumerate()) <= others


def test_draining_finishes_what_is_there_and_cuts_off_the_rest() -> None:
    loop = HandTurnedLoop(TRANSFORMER)
    threaded = loop.loop = RequestLoop(loop.queue, loop.machine, CPU)
    done, looked_at = loop.submit(work()), loop.submit(work(), wants_steps=True)
    done.handle.wait_until_ended()
    assert threaded.drain(0) == 1  # Its caller never looks at the step.
    assert isinstance(looked_at.error, EngineDrainingError)
    with pytest.raises(EngineDrainingError, match="finishes what it has and accepts no more"):
        loop.submit(work())
    assert threaded.drain(5) == 0
    threaded.close()


def test_closing_waits_for_those_who_have_begun_and_fails_the_others() -> None:
    loop = HandTurnedLoop(TRANSFORMER, max_step_tokens=1)
    begun = loop.submit(work(), wants_steps=True)
    while not begun.handle.looking:
        loop.turn()
    waiting = loop.submit(work())
    closing = threading.Thread(target=loop.loop.close)
    closing.start()
    while not loop.queue.acceptance.closed:
        closing.join(0.001)
    while loop.loop.round() or not waiting.handle._messages.qsize() or begun.handle.looking:
        begun.look(lambda step: None)
    closing.join(60)
    assert not closing.is_alive()
    assert isinstance(begun.read()[-1], Done)
    assert isinstance(waiting.error, EngineClosedError)
    with pytest.raises(EngineClosedError, match="engine small was closed"):
        loop.submit(work())


def test_a_caller_who_cannot_be_told_is_given_up() -> None:
    loop = hand_turned()

    def deliver(message: object) -> None:
        raise RuntimeError("the event loop is closed")

    loop.submit(work(), deliver=deliver)
    sound = loop.submit(work())
    loop.run()
    assert loop.queue.requests == ()
    assert isinstance(sound.read()[-1], Done)
    assert loop.queue.counters.outcomes == {"cancelled": 1, "done": 1}


def test_a_request_with_other_loras_and_nobody_in_its_way_begins_at_once() -> None:
    """Conditioning has a thread of its own, after whose work the loop looks once; then it would sleep until the patience of
    those with the present LoRAs ends."""
    loop, wanted = hand_turned(), work()
    wanted.loras = "a"  # type: ignore[attr-defined]
    request = loop.submit(wanted).request
    steps = request.steps_left
    assert loop.loop.conditioning.run_one()
    loop.turn()
    assert loop.machine.loras == ["a"]
    assert request.steps_left == steps - 1


def test_requests_with_loras_of_their_own_wait_for_the_weights() -> None:
    loop = hand_turned()

    def with_loras(name: str | None) -> SmallWork:
        made = work()
        made.loras = name  # type: ignore[attr-defined]
        return made

    requests = [loop.submit(with_loras(name)) for name in (None, "a", None, "b", "a")]
    loop.run()
    assert all(isinstance(request.read()[-1], Done) for request in requests)
    # Grouped: each set once, not in the order of arrival.
    assert loop.machine.loras == ["a", "b"]
    loop.machine.refused_loras = "c"
    refused, sound = loop.submit(with_loras("c")), loop.submit(with_loras("b"))
    loop.run()
    assert str(refused.error) == "these LoRAs do not fit"
    assert isinstance(sound.read()[-1], Done)


def test_a_trace_says_who_did_what(tmp_path: Path) -> None:
    loop = hand_turned()
    with loop.loop.traced(tmp_path / "trace.json"):
        loop.submit(work())
        loop.run()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event["ph"] == "X"]
    assert sorted(set(names)) == ["admission", "request 1", "step"]
    assert names.count("step") == 3
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"denoising", "conditioning", "decoding"}
    loop.submit(work())
    loop.run()
    assert loop.loop.trace is None


def test_a_request_cancelled_before_it_is_in_line_is_gone() -> None:
    loop = hand_turned()
    handle = RequestHandle()
    request = loop.queue.accept(handle)
    handle.cancel()
    with pytest.raises(RequestCancelledError):
        loop.queue.enqueue(request, work(), tokens=1)
    loop.loop.give_up(handle)
    assert handle.ended
    assert loop.queue.requests == ()
