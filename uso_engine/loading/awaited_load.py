"""A load that is awaited: in a thread, one at a time, again after one that failed, and never left open for nobody."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from functools import partial
from typing import Generic, Protocol, TypeVar

from uso_engine.errors import EngineClosedError


class Closable(Protocol):
    """What can be let go of again."""

    def close(self) -> None:
        """Let go of weights and files."""


Loaded = TypeVar("Loaded", bound=Closable)


class AwaitedLoad(Generic[Loaded]):
    """How an engine gets loaded for whoever awaits it.

    Args:
        name: of the engine, for what is said of it.
        load: loads it; called in a thread.
        threads: where that is.
    """

    def __init__(self, name: str, load: Callable[[], Loaded], threads: concurrent.futures.Executor) -> None:
        self._name, self._load, self._threads = name, load, threads
        self._is_under_way = self._is_closed = False
        self._given_up: concurrent.futures.Future[None] | None = None
        self._outcome = ""

    @property
    def missing(self) -> EngineClosedError:
        """What to say to whoever uses the engine while it is not loaded."""
        if self._is_under_way:
            return EngineClosedError(f"engine {self._name} is not loaded yet: another `async with` statement is loading it")
        cause = f": {self._outcome}" if self._outcome else ""
        again = ", which tries again" if self._outcome else ""
        return EngineClosedError(f"engine {self._name} is not loaded{cause}; use it in an `async with` statement{again}")

    def close(self) -> None:
        """Begin no other load."""
        self._is_closed = True

    async def loaded(self) -> Loaded | None:
        """Load, after a load that nobody waits for any more has ended: there is never room for two.

        Cancelled, it waits no longer; what is being loaded is closed when it is there.

        Returns:
            What was loaded; None where `close` was called before that began.

        Raises:
            EngineClosedError: somebody else is waiting for the same already.
            Exception: what loading raises. Nothing is left of that load, and another may follow.
        """
        if self._is_under_way:
            raise self.missing
        self._is_under_way = True
        try:
            if self._given_up is not None:
                await asyncio.wait([asyncio.wrap_future(self._given_up)])
            made = None if self._is_closed else await self._in_thread()
        except asyncio.CancelledError:
            self._outcome = "loading was cancelled"
            raise
        except Exception as error:
            self._outcome = f"loading failed ({type(error).__name__}: {error})"
            raise
        finally:
            self._is_under_way = False
        self._outcome = ""
        return made

    async def _in_thread(self) -> Loaded:
        loading = self._threads.submit(self._load)
        try:
            return await asyncio.wrap_future(loading)
        except asyncio.CancelledError:
            self._given_up = concurrent.futures.Future()
            self._given_up.set_running_or_notify_cancel()  # From now on nobody who waits for it can cancel it.
            loading.add_done_callback(partial(_close_loaded, closed=self._given_up))
            raise


def _close_loaded(loading: concurrent.futures.Future[Loaded], closed: concurrent.futures.Future[None]) -> None:
    """Close what nobody waits for any more when it is loaded; in the thread that loads it."""
    try:
        if not loading.cancelled() and loading.exception() is None:
            loading.result().close()
    finally:
        closed.set_result(None)
