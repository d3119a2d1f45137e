"""The same trace through one engine under three policies: ours, one request at a time, and static batching.

Rounds of a loop without threads are taken one by one. A clock of the trace's own moves on by what each round takes, of
processor time on a machine that others use too; so neither they nor an overlap of threads favours a policy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from uso_engine import USOEngine
from uso_engine.api.events import Done
from uso_engine.api.research import ResearchOptions
from uso_engine.generation import Generation
from uso_engine.queue_limits import QueueLimits
from uso_engine.scheduling.assembly import make_loop
from uso_engine.scheduling.handle import RequestHandle
from uso_engine.scheduling.loop import RequestLoop
from uso_engine.scheduling.machine import PipelineMachine
from uso_engine.scheduling.waiting import put_in_line

from .arrivals import Arrival

Policy = Literal["ours", "one at a time", "static"]
POLICIES: tuple[Policy, ...] = ("ours", "one at a time", "static")
STATIC_BATCH = 8
Result = TypeVar("Result")


@dataclass(eq=False)
class Served:
    """A request and what became of it: moments of the trace's clock.

    Args:
        arrival: the request.
        handle: of it.
        begun_s: of its first step.
        done_s: when its caller had the result.
    """

    arrival: Arrival
    handle: RequestHandle
    begun_s: float = 0.0
    done_s: float = 0.0

    @property
    def latency_s(self) -> float:
        return self.done_s - self.arrival.at_s


@dataclass
class Replay:
    """A trace after it was run.

    Args:
        served: every request of it.
        pictures: the first image's bytes of each, by seed.
        occupancy: moments, and how many requests took the step that ended then.
        end_s: of the last.
        step_s: seconds of all steps.
        deciding_s: seconds of all rounds beside what the model and the stages took: who leaves, who is next, who is told.
        forming_s: seconds of making tables of batches, of those of steps and admissions.
        batches: whose tables were made.
        tokens: of all steps.
    """

    served: list[Served] = field(default_factory=list)
    pictures: dict[int, bytes] = field(default_factory=dict)
    occupancy: list[tuple[float, int]] = field(default_factory=list)
    end_s: float = 0.0
    step_s: float = 0.0
    deciding_s: float = 0.0
    forming_s: float = 0.0
    batches: int = 0
    tokens: int = 0


class InsideRounds:
    """Clocks put around what a loop's rounds call.

    Args:
        loop: without threads.
        now: seconds of what is counted.
    """

    def __init__(self, loop: RequestLoop, now: Callable[[], float]) -> None:
        self._now, self._taken_s = now, 0.0
        self.step_s = self.forming_s = 0.0
        machine = loop.machine
        assert isinstance(machine, PipelineMachine)
        machine.step = self._clocked(machine.step, "step_s")  # type: ignore[method-assign]
        machine.admit = self._clocked(machine.admit)  # type: ignore[method-assign]
        loop._do_tasks = self._clocked(loop._do_tasks)  # type: ignore[method-assign]
        denoiser = machine._denoiser
        denoiser.tables = self._clocked(denoiser.tables, "forming_s", counts=False)  # type: ignore[method-assign]

    def taken_s(self) -> float:
        """Seconds of the model and the stages since the last time this was asked."""
        taken, self._taken_s = self._taken_s, 0.0
        return taken

    def _clocked(self, run: Callable[..., Result], name: str | None = None, *, counts: bool = True) -> Callable[..., Result]:
        def clocked(*given: object, **named: object) -> Result:
            start = self._now()
            try:
                return run(*given, **named)
            finally:
                seconds = self._now() - start
                if name is not None:
                    setattr(self, name, getattr(self, name) + seconds)
                if counts:
                    self._taken_s += seconds

        return clocked


class Player:
    """Plays a trace.

    Args:
        engine: loaded.
        policy: under which.
        now: seconds of what is counted: `time.process_time` or `time.perf_counter`.
    """

    def __init__(self, engine: USOEngine, policy: Policy, now: Callable[[], float] = time.process_time) -> None:
        self._engine, self._policy, self._now = engine, policy, now
        self._clock_s = 0.0
        limits = engine.config.queue.model_copy(update={"max_requests": 1_000_000, "max_queue_s": 3e7, "max_request_s": 3e7})
        if policy == "static":
            limits = limits.model_copy(update={"max_step_tokens": 100_000_000})
        self._loop: RequestLoop = make_loop(
            engine.parts, limits=QueueLimits(**limits.model_dump()), clock=self._read, threaded=False
        )
        self._inside = InsideRounds(self._loop, now)

    def play(self, trace: Sequence[Arrival]) -> Replay:
        """Run all of it."""
        replay, coming = Replay(), deque(trace)
        waiting: deque[Served] = deque()
        running: list[Served] = []
        counters = self._loop.queue.counters
        while coming or waiting or running:
            if not waiting and not running:
                self._clock_s = max(self._clock_s, coming[0].at_s)
            while coming and coming[0].at_s <= self._clock_s:
                waiting.append(Served(coming.popleft(), RequestHandle(wants_events=False)))
            self._admit(waiting, running)
            steps, before = counters.steps, self._now()
            self._loop.round()
            round_s = self._now() - before
            self._clock_s += round_s
            replay.deciding_s += round_s - self._inside.taken_s()
            if counters.steps > steps:
                replay.occupancy.append((self._clock_s, counters.requests_in_step))
            self._look(running, replay)
        replay.end_s = self._clock_s
        replay.step_s, replay.forming_s = self._inside.step_s, self._inside.forming_s
        replay.batches, replay.tokens = self._loop.machine.batches_formed, counters.tokens
        return replay

    def _read(self) -> float:
        return self._clock_s

    def _admit(self, waiting: deque[Served], running: list[Served]) -> None:
        """Hand requests to the loop as the policy says."""
        if self._policy == "ours":
            room = len(waiting)
        else:
            room = 0 if running else 1 if self._policy == "one at a time" else STATIC_BATCH
        for _ in range(min(room, len(waiting))):
            served = waiting.popleft()
            request = self._engine.request_type(**served.arrival.fields())
            put_in_line(self._loop, served.handle, Generation(self._engine.parts, request, ResearchOptions()), 0, None)
            running.append(served)

    def _look(self, running: list[Served], replay: Replay) -> None:
        """Note who has begun and who is done; a static batch is handed out when its last one is done."""
        begun = {request.handle for request in self._loop.queue.requests if request.begun}
        for served in running:
            if not served.begun_s and (served.handle in begun or not served.handle._messages.empty()):
                served.begun_s = self._clock_s
        done = [served for served in running if not served.handle._messages.empty()]
        if self._policy == "static" and len(done) < len(running):
            return
        for served in done:
            message = served.handle.next()
            assert isinstance(message, Done), message
            served.done_s = self._clock_s
            replay.pictures[served.arrival.seed] = message.result.images[0].tobytes()
            replay.served.append(served)
            running.remove(served)
