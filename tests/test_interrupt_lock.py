"""One thread at a time, none from inside itself, and no interrupt that keeps the lock."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

import uso_engine.interrupt_lock
from uso_engine import USOEngine
from uso_engine.interrupt_lock import InterruptSafeLock
from uso_engine.sampling.step import Step


def test_an_engine_called_from_on_step_says_so_instead_of_waiting_for_itself() -> None:
    size = {"width": 64, "height": 64}
    with USOEngine.from_config("uso-tiny", device="cpu") as engine:
        calls: tuple[Callable[[], object], ...] = (
            lambda: engine.encode_prompt("a fish"),
            lambda: engine.generate(prompt="a fish"),
            lambda: engine.set_loras([]),
            engine.close,
        )
        for call in calls:

            def on_step(step: Step, call: Callable[[], object] = call) -> None:
                call()

            with pytest.raises(RuntimeError, match=r"from on_step only engine\.preview can be called"):
                engine.generate(prompt="a cup", image_size=size, num_inference_steps=2, on_step=on_step)

        def look(step: Step) -> None:
            engine.preview(step)

        assert engine.generate(prompt="a cup", image_size=size, num_inference_steps=2, on_step=look).images


def test_others_wait() -> None:
    lock, order = InterruptSafeLock(), list[str]()
    waiting = threading.Thread(target=lock.run, args=(lambda: order.append("second"),))

    def first() -> None:
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
        order.append("first")

    lock.run(first)
    waiting.join(5)
    assert order == ["first", "second"]

    def fail() -> None:
        raise KeyError

    # An error gives the lock back, too.
    with pytest.raises(KeyError):
        lock.run(fail)
    assert lock.run(lambda: "third") == "third"


def interrupted_at(position: int, lock: InterruptSafeLock) -> tuple[bool, list[str]]:
    """Take a lock and raise KeyboardInterrupt before the instruction of that number in interrupt_lock.py.

    In a thread of its own: raising from a trace function while an exception is handled leaves traces in the thread's state.

    Returns:
        Whether there was such an instruction, and whether the work was done.
    """
    done: list[str] = []
    interrupted: list[str] = []
    seen = 0

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        nonlocal seen
        if frame.f_code.co_filename != uso_engine.interrupt_lock.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen += 1
            if seen == position:
                raise KeyboardInterrupt
        return trace

    def work() -> None:
        sys.settrace(trace)
        try:
            lock.run(lambda: done.append("work"))
        except KeyboardInterrupt:
            interrupted.append("here")
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return bool(interrupted), done


def test_an_interrupt_at_any_instruction_leaves_the_lock_free() -> None:
    lock = InterruptSafeLock()
    if not interrupted_at(1, lock)[0]:
        pytest.skip("this Python traces no instructions of a function that is being entered (3.12)")
    position, interrupted, outcomes = 0, True, set[bool]()
    while interrupted:
        position += 1
        interrupted, done = interrupted_at(position, lock)
        outcomes.add(bool(done))
        got: list[str] = []
        other = threading.Thread(target=lock.run, args=(lambda got=got: got.append("lock"),), daemon=True)
        other.start()
        other.join(5)
        assert got == ["lock"], f"held after an interrupt at instruction {position}"
    # There were instructions before the work and after it.
    assert outcomes == {False, True}
    assert position > 30
