"""Leases of the servers that share a storage: each says again and again that it is alive, under a name of its own.

A name belongs to one start of one server, never to two, so nothing has to be reserved, and no two servers can take each other's
requests for their own, however machines, ports and containers are named. A server has ended when it has taken its lease away;
when what the lease says has not changed for so long, by the watch of who looks (no clocks of different machines are compared,
and one that is set changes nothing); or when its process was gone as the lease was first seen. That can be told on the same
machine alone, where what a killed server left is so taken up at once by the one that is started in its place.

A storage that fails, or takes long, keeps the others from renewing their leases as well: whatever this server's own renewal
takes, until it succeeds, the others have besides. So an outage kills nobody, and no writing is too slow.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from .process_mark import ProcessMark, has_certainly_ended, this_process
from .storage import Storage

logger = logging.getLogger(__name__)

FOLDER = "owners"
_LETTERS = re.compile(r"[^A-Za-z0-9_-]")
_REMOVED_AFTER = 10
"""After so many times a lease's time, one that does not change is removed: long after its requests were taken up."""
_CLOCKS_APART_S = 60.0


class Lease(BaseModel):
    """What a server says of itself.

    Args:
        renewed: seconds since 1970, by its clock; in any case something else each time.
        takes_up: whether it takes up what others left.
        process: which process it is.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    renewed: int
    takes_up: bool = True
    process: ProcessMark | None = None


@dataclass(frozen=True)
class _Seen:
    """What a lease said first and last, since when it has said that, and whether its process had ended at the first."""

    first: bytes
    last: bytes
    since: float
    gone: bool


def server_name(host: str, port: int) -> str:
    """What one start of a server calls itself in the storage; no other has the same, nor has it after a restart."""
    plain = _LETTERS.sub("-", host)[:100]
    return f"{plain}-{port}-{secrets.token_hex(8)}"


class Leases:
    """The leases in a storage, as one server sees them.

    Args:
        storage: where they are.
        owner: this server's name, of `server_name`.
        lease_s: seconds after which a server that says nothing has ended.
        clock: seconds since 1970.
        watch: seconds that only grow.
    """

    def __init__(
        self,
        storage: Storage,
        owner: str,
        lease_s: float,
        *,
        clock: Callable[[], float] = time.time,
        watch: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage, self.owner, self.lease_s, self._clock, self._watch = storage, owner, lease_s, clock, watch
        self._process = this_process()
        self._said = 0
        self._trying_since: float | None = None
        self._took_s = 0.0
        self._seen: dict[str, _Seen] = {}
        self._apart: set[str] = set()

    def renew(self, *, takes_up: bool) -> None:
        """Say that this server is alive, and whether it takes up what others left.

        Raises:
            OutputError: the storage failed.
        """
        self._said = max(self._said + 1, math.floor(self._clock()))
        lease = Lease(renewed=self._said, takes_up=takes_up, process=self._process)
        # Of a renewal that fails the time goes on until one succeeds.
        since = self._trying_since = self._watch() if self._trying_since is None else self._trying_since
        self._storage.write(_file(self.owner), lease.model_dump_json().encode(), "application/json")
        self._took_s, self._trying_since = self._watch() - since, None

    def leave(self) -> None:
        """Say that this server has ended: others take what it leaves.

        Raises:
            OutputError: the storage failed.
        """
        self._storage.delete(_file(self.owner))

    def has_ended(self, owner: str) -> bool:
        """Whether a server has ended, as far as this one can tell.

        Raises:
            OutputError: the storage failed.
        """
        seen = self._look(owner)
        return seen is None or (seen.gone and seen.last == seen.first) or self._silent_s(seen) >= self.lease_s

    def chosen(self) -> Callable[[str], bool]:
        """Which requests that nobody answers for are this server's: all servers draw alike, so each is one server's alone.

        Raises:
            OutputError: the storage failed.
        """
        names = [owner for owner in self._owners() if owner != self.owner and self._takes_up(owner)]
        return lambda identifier: all(_rank(identifier, self.owner) > _rank(identifier, other) for other in names)

    def remove_ended(self) -> None:
        """Remove the leases of servers that have ended; one that was only held up for long writes its own anew.

        Raises:
            OutputError: the storage failed.
        """
        owners = set(self._owners())
        self._apart &= owners
        for gone in [owner for owner in self._seen if owner not in owners]:
            del self._seen[gone]
        for owner in owners - {self.owner}:
            seen = self._look(owner)
            if seen is None:
                continue
            if (seen.gone and seen.last == seen.first) or self._silent_s(seen) >= _REMOVED_AFTER * self.lease_s:
                logger.info("server %s has ended; its lease is removed", owner)
                self._storage.delete(_file(owner))

    def _owners(self) -> list[str]:
        return [name.removesuffix(".json") for name in self._storage.names(FOLDER) if name.endswith(".json")]

    def _takes_up(self, owner: str) -> bool:
        lease = None if self.has_ended(owner) else _parsed(self._seen[owner].last)
        return lease is not None and lease.takes_up

    def _silent_s(self, seen: _Seen) -> float:
        """How long a server has said nothing, without the time that the storage may have kept it from that."""
        now, trying_since = self._watch(), self._trying_since
        trying_s = 0.0 if trying_since is None else now - trying_since
        return now - seen.since - max(self._took_s, trying_s)

    def _look(self, owner: str) -> _Seen | None:
        """What a server says now; None where it has no lease."""
        try:
            text = self._storage.read(_file(owner))
        except FileNotFoundError:
            self._seen.pop(owner, None)
            return None
        before = self._seen.get(owner)
        if before is None:
            lease = _parsed(text)
            gone = lease is not None and lease.process is not None and has_certainly_ended(lease.process)
            self._seen[owner] = _Seen(text, text, self._watch(), gone)
        elif before.last != text:
            self._compare_clocks(owner, text)
            self._seen[owner] = _Seen(before.first, text, self._watch(), before.gone)
        return self._seen[owner]

    def _compare_clocks(self, owner: str, text: bytes) -> None:
        """Say once where a server's clock is another; the lease was written within the last seconds."""
        lease = _parsed(text)
        apart_s = 0.0 if lease is None else lease.renewed - self._clock()
        if abs(apart_s) > self.lease_s + _CLOCKS_APART_S and owner not in self._apart:
            self._apart.add(owner)
            logger.warning(
                "the clock of server %s is %.0f s %s this one's; images and answers expire too early or too late by as much",
                owner,
                abs(apart_s),
                "ahead of" if apart_s > 0 else "behind",
            )


def _file(owner: str) -> str:
    return f"{FOLDER}/{owner}.json"


def _parsed(text: bytes) -> Lease | None:
    try:
        return Lease.model_validate_json(text)
    except ValidationError:
        return None  # Of another version of this server: it lives while it changes.


def _rank(identifier: str, owner: str) -> bytes:
    return hashlib.sha256(f"{identifier} {owner}".encode()).digest()
