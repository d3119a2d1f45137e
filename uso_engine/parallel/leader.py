"""The first of the processes that compute together: the engine is here, and every evaluation of the transformer starts here."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from typing import TypeVar

from torch import Tensor

from uso_engine.errors import ParallelError
from uso_engine.model.packing import PackedBatch
from uso_engine.model.transformer import Observer, Transformer
from uso_engine.weights.lora import LoRASet

from .group import Group
from .identity import check_same
from .messages import End, LoRAMessage, Message
from .step import BatchDescription, SharedRun, StepMessage, evaluate, send_batch

logger = logging.getLogger(__name__)
_MERGING = timedelta(minutes=30)
"""How long other processes may merge LoRAs before they take the next message."""
Result = TypeVar("Result")


class Leader:
    """Evaluates a transformer with the other processes of a group.

    Args:
        group: joined; this is its first process.
        end_others: ends the other processes, where they do not do so themselves; returns what they said last.
    """

    def __init__(self, group: Group, end_others: Callable[[], str]) -> None:
        self._group, self._end_others = group, end_others
        self._batches: dict[int, tuple[weakref.ref[PackedBatch], int, SharedRun]] = {}
        self._numbers = count()
        self._failure: ParallelError | None = None
        self._patience = group.step_limit
        # The loop's thread and a caller that verifies or closes may come at once.
        self._lock = threading.RLock()

    @property
    def size(self) -> int:
        """Processes."""
        return self._group.size

    def check_same(self, transformer: Transformer) -> None:
        """Compare weights and versions of all processes.

        Raises:
            ParallelError: they differ; says which process and in what.
        """
        self._guarded(lambda: check_same(self._group, transformer))

    def evaluate(
        self, transformer: Transformer, batch: PackedBatch, latents: Tensor, modulation: Tensor, observer: Observer | None
    ) -> Tensor:
        """`Transformer.forward` by all processes.

        Raises:
            ParallelError: a process is gone.
        """
        with self._lock:
            self._check()
            known = self._find(batch)
            number, shared = known or (next(self._numbers), SharedRun.begin(transformer, self._group, batch))
            alive = {entry[1] for entry in self._batches.values()} | {number}
            description = BatchDescription.of(batch) if known is None else None
            message = StepMessage(number, frozenset(alive), description, tuple(modulation.shape), observer is not None)

            def together() -> Tensor:
                self._send(message)
                if known is None:
                    send_batch(self._group, batch)
                    self._batches[id(batch)] = weakref.ref(batch), number, shared
                self._group.share(latents.contiguous())
                self._group.share(modulation.contiguous())
                velocity = evaluate(
                    transformer, self._group, shared, latents, modulation, observer=observer, observed=observer is not None
                )
                assert velocity is not None
                return velocity

            return self._guarded(together)

    def set_loras(self, loras: LoRASet, *, keep_configured: bool) -> None:
        """Let the others merge the LoRAs that this process has merged.

        Raises:
            ParallelError: a process is gone.
        """
        self._tell(LoRAMessage(tuple(loras), keep_configured))

    def close(self) -> None:
        """Let the others end; one that has ended already is no error any more. A second call does nothing."""
        with self._lock:
            if self._failure is not None:
                return
            try:
                self._tell(End())
            except ParallelError as error:
                logger.warning("a process had ended before the engine was closed: %s", error)
            else:
                self._failure = ParallelError("this engine was closed")
                self._batches.clear()
                self._end_others()
                self._group.close()

    def _tell(self, message: Message) -> None:
        with self._lock:
            self._check()
            self._guarded(lambda: self._send(message))

    def _send(self, message: Message) -> None:
        """Give the others a message. They have been waiting for it, but for a step's end or for LoRAs that they merge."""
        self._group.share_object(message, self._patience)
        self._patience = _MERGING if isinstance(message, LoRAMessage) else self._group.step_limit

    def _find(self, batch: PackedBatch) -> tuple[int, SharedRun] | None:
        """The number and share of a batch that the others know; forgets those that are gone here."""
        for key in [key for key, (reference, _, _) in self._batches.items() if reference() is None]:
            del self._batches[key]
        entry = self._batches.get(id(batch))
        return None if entry is None else entry[1:]

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _guarded(self, work: Callable[[], Result]) -> Result:
        """Do what all take part in; whatever fails halfway leaves the others waiting, so it ends them."""
        try:
            return work()
        except BaseException as error:
            self._failure = ParallelError(f"the processes that compute together have ended: {error}")
            self._batches.clear()
            self._group.abort()
            said = self._end_others()
            if isinstance(error, ParallelError) and said:
                raise ParallelError(f"{error}; {said}") from error
            raise
