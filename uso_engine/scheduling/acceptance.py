"""What an engine accepts: nothing once it is closing, draining or dead, and no more than its queue may hold."""

from __future__ import annotations

from collections.abc import Collection

from uso_engine.errors import EngineClosedError, EngineDeadError, EngineDrainingError, QueueFullError, USOError
from uso_engine.queue_limits import QueueLimits

from .active import ActiveRequest
from .counters import Counters

MIB = 1 << 20


class Acceptance:
    """Decides about new requests. Used under the loop's lock.

    Args:
        name: of the engine, for messages.
        limits: of its queue.
        counters: where refusals are counted.
    """

    def __init__(self, name: str, limits: QueueLimits, counters: Counters) -> None:
        self._name, self._limits, self._counters = name, limits, counters
        self.closed = False
        self.draining = False
        self.python_ends = False
        self.forked = False
        self.failure: BaseException | None = None

    def refusal(self) -> USOError | None:
        """Why nothing is accepted any more; None while something is."""
        if self.forked:
            return EngineClosedError(
                f"engine {self._name} computes in threads of the process that this one was forked from; "
                "load an engine in this process, or start it with multiprocessing's 'spawn'"
            )
        if self.failure is not None:
            dead = EngineDeadError(
                f"engine {self._name} can compute no more, its thread failed: {type(self.failure).__name__}: {self.failure}"
            )
            dead.__cause__ = self.failure
            return dead
        if self.python_ends:
            return EngineClosedError(
                f"engine {self._name} cannot begin: Python has ended its main thread and starts no others any more; "
                "from 3.12 on the main thread has to stay until the first request has begun"
            )
        if self.closed:
            return EngineClosedError(f"engine {self._name} was closed; make a new one with USOEngine.from_config")
        if self.draining:
            return EngineDrainingError(f"engine {self._name} finishes what it has and accepts no more requests")
        return None

    def reason(self) -> USOError:
        """Why nothing is computed any more, once that is so."""
        return self.refusal() or EngineClosedError(f"engine {self._name} was closed")

    def check_alive(self) -> None:
        """Whether anything is done any more, if not requests.

        Raises:
            EngineDeadError, EngineClosedError: nothing is.
        """
        refusal = self.refusal()
        if refusal is not None and not isinstance(refusal, EngineDrainingError):
            raise refusal

    def check(self, held: Collection[ActiveRequest]) -> None:
        """Whether another request may come in.

        Raises:
            EngineDeadError, EngineClosedError, EngineDrainingError: none may.
            QueueFullError: there are as many as there may be.
        """
        refusal = self.refusal()
        if refusal is not None:
            raise refusal
        if len(held) >= self._limits.max_requests:
            raise self._full("max_requests", self._limits.max_requests, len(held) + 1, held)

    def check_bytes(self, size_bytes: int, held: Collection[ActiveRequest]) -> None:
        """Whether there is room for the opened inputs of a request that came in.

        Raises:
            QueueFullError: there is not.
        """
        waiting = sum(request.work.size_bytes for request in held if request.work is not None)
        if waiting + size_bytes > self._limits.max_mib * MIB:
            raise self._full("max_mib", self._limits.max_mib, (waiting + size_bytes) / MIB, held)

    def _full(self, bound: str, limit: float, value: float, held: Collection[ActiveRequest]) -> QueueFullError:
        self._counters.count_outcome("refused")
        backlog = sorted(request.tokens * request.steps_left for request in held)
        # The smallest is likely to be done first.
        return QueueFullError(bound, limit, value, self._counters.seconds_for(backlog[0] if backlog else 0))
