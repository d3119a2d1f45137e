"""The one thread that owns the device: retire, schedule, step, advance."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from uso_engine.api.events import Stepped
from uso_engine.errors import EngineDrainingError
from uso_engine.sampling.step import Step
from uso_engine.stopwatch import Span

from .active import ActiveRequest
from .ending import end_with_the_interpreter
from .handle import Failed, RequestHandle, StepTaken
from .lora_switch import LoRASwitch
from .machine import Machine
from .outcome import Outcome
from .queue import RequestQueue
from .stages import Stages, use_threads
from .stepping import out_of_memory, take_step
from .threads import hand_over, start_daemon, take_over, use_device
from .trace import Trace
from .worker import Worker

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
STEPS_AHEAD = 1
"""Steps that are handed to a GPU before the one before them is done: it never waits, and nobody waits for more than two."""


class RequestLoop:
    """Threads that take requests from a queue through their stages: one that denoises, one for conditioning, one for decoding.

    They start with the first request and never keep the process alive: at its end they stop at the next step.

    Args:
        queue: where requests come from.
        machine: computes.
        device: of the machine.
        overlapped: whether conditioning and decoding run beside denoising; otherwise in between, in the same thread.
        threaded: whether there are threads at all; without them somebody else calls `round`.
    """

    def __init__(
        self,
        queue: RequestQueue,
        machine: Machine,
        device: torch.device,
        *,
        overlapped: bool = True,
        threaded: bool = True,
    ) -> None:
        self.queue = queue
        self.trace: Trace | None = None
        """Where stretches of work are noted, if anywhere."""
        self.machine, self.device, self._threaded = machine, device, threaded
        self._overlapped = overlapped and threaded
        self._stages = Stages(queue, lambda: self.trace)
        self._lora_switch = LoRASwitch(queue, machine.change_loras)
        self._spans: deque[Span] = deque()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._only_one = threading.Lock()
        self.conditioning = Worker("uso-engine conditioning", self.wake)
        self.decoding = Worker("uso-engine decoding", self.wake)
        end_with_the_interpreter(self)

    def submit(self, request: ActiveRequest) -> None:
        """Begin with a request that is in line."""
        # Beside denoising it never waits for room: there is no plan then.
        has_room = (lambda: True) if self._overlapped else (lambda: self.queue.has_room(request))
        self.conditioning.put(lambda: self._stages.condition(request), request.tokens, has_room=has_room)

    def call(self, worker: Worker, work: Callable[[], Result]) -> Result:
        """Do something that is no request in a worker's thread, and wait for it.

        Raises:
            EngineClosedError, EngineDeadError: nothing is done any more.
        """
        self.queue.acceptance.check_alive()
        threads = torch.get_num_threads()

        def work_as_here() -> Result:
            use_threads(threads)
            return work()

        hand_over(self.device)
        return take_over(self.device, worker.call(work_as_here).wait())

    def change_loras(self, loras: Hashable) -> None:
        """Merge other LoRAs for every request from now on, when those that run have ended; waits for it.

        Raises:
            LoRAError: they do not fit; the weights stay as they were.
            EngineClosedError, EngineDeadError: nothing is done any more.
        """
        change = self._lora_switch.ask(loras)
        self.wake()
        change.done.wait()

    def give_up(self, handle: RequestHandle) -> None:
        """End a request that its caller no longer waits for, and wait until nothing of it is left."""
        handle.cancel()
        if self.queue.withdraw(handle):
            self.wake()
            handle.wait_until_ended()

    @contextmanager
    def traced(self, path: str | Path) -> Iterator[None]:
        """Write what the threads do meanwhile to a file; see `uso_engine.scheduling.trace`."""
        self.trace = trace = Trace(path)
        try:
            yield
        finally:
            self.trace = None
            trace.write()

    def drain(self, deadline_s: float) -> int:
        """Accept nothing more and finish what is there.

        Args:
            deadline_s: seconds after which the rest is cut off.

        Returns:
            How many were cut off.
        """
        self.queue.acceptance.draining = True
        if self.queue.wait_until_empty(self.queue.clock() + deadline_s):
            return 0
        late = f"the engine drained, and the request was not done in {deadline_s:g} s"
        count = self.queue.doom(lambda: EngineDrainingError(late))
        self.queue.wait_until_empty()
        return count

    def close(self) -> None:
        """Accept nothing more, finish what has begun, and end the threads."""
        self.queue.acceptance.closed = True
        self.queue.doom(self.queue.acceptance.reason, begun=False)
        self.queue.wait_until_empty()
        self.stop()
        self.join()

    def stop(self) -> None:
        """End the threads after the step that runs, without waiting for them; requests fail."""
        self.queue.acceptance.closed = self._stopping = True
        for worker in (self.conditioning, self.decoding):
            worker.stop(self.queue.acceptance.reason)
        self.queue.notify()

    def join(self) -> None:
        """Wait for the threads to end."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def wake(self) -> None:
        """See to it that the loop looks again; the first time starts its thread."""
        begins = self._threaded and self._thread is None and not self._stopping
        if begins and start_daemon(self._run, "uso-engine denoising") is None:
            self._end_with_python()
        self.queue.notify()

    def _run(self) -> None:
        # Several may have been started at once, or after an interrupt; the first one works.
        if not self._only_one.acquire(blocking=False):
            return
        self._thread = threading.current_thread()
        if (fault := Outcome.of(self._work).error) is not None:
            self._fail(fault)
        self._end_all()

    def _work(self) -> None:
        use_device(self.device)
        workers = (self.conditioning, self.decoding) if self._overlapped else ()
        if not all(worker.start(self.device, self._fail) for worker in workers):
            self._end_with_python()
        while not self._stopping:
            if not self.round():
                self.queue.wait_for_change()

    def round(self) -> bool:
        """Retire, schedule, step, advance; whether there was anything to do."""
        now_s = self.queue.clock()
        retired, worked = self._retire(now_s), self._do_tasks()
        with self.queue.lock:  # Before anything is decided: what is not seen to be ready now, nobody looks at again.
            for request in self.queue.requests:
                request.refresh()
        busy = self._lora_switch.change(now_s) or retired or worked
        with self.queue.lock:
            members = self.queue.scheduler.choose(now_s)
        if members:
            self._advance([member for member in members if isinstance(member, ActiveRequest)])
        return busy or bool(members)

    def _retire(self, now_s: float) -> bool:
        """Let go of those who end without a result, and hand on those who have taken their last step."""
        leaving = self.queue.leaving(now_s)
        for request, error in leaving:
            self.machine.forget(request.jobs)
            self.queue.end(request, Failed(error))
        through = [request for request in self.queue.requests if request.is_through]
        for request in through:
            self.machine.forget(request.jobs)
            with self.queue.lock:
                request.stage, request.ready = "waiting for decoding", False
                self.queue.scheduler.remove(request)
            self.decoding.put(lambda request=request: self._stages.decode(request), request.tokens)  # type: ignore[misc]
        if (leaving or through) and not any(request.stage == "denoising" for request in self.queue.requests):
            self.machine.rest()
        return bool(leaving or through)

    def _advance(self, members: Sequence[ActiveRequest]) -> None:
        """Take a step of these and see what became of each."""
        members = [member for member in members if member.jobs or self._admit(member)]
        if not members:
            return
        use_threads(members[0].threads)
        span = Span(self.device)
        outcome = take_step(self.machine, members)
        self._spans.append(span.end())
        while len(self._spans) > STEPS_AHEAD:
            self._spans.popleft().wait()
        for member, error in outcome.failed:
            self.machine.forget(member.jobs)
            self.queue.end(member, Failed(error))
        taken = [member for member, _ in outcome.taken]
        with self.queue.lock:
            self.queue.scheduler.step_taken(taken)
            if outcome.too_large is not None:
                self.queue.scheduler.shrink(outcome.too_large)
                self.queue.counters.memory_retries += 1
        tokens = sum(member.tokens for member in taken)
        self.queue.counters.count_step(tokens, len(taken), span.end_s - span.start_s)
        self._record("denoising", "step", span, requests=[member.number for member in taken], tokens=tokens)
        for member, velocities in outcome.taken:
            self._report(member, velocities, span)

    def _admit(self, request: ActiveRequest) -> bool:
        span = Span()
        use_threads(request.threads)
        if (error := Outcome.of(self.machine.admit, request).error) is not None:
            memory = isinstance(error, torch.OutOfMemoryError)
            self.queue.end(request, Failed(out_of_memory(error, "beginning a request") if memory else error))
        self._record("denoising", "admission", span.end(), request=request.number)
        return bool(request.jobs)

    def _report(self, request: ActiveRequest, velocities: list[Tensor], span: Span) -> None:
        """Tell a request's caller of its step."""
        if request.work is None:
            return
        request.work.watch.add("denoise", span)
        handle, job = request.handle, request.jobs[0]
        if handle.wants_steps:
            step = Step.taken(request.jobs, velocities)
            self.queue.tell(request, StepTaken(step))
        elif handle.wants_previews:
            request.last_step = step = Step.taken(request.jobs, velocities)
            self.decoding.put(lambda: self._stages.preview(request, step))
        else:
            self.queue.tell(request, Stepped(job.index - 1, job.steps))

    def _do_tasks(self) -> bool:
        """Conditioning and decoding, where they have no threads of their own."""
        if self._overlapped:
            return False
        if self.conditioning.can_run_one or self.decoding.can_run_one:
            self.machine.rest()
        # What ends makes room for what begins.
        decoded, conditioned = self.decoding.run_one(), self.conditioning.run_one()
        return conditioned or decoded

    def _end_with_python(self) -> None:
        self.queue.acceptance.python_ends = True
        self.stop()
        self._end_all()

    def _fail(self, fault: BaseException) -> None:
        """Nothing can be computed any more; the loop's thread ends everything with the cause."""
        logger.error("%s failed; the engine is dead", threading.current_thread().name, exc_info=fault)
        self.queue.acceptance.failure = self.queue.acceptance.failure or fault
        self.stop()

    def _end_all(self) -> None:
        for request in self.queue.requests:
            self.queue.end(request, Failed(self.queue.acceptance.reason()))
        self._lora_switch.give_up(self.queue.acceptance.reason)
        for worker in (self.conditioning, self.decoding):
            worker.end()

    def _record(self, lane: str, name: str, span: Span, **details: object) -> None:
        if self.trace is not None:
            self.trace.add(lane, name, span.start_s, span.end_s, **details)
