"""The requests that an engine holds, shared between their callers and the threads that work on them.

Threads of the engine's own take the lock in a ``with`` statement. Callers' threads go through `from_outside`, which leaves it
unlocked after an interrupt (Ctrl-C) at any instruction.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

from uso_engine.api.events import Done, Queued
from uso_engine.errors import QueueFullError, RequestCancelledError, RequestTimeoutError
from uso_engine.process_state import ProcessHold
from uso_engine.queue_limits import QueueLimits

from .acceptance import Acceptance
from .active import ActiveRequest, Work
from .counters import Counters
from .forking import tell_after_fork
from .handle import Failed, Message, RequestHandle
from .scheduler import Scheduler

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class RequestQueue:
    """Every request from its acceptance to its end.

    Args:
        name: of the engine, for messages.
        limits: what it may hold.
        scheduler: chooses among them.
        counters: of how they end.
        clock: seconds that never go back.
    """

    def __init__(
        self, name: str, limits: QueueLimits, scheduler: Scheduler, counters: Counters, clock: Callable[[], float]
    ) -> None:
        self.limits, self.scheduler, self.counters, self.clock = limits, scheduler, counters, clock
        self.acceptance = Acceptance(name, limits, counters)
        self.default_loras: Hashable = scheduler.loras
        self.lock = threading.RLock()
        """Held while requests or the scheduler are read or changed."""
        self._wakeups: SimpleQueue[None] = SimpleQueue()
        self._watchers: list[SimpleQueue[None]] = []
        self._accepted = 0
        self._requests: dict[ActiveRequest, None] = {}
        self._begun = False
        tell_after_fork(self)

    @property
    def requests(self) -> tuple[ActiveRequest, ...]:
        """Those that have not ended, in the order in which they were accepted."""
        return tuple(self._requests)

    @property
    def decoding(self) -> tuple[ActiveRequest, ...]:
        """Those that have taken their last step and have not ended."""
        return tuple(request for request in self.requests if request.stage in ("waiting for decoding", "decoding"))

    def has_room(self, request: ActiveRequest) -> bool:
        """Whether a request may be encoded beside those that hold memory; one that has ended may be done with."""
        with self.lock:
            return request not in self._requests or self.scheduler.has_room(request)

    def from_outside(self, work: Callable[[], Result]) -> Result:
        """Do something under the lock in a caller's thread, which does not hold it yet."""
        try:
            with self.lock:
                return work()
        finally:
            # An interrupt may come when the lock is taken and the statement does not cover it yet. The lock itself knows: it
            # refuses where it is not held by this thread, as after every other ending.
            with suppress(RuntimeError):
                self.lock.release()

    def accept(self, handle: RequestHandle, *, priority: int = 0, timeout_s: float | None = None) -> ActiveRequest:
        """Take a request in, before its inputs are opened; from a caller's thread.

        Raises:
            EngineClosedError, EngineDrainingError, EngineDeadError: nothing is accepted any more.
            QueueFullError: there are as many as there may be.
        """

        def work() -> ActiveRequest:
            self.acceptance.check(self._requests)
            now_s, bound_s = self.clock(), self.limits.max_request_s
            self._accepted += 1
            request = ActiveRequest(
                tokens=0,
                steps_left=0,
                arrival_s=now_s,
                priority=priority,
                handle=handle,
                queue_deadline_s=now_s + self.limits.max_queue_s,
                deadline_s=now_s + (bound_s if timeout_s is None else min(bound_s, timeout_s)),
                number=self._accepted,
            )
            handle.attach(self.notify)
            self._requests[request] = None
            return request

        return self.from_outside(work)

    def enqueue(
        self, request: ActiveRequest, work: Work, *, tokens: int, company: Hashable = None, loras: Hashable = None
    ) -> None:
        """Put a request whose inputs are opened in line; from a caller's thread.

        Raises:
            QueueFullError: its inputs are more bytes than there is room for.
            EngineClosedError, EngineDeadError, RequestCancelledError: the engine or the request ended meanwhile.
        """

        def put() -> None:
            self.acceptance.check_alive()
            if request not in self._requests or request.handle.cancelled:
                raise RequestCancelledError("the request was cancelled")
            self.acceptance.check_bytes(work.size_bytes, self._requests)
            request.work, request.tokens, request.steps_left = work, tokens, work.steps
            request.company, request.loras = company, self.default_loras if loras is None else loras
            request.stage = "waiting for conditioning"
            request.hold = ProcessHold()
            request.hold.enter()
            self.scheduler.add(request)

        self.from_outside(put)
        self.tell(request, Queued(sum(other.number < request.number for other in self.requests)))

    def end(self, request: ActiveRequest, message: Done | Failed) -> None:
        """Let go of everything that belongs to a request, then tell its caller; nothing happens to one that has ended."""
        with self.lock:
            if request not in self._requests:
                return
            del self._requests[request]
            self.scheduler.remove(request)
            work, request.jobs, request.work, request.last_step = request.work, [], None, None
        if work is not None:
            work.release()
        if request.hold is not None:
            request.hold.release()
        if not (isinstance(message, Failed) and isinstance(message.error, QueueFullError)):  # Counted as it was refused.
            self.counters.count_outcome(_outcome(message))
        self.tell(request, message)
        self.notify()
        for watcher in tuple(self._watchers):
            watcher.put(None)

    def withdraw(self, handle: RequestHandle) -> bool:
        """End a caller's request that is not in line yet; from the caller's thread.

        Returns:
            Whether the last message of it is still to come.
        """
        own = next((request for request in self.requests if request.handle is handle), None)
        if own is not None and own.stage == "accepted":
            self.from_outside(lambda: self.end(own, Failed(RequestCancelledError("the request was cancelled"))))
        return own is not None

    def tell(self, request: ActiveRequest, message: Message) -> None:
        """Post a message; a caller who cannot be told is gone."""
        try:
            request.handle.post(message)
        except Exception:  # whatever a caller's own function raises
            logger.info("request %d cannot be told anything; it is given up", request.number, exc_info=True)
            request.handle.cancel()

    def leaving(self, now_s: float) -> list[tuple[ActiveRequest, BaseException]]:
        """Requests that end without a result, with the reason, except those that a thread works on just now."""
        with self.lock:
            resting = [request for request in self._requests if request.stage not in ("conditioning", "decoding")]
            ends = [(request, self.ending(request, now_s)) for request in resting]
            return [(request, error) for request, error in ends if error is not None]

    def ending(self, request: ActiveRequest, now_s: float) -> BaseException | None:
        """Why a request is to end without a result; None where it is not."""
        if request.doom is not None:
            return request.doom
        if request.handle.cancelled:
            return RequestCancelledError("the request was cancelled")
        if now_s < request.expires_s:
            return None
        if request.expires_s == request.deadline_s:
            return RequestTimeoutError(f"the request was not done in the {request.deadline_s - request.arrival_s:g} s it had")
        return RequestTimeoutError(
            f"the request had not begun after {now_s - request.arrival_s:.1f} s; queue.max_queue_s is "
            f"{self.limits.max_queue_s:g}"
        )

    def doom(self, reason: Callable[[], BaseException], *, begun: bool = True) -> int:
        """End all requests as soon as nobody works on them, or only those that have not begun.

        Args:
            reason: makes an error for each: of one that several callers raise, each would hold what the others' functions do.
            begun: whether those that have begun end, too.

        Returns:
            How many.
        """
        doomed = [request for request in self.requests if begun or not request.begun]
        for request in doomed:
            request.doom = error = request.doom or reason()
            if request.stage == "accepted":
                failed = Failed(error)
                self.from_outside(lambda request=request, failed=failed: self.end(request, failed))  # type: ignore[misc]
        self.notify()
        return len(doomed)

    def wait_until_empty(self, deadline_s: float = float("inf")) -> bool:
        """Wait until every request has ended; False if the deadline comes first."""
        ends: SimpleQueue[None] = SimpleQueue()
        self._watchers.append(ends)
        try:
            while self._requests:
                left_s = deadline_s - self.clock()
                if left_s <= 0:
                    return False
                with suppress(Empty):
                    ends.get(timeout=None if left_s == float("inf") else left_s)
            return True
        finally:
            self._watchers.remove(ends)

    def wait_for_change(self) -> None:
        """Wait until something has happened since the last time, or a time comes that somebody waits for."""
        with self.lock:
            now_s = self.clock()
            wakes_s = min((request.expires_s for request in self._requests), default=float("inf"))
            left_s = min(wakes_s, self.scheduler.wakes_s(now_s)) - now_s
        with suppress(Empty):
            self._wakeups.get(timeout=None if left_s == float("inf") else max(0.0, left_s))
        with suppress(Empty):
            while True:  # One look answers all of them.
                self._wakeups.get_nowait()

    def notify(self) -> None:
        """Something has happened; takes no lock, so from any thread at any time."""
        self._begun = True
        self._wakeups.put(None)

    def leave_behind(self) -> None:
        """In a forked child: threads, locks and requests are the parent's; where no thread has begun, its own may still."""
        self.lock = threading.RLock()
        self._requests.clear()
        self.acceptance.forked = self.acceptance.forked or self._begun


def _outcome(message: Done | Failed) -> str:
    if isinstance(message, Done):
        return "done"
    if isinstance(message.error, RequestCancelledError):
        return "cancelled"
    return "timed_out" if isinstance(message.error, RequestTimeoutError) else "failed"
