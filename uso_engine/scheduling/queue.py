"""The requests that an engine holds, shared between their callers and the threads that work on them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable

from uso_engine.api.events import Done, Queued
from uso_engine.config import QueueLimits
from uso_engine.errors import RequestCancelledError, RequestTimeoutError
from uso_engine.process_state import ProcessHold

from .acceptance import Acceptance
from .active import ActiveRequest, Work
from .counters import Counters
from .handle import Failed, RequestHandle
from .scheduler import Scheduler

logger = logging.getLogger(__name__)


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
        self.changed = threading.Condition()
        """Held while anything here is read or written; notified when anything has happened."""
        self._changes = 0
        self._accepted = 0
        self._requests: dict[ActiveRequest, None] = {}

    @property
    def requests(self) -> tuple[ActiveRequest, ...]:
        """Those that have not ended, in the order in which they were accepted."""
        with self.changed:
            return tuple(self._requests)

    def accept(self, handle: RequestHandle, *, priority: int = 0, timeout_s: float | None = None) -> ActiveRequest:
        """Take a request in, before its inputs are opened.

        Raises:
            EngineClosedError, EngineDrainingError, EngineDeadError: nothing is accepted any more.
            QueueFullError: there are as many as there may be.
        """
        with self.changed:
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
            handle.attach(lambda: self._caller_did_something(request))
            self._requests[request] = None
        return request

    def enqueue(
        self, request: ActiveRequest, work: Work, *, tokens: int, company: Hashable = None, loras: Hashable = None
    ) -> None:
        """Put a request whose inputs are opened in line.

        Raises:
            QueueFullError: its inputs are more bytes than there is room for.
            EngineClosedError, EngineDrainingError, EngineDeadError: the engine ended meanwhile.
        """
        with self.changed:
            refusal = self.acceptance.refusal()
            if request not in self._requests:
                raise refusal if refusal is not None else RequestCancelledError("the request was cancelled")
            if self.acceptance.closed and refusal is not None:
                raise refusal
            self.acceptance.check_bytes(work.size_bytes, self._requests)
            request.work, request.tokens, request.steps_left = work, tokens, work.steps
            request.company, request.loras = company, self.default_loras if loras is None else loras
            request.stage = "waiting for conditioning"
            request.hold = ProcessHold()
            position = sum(other.number < request.number for other in self._requests)
            self.scheduler.add(request)
        self.tell(request, Queued(position))

    def end(self, request: ActiveRequest, message: Done | Failed) -> None:
        """Let go of everything that belongs to a request, then tell its caller; nothing happens to one that has ended."""
        with self.changed:
            if request not in self._requests:
                return
            del self._requests[request]
            self.scheduler.remove(request)
            request.jobs, request.work, request.last_step = [], None, None
            hold, request.hold = request.hold, None
            self._notify()
        if hold is not None:
            hold.release()
        self.counters.count_outcome(_outcome(message))
        self.tell(request, message)

    def tell(self, request: ActiveRequest, message: object) -> None:
        """Post a message; a caller who cannot be told is gone."""
        try:
            request.handle.post(message)  # type: ignore[arg-type]
        except Exception:  # whatever a caller's own function raises
            logger.info("request %d cannot be told anything; it is given up", request.number, exc_info=True)
            request.handle.cancel()

    def leaving(self, now_s: float) -> list[tuple[ActiveRequest, BaseException]]:
        """Requests that end without a result, with the reason, except those that a thread works on just now."""
        with self.changed:
            resting = [request for request in self._requests if request.stage not in ("accepted", "conditioning", "decoding")]
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
        waited_s = now_s - request.arrival_s
        if request.expires_s == request.deadline_s:
            return RequestTimeoutError(f"the request was not done in the {request.deadline_s - request.arrival_s:g} s it had")
        return RequestTimeoutError(
            f"the request had not begun after {waited_s:.1f} s; queue.max_queue_s is {self.limits.max_queue_s:g}"
        )

    def doom(self, error: BaseException, *, begun: bool = True) -> int:
        """End all requests with an error as soon as nobody works on them, or only those that have not begun.

        Returns:
            How many.
        """
        with self.changed:
            ended = [request for request in self._requests if begun or not request.begun]
            for request in ended:
                request.doom = request.doom or error
                request.refresh()
            self._notify()
        for request in ended:
            if request.stage == "accepted":
                self.end(request, Failed(error))
        return len(ended)

    def wait_until_empty(self, deadline_s: float = float("inf")) -> bool:
        """Wait until every request has ended; False if the deadline comes first."""
        with self.changed:
            while self._requests:
                left_s = deadline_s - self.clock()
                if left_s <= 0:
                    return False
                self.changed.wait(None if left_s == float("inf") else left_s)
            return True

    def wait_for_change(self, seen: int) -> None:
        """Wait until something has happened since `changes` was `seen`, or a time that somebody waits for."""
        with self.changed:
            now_s = self.clock()
            wakes_s = min((request.expires_s for request in self._requests), default=float("inf"))
            left_s = min(wakes_s, self.scheduler.wakes_s(now_s)) - now_s
            while self._changes == seen and left_s > 0:
                if not self.changed.wait(None if left_s == float("inf") else left_s):
                    return

    @property
    def changes(self) -> int:
        """How often anything has happened."""
        with self.changed:
            return self._changes

    def notify(self) -> None:
        """Something has happened."""
        with self.changed:
            self._notify()

    def _notify(self) -> None:
        self._changes += 1
        self.changed.notify_all()

    def _caller_did_something(self, request: ActiveRequest) -> None:
        with self.changed:
            request.refresh()
            self._notify()
            not_in_line = request.stage == "accepted"
        if not_in_line and request.handle.cancelled:
            self.end(request, Failed(RequestCancelledError("the request was cancelled")))


def _outcome(message: Done | Failed) -> str:
    if isinstance(message, Done):
        return "done"
    if isinstance(message.error, RequestCancelledError):
        return "cancelled"
    return "timed_out" if isinstance(message.error, RequestTimeoutError) else "failed"
