"""Upkeep of what replicas share: this one is alive, what a dead one has left is taken up, what has expired is removed.

A server is dead when what it says of being alive has not changed for the time of a lease, by the watch of who looks: clocks of
different machines are never compared, and one that is set changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from uso_engine.errors import OutputError

from .files import ImageFiles
from .in_thread import in_thread
from .queue_records import QueuedRequest, QueueRecords, QueueState
from .queue_runner import QueueRunner

logger = logging.getLogger(__name__)

_SWEEP_S = 60.0


class QueueUpkeep:
    """The regular work of one server on the storage.

    Args:
        runner: takes up requests.
        records: the queue's files.
        files: the images.
        owner: what this server calls itself.
        expiry_s: seconds that answers are kept.
        lease_s: seconds after which a server that says nothing has ended.
        clock: seconds since 1970.
        watch: seconds that only grow.
    """

    def __init__(
        self,
        runner: QueueRunner,
        records: QueueRecords,
        files: ImageFiles,
        owner: str,
        *,
        expiry_s: float,
        lease_s: float,
        clock: Callable[[], float] = time.time,
        watch: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner, self._records, self._files, self._owner = runner, records, files, owner
        self._expiry_s, self._lease_s, self._clock, self._watch = expiry_s, lease_s, clock, watch
        self._owners: dict[str, str] = {}
        self._leases: dict[str, tuple[float, float]] = {}  # What each owner said last, and since when it has said no more.
        self._unowned: dict[str, float] = {}  # Since when requests were seen of which nobody says that they are his.
        self._said, self._said_before = 0.0, 0.0
        self._swept = -math.inf

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Do it again and again until the end."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            try:
                await asyncio.gather(task, return_exceptions=True)
            finally:  # A second cancellation interrupts the wait, but only when it is over.
                await self._leave()

    async def _leave(self) -> None:
        try:
            await in_thread(None, self._records.leave, self._owner)
        except OutputError as error:
            logger.error("storage: %s", error)

    async def _run(self) -> None:
        while True:
            try:
                await self.once()
            except OutputError as error:
                logger.error("storage: %s", error)
            except Exception as error:
                # Without further rounds the others would take this server for dead, and compute again what it computes.
                logger.error("upkeep of the queue: %s", error, exc_info=error)
            await asyncio.sleep(self._lease_s / 3)

    async def once(self) -> None:
        """One round.

        Raises:
            OutputError: the storage failed.
        """
        await self._renew()
        unfinished = await in_thread(None, self._records.unfinished)
        self._owners = {one: owner for one, owner in self._owners.items() if one in unfinished}
        self._unowned = {one: since for one, since in self._unowned.items() if one in unfinished}
        ended: dict[str, bool] = {}
        for identifier, to_cancel in unfinished.items():
            if self._runner.has(identifier):
                if to_cancel:
                    await self._runner.cancel_mine(identifier)
                continue
            owner = self._owners.get(identifier, "")
            if owner and owner not in ended:
                ended[owner] = await self._has_ended(owner)
            if not owner or ended[owner]:
                await self._look_at(identifier, to_cancel=to_cancel)
        self._leases = {owner: seen for owner, seen in self._leases.items() if owner in self._owners.values()}
        if self._watch() - self._swept >= min(_SWEEP_S, self._expiry_s):
            self._swept = self._watch()
            await in_thread(None, self._files.sweep)
            await in_thread(None, self._records.sweep, self._clock(), self._expiry_s)

    async def _renew(self) -> None:
        """Say that this server is alive: the time, and in any case something else than before."""
        if self._said and await in_thread(None, self._records.renewed, self._owner) not in (0, self._said, self._said_before):
            logger.error(
                "another server calls itself %s in this storage, and both compute the same requests; give one another port",
                self._owner,
            )
        self._said_before, self._said = self._said, max(self._said + 1, math.floor(self._clock()))
        await in_thread(None, self._records.renew, self._owner, self._said)

    async def _look_at(self, identifier: str, *, to_cancel: bool) -> None:
        """Take up a request that nobody answers for, as after this server's own restart. To be cancelled, it is ended."""
        state = await in_thread(None, self._records.state, identifier)
        if state is None and self._watch() - self._unowned.setdefault(identifier, self._watch()) < self._lease_s:
            return  # It may be being accepted just now.
        if state is not None and state.status == "COMPLETED":
            # Its server ended between saying so and letting go of the request.
            await in_thread(None, self._records.let_go, identifier)
            return
        if state is not None and state.owner != self._owner and not await self._has_ended(state.owner):
            self._owners[identifier] = state.owner
            return
        request = await in_thread(None, self._records.request, identifier)
        if request is None or self._runner.has(identifier):
            return
        logger.info("queue request %s is taken up", identifier)
        await in_thread(None, self._records.put_state, identifier, _owned(request, self._owner))
        self._owners.pop(identifier, None)
        self._runner.take_up(request)
        if to_cancel:  # In the same turn, before it can be begun.
            await self._runner.cancel_mine(identifier)

    async def _has_ended(self, owner: str) -> bool:
        said = await in_thread(None, self._records.renewed, owner)
        if said and self._leases.get(owner, (0.0, 0.0))[0] != said:
            self._leases[owner] = said, self._watch()
        return not said or self._watch() - self._leases[owner][1] >= self._lease_s


def _owned(request: QueuedRequest, owner: str) -> QueueState:
    return QueueState(key=request.key, model=request.model, owner=owner)
