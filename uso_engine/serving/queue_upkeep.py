"""Upkeep of what replicas share: this one is alive, what a dead one has left is taken up, what has expired is removed."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from uso_engine.errors import OutputError

from .files import ImageFiles
from .in_thread import in_thread
from .leases import Leases
from .queue_records import QueueRecords
from .queue_runner import QueueRunner

logger = logging.getLogger(__name__)

_SWEEP_S = 60.0


class QueueUpkeep:
    """The regular work of one server on the storage.

    Args:
        runner: takes up requests.
        records: the queue's files.
        files: the images.
        leases: who is alive.
        expiry_s: seconds that answers are kept.
        clock: seconds since 1970.
        watch: seconds that only grow.
    """

    def __init__(
        self,
        runner: QueueRunner,
        records: QueueRecords,
        files: ImageFiles,
        leases: Leases,
        *,
        expiry_s: float,
        clock: Callable[[], float] = time.time,
        watch: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner, self._records, self._files, self._leases = runner, records, files, leases
        self._expiry_s, self._clock, self._watch = expiry_s, clock, watch
        self._owners: dict[str, str] = {}
        self._unowned: dict[str, float] = {}  # Since when requests were seen of which nobody says that they are his.
        self._waited_for: set[str] = set()
        self._chosen: Callable[[str], bool] | None = None
        self._swept = -math.inf
        # A thread of its own: those of the loop may all be waiting for something.
        self._renewing = ThreadPoolExecutor(1, thread_name_prefix="lease")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Do it again and again until the end."""
        # Before anything is accepted: the others would take a request of a server without a lease for a dead one's.
        self._runner.has_lease = False
        began = self._watch()
        succeeded = await self._attempt(self.renew)
        # Apart: a round over thousands of requests takes longer than a lease.
        renewing = asyncio.create_task(self._renew_again(self._watch() - began, succeeded=succeeded))
        tasks = [renewing, asyncio.create_task(self._look_again())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            try:
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:  # A second cancellation interrupts the wait, but only when it is over.
                await self._leave()

    async def _leave(self) -> None:
        try:
            await in_thread(self._renewing, self._leases.leave)  # After what that thread may be writing still.
        except OutputError as error:
            logger.error("storage: %s", error)
        finally:
            self._renewing.shutdown(wait=True)

    async def _renew_again(self, took_s: float, *, succeeded: bool) -> None:
        while True:
            await asyncio.sleep(pause_s(self._leases.lease_s, took_s, succeeded=succeeded))
            began = self._watch()
            succeeded = await self._attempt(self.renew)
            took_s = self._watch() - began

    async def _look_again(self) -> None:
        while True:
            await self._attempt(self.look)
            await asyncio.sleep(self._leases.lease_s / 3)

    async def _attempt(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Whether it succeeded."""
        try:
            await work()
            return True
        except OutputError as error:
            logger.error("storage: %s", error)
        except Exception as error:
            # Without further rounds the others would take this server for dead, and compute again what it computes.
            logger.error("upkeep of the queue: %s", error, exc_info=error)
        return False

    async def renew(self) -> None:
        """Say that this server is alive.

        Raises:
            OutputError: the storage failed.
        """
        await in_thread(self._renewing, self._leases.renew, takes_up=self._runner.takes_up)
        self._runner.has_lease = True

    async def look(self) -> None:
        """One round over what is in the storage.

        Raises:
            OutputError: the storage failed.
        """
        unbegun = self._runner.unbegun()  # Before: what is accepted meanwhile need not be found.
        unfinished = await in_thread(None, self._records.unfinished)
        for identifier in unbegun - unfinished.keys():
            await self._runner.let_go_of_answered(identifier)
        self._owners = {one: owner for one, owner in self._owners.items() if one in unfinished}
        self._unowned = {one: since for one, since in self._unowned.items() if one in unfinished}
        ended: dict[str, bool] = {}
        self._chosen = None  # Who is alive is looked up anew in each round that needs it.
        for identifier, to_cancel in unfinished.items():
            if self._runner.has(identifier):
                if to_cancel:
                    await self._runner.cancel_mine(identifier)
                continue
            owner = self._owners.get(identifier, "")
            if owner and owner not in ended:
                ended[owner] = await in_thread(None, self._leases.has_ended, owner)
            if owner and not ended[owner]:
                continue
            await self._look_at(identifier, to_cancel=to_cancel)
        self._waited_for &= set(self._owners.values())
        if self._watch() - self._swept >= min(_SWEEP_S, self._expiry_s):
            self._swept = self._watch()
            await in_thread(None, self._files.sweep)
            await in_thread(None, self._records.sweep, self._clock(), self._expiry_s)
            await in_thread(None, self._leases.remove_ended)

    async def _look_at(self, identifier: str, *, to_cancel: bool) -> None:
        """Take up a request that nobody answers for, as after this server's own restart. To be cancelled, it is ended."""
        state = await in_thread(None, self._records.state, identifier)
        if state is None and self._watch() - self._unowned.setdefault(identifier, self._watch()) < self._leases.lease_s:
            return  # It may be being accepted just now.
        if state is not None and state.status == "COMPLETED":
            # Its server ended between saying so and letting go of the request.
            await in_thread(None, self._records.let_go, identifier)
            return
        mine = state is not None and state.owner == self._leases.owner
        if state is not None and not mine and not await in_thread(None, self._leases.has_ended, state.owner):
            self._wait_for(identifier, state.owner)
            return
        if not self._runner.takes_up or not (mine or await self._is_chosen(identifier)):
            return
        request = await in_thread(None, self._records.request, identifier)
        if request is None or self._runner.has(identifier):
            return
        self._owners.pop(identifier, None)
        if not await in_thread(None, self._records.adopt, request, self._leases.owner):
            logger.info("queue request %s is removed: nobody was told of it, and its client sent it again", identifier)
            return
        logger.info("queue request %s is taken up", identifier)
        self._runner.take_up(request)
        if to_cancel:  # In the same turn, before it can be begun.
            await self._runner.cancel_mine(identifier)

    async def _is_chosen(self, identifier: str) -> bool:
        if self._chosen is None:
            self._chosen = await in_thread(None, self._leases.chosen)
        return self._chosen(identifier)

    def _wait_for(self, identifier: str, owner: str) -> None:
        self._owners[identifier] = owner
        if owner not in self._waited_for:
            self._waited_for.add(owner)
            logger.info("server %s has requests; they are taken up if it says nothing for %g s", owner, self._leases.lease_s)


def pause_s(lease_s: float, took_s: float, *, succeeded: bool) -> float:
    """How long to wait between two renewals of a lease.

    Args:
        lease_s: what the lease lasts, in seconds.
        took_s: what the last renewal took: where writing takes long the next one begins the sooner.
        succeeded: whether it did; if it did not, the others may be close to taking this server for dead.
    """
    return max(lease_s / 30, lease_s / 3 - took_s) if succeeded else lease_s / 15
