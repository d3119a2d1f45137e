"""An engine and its process: Ctrl-C, the interpreter's end, and what a thousand requests leave behind."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import pickle
import random
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import small_transformer
from small_requests import CPU, HandTurnedLoop, SmallWork, image_jobs

from uso_engine import AsyncUSOEngine, USOEngine
from uso_engine.api.events import Done
from uso_engine.process_state import _process
from uso_engine.sampling.job import Job
from uso_engine.scheduling.handle import Failed
from uso_engine.scheduling.loop import RequestLoop

BEGIN = """
import os, signal, sys, threading, torch
torch.set_num_threads(1)
# A shell starts what it puts in the background with interrupts ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
from uso_engine import USOEngine
from uso_engine.errors import EngineClosedError
engine = USOEngine.from_config("uso-tiny", device="cpu")
fields = dict(prompt="a fish", image_size={"width": 64, "height": 64}, num_inference_steps=50)
def threads():
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("uso-engine"))
"""
INTERRUPTED = (
    BEGIN
    + """
begun = threading.Event()
def interrupt():
    while not engine.statistics().steps:
        pass
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    engine.generate(**fields)
except KeyboardInterrupt:
    print("interrupted", engine.statistics().outcomes, engine.loop.queue.requests, torch.get_default_dtype())
print(len(engine.generate(**{**fields, "num_inference_steps": 1}).images), "image")
engine.close()
print("left", threads())
"""
)
NEVER_CLOSED = (
    BEGIN
    + """
def work():
    print(len(engine.generate(**fields).images), "image", flush=True)
threading.Thread(target=work).start()
def cut_off():
    try:
        engine.generate(**fields)
    except EngineClosedError:
        pass
threading.Thread(target=cut_off, daemon=True).start()
# From Python 3.12 on no thread is started once this one has ended.
while not engine.statistics().steps:
    pass
"""
)
TOO_LATE = (
    BEGIN
    + """
def work():
    threading.main_thread().join()
    try:
        print(len(engine.generate(**{**fields, "num_inference_steps": 1}).images), "image", flush=True)
    except EngineClosedError as error:
        print(error, flush=True)
threading.Thread(target=work).start()
"""
)


FORKED = (
    BEGIN
    + """
import multiprocessing
fields["num_inference_steps"] = 2
unused = USOEngine.from_config("uso-tiny", device="cpu")
torch.set_default_dtype(torch.float64)
expected = engine.generate(**fields, seed=1).images[0].tobytes()
def work(queue):
    said = [str(torch.get_default_dtype())]
    for call in (
        lambda: engine.generate(**fields),
        lambda: engine.encode_prompt("a fish"),
        lambda: engine.set_loras([]),
    ):
        try:
            call()
        except EngineClosedError as error:
            said.append(str(error)[:80])
    engine.close()
    with unused, USOEngine.from_config("uso-tiny", device="cpu") as own:
        said += [each.generate(**fields, seed=1).images[0].tobytes() == expected for each in (unused, own)]
    queue.put(said)
# In the middle of a request of another thread, whose settings the process has then, and which holds locks now and then.
busy = threading.Thread(target=engine.generate, kwargs={**fields, "num_inference_steps": 50, "num_images": 4})
busy.start()
while not engine.statistics().running:
    pass
context = multiprocessing.get_context("fork")
answers = context.SimpleQueue()
child = context.Process(target=work, args=(answers,))
with engine.loop.queue.lock:
    child.start()
child.join(120)
print(child.exitcode, *(answers.get() if child.exitcode == 0 else [child.kill()]), sep="\\n")
busy.join()
print(engine.generate(**fields, seed=1).images[0].tobytes() == expected)
"""
)


def run(script: str, repository: Path) -> str:
    paths = ":".join(str(repository / folder) for folder in (".", "kernels"))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_an_interrupt_cancels_the_callers_request_and_leaves_no_thread(repository: Path) -> None:
    assert run(INTERRUPTED, repository).splitlines() == [
        "interrupted {'cancelled': 1} () torch.float32",
        "1 image",
        "left []",
    ]


def test_the_interpreter_ends_when_its_own_threads_have(repository: Path) -> None:
    """A thread that the program waits for gets its image though the main thread has ended; a daemon's may be cut off."""
    assert "1 image" in run(NEVER_CLOSED, repository)


def test_a_first_request_after_the_main_thread_has_ended(repository: Path) -> None:
    """Its image, or from Python 3.12 on, which starts no more threads then, an error that says so."""
    expected = "1 image" if sys.version_info < (3, 12) else "Python has ended its main thread and starts no others any more"
    assert expected in run(TOO_LATE, repository)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_is_refused_what_its_parents_threads_would_do(repository: Path) -> None:
    """An engine that has begun is refused instead of waited for without end; what has no threads yet works in the child."""
    begun = "engine uso-tiny computes in threads of the process that this one was forked from; load an"[:80]
    assert run(FORKED, repository).splitlines() == ["0", "torch.float64", begun, begun, begun, "True", "True", "True"]


def test_an_engine_is_neither_pickled_nor_copied() -> None:
    with USOEngine.from_config("uso-tiny", device="cpu") as engine:
        for whole in (engine, AsyncUSOEngine(engine)):
            for take in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match=f"{type(whole).__name__} stays in its process.* send its .config"):
                    take(whole)
        assert pickle.loads(pickle.dumps(engine.config)) == engine.config  # noqa: S301  # its own bytes


def test_an_engine_that_nobody_has_ends_its_threads() -> None:
    engine: USOEngine | None = USOEngine.from_config("uso-tiny", device="cpu")
    assert engine is not None
    engine.generate(prompt="x", image_size={"width": 64, "height": 64}, num_inference_steps=1, seed=1)
    loop, pipeline = engine.loop, weakref.ref(engine.pipeline)
    del engine
    gc.collect()
    loop.join()
    for worker in (loop.conditioning, loop.decoding):
        worker.end()
    del loop, worker
    gc.collect()
    assert pipeline() is None


def live(kind: type) -> int:
    gc.collect()
    return sum(issubclass(type(entry), kind) for entry in gc.get_objects())


@pytest.mark.parametrize("overlapped", [True, False])
def test_a_thousand_requests_leave_nothing_behind(overlapped: bool) -> None:
    """One in ten is cancelled and one in twenty fails; jobs, tensors, threads, holds and memory are as before."""
    transformer = small_transformer()
    images = [image_jobs(transformer, shape, 2) for shape in range(3)]
    hand = HandTurnedLoop(transformer, max_requests=32)
    loop = hand.loop = RequestLoop(hand.queue, hand.machine, CPU, overlapped=overlapped)
    drawn, ends, waiting = random.Random(0), dict[str, int](), list[Any]()
    tensors, jobs, threads, allocated = 0, 0, list[str](), 0
    holds, others = len(_process._workers), set(threading.enumerate())

    def own_threads() -> list[str]:
        """Those of this loop: engines of other tests may be ending theirs."""
        return sorted(thread.name for thread in threading.enumerate() if thread not in others)

    for number in range(1000 if overlapped else 200):
        if number == 100:
            settle(waiting, ends)
            come_to_rest(loop)
            tensors, jobs, threads = live(torch.Tensor), live(Job), own_threads()
        if number == 500:
            settle(waiting, ends)
            come_to_rest(loop)
            allocated = allocated_bytes()
        luck = drawn.random()
        fault = drawn.choice(["encode", "admit", "finish"]) if luck < 0.05 else None
        request = hand.submit(SmallWork(list(images[drawn.randrange(3)]), fault, 1000), wants_events=False)
        if 0.05 <= luck < 0.15:
            request.handle.cancel()
        waiting.append(request)
        if len(waiting) == 30:
            settle(waiting, ends)
    settle(waiting, ends)
    come_to_rest(loop)
    assert hand.queue.requests == hand.queue.scheduler.tickets == ()
    assert len(hand.machine.denoiser._tables) == 0
    assert len(_process._workers) == holds
    assert (live(torch.Tensor), live(Job)) == (tensors, jobs)
    # What 500 requests left: 4 KiB of each would show, less than a latent.
    assert not overlapped or allocated_bytes() - allocated < 500 * 4 * 1024
    assert own_threads() == threads
    assert len(threads) == (3 if overlapped else 1)
    assert sum(ends.values()) == (1000 if overlapped else 200)
    assert ends["Done"] > 0.8 * sum(ends.values())
    assert ends["ValueError"] > 0
    assert ends["RequestCancelledError"] > 0
    loop.close()
    assert own_threads() == []


class _MallocCounts(ctypes.Structure):
    """What glibc's ``mallinfo2`` returns."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def allocated_bytes() -> int:
    """What this process has allocated and not freed; a small leak fits what is resident and free, and would not show there."""
    gc.collect()
    counts = ctypes.CDLL(None).mallinfo2
    counts.restype = _MallocCounts
    found = counts()
    return int(found.uordblks + found.hblkhd)


def come_to_rest(loop: RequestLoop) -> None:
    """Wait until each thread of the loop has left the work that told of the last request's end: it has done a later one."""
    for worker in (loop.decoding, loop.conditioning):
        loop.call(worker, lambda: None)
    loop.change_loras(loop.queue.scheduler.loras)


def settle(waiting: list[Any], ends: dict[str, int]) -> None:
    """Wait for everyone and count how they ended."""
    for request in waiting:
        message = request.handle.next()
        assert isinstance(message, Done | Failed)
        name = "Done" if isinstance(message, Done) else type(message.error).__name__
        ends[name] = ends.get(name, 0) + 1
    waiting.clear()
