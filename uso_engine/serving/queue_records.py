"""Requests of fal's queue in the storage: accepted ones outlive the process, and every replica can answer for them."""

from __future__ import annotations

import os
import re
import time
import uuid
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .storage import Storage

FOLDER, KEYS = "queue", "keys"
_JSON = "application/json"
_FILE = re.compile(r"([0-9a-f-]{36})\.(request|state|result|cancel)\.json")
Status = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Submission(_Record):
    """A submission with an Idempotency-Key: sent again, it is the same request.

    Args:
        name: of the file that says which; made of the key and its caller.
        fingerprint: of what was asked for.
    """

    name: str
    fingerprint: str


class QueuedRequest(_Record):
    """An accepted request, written once, before its acceptance is told. Its seed is drawn: done twice, it is the same."""

    id: str
    model: str
    fields: dict[str, object]
    key: str
    base_url: str
    priority: int = 0
    start_by: float | None = None
    submission: Submission | None = None


class QueueState(_Record):
    """Where a request stands, and which server answers for it. Times are seconds since 1970."""

    key: str
    model: str
    owner: str
    status: Status = "IN_QUEUE"
    status_code: int | None = None
    error: str | None = None
    seconds: float | None = None
    expires: float | None = None
    submission: str | None = None


class Submitted(_Record):
    """Which request a submission became."""

    id: str
    fingerprint: str


R = TypeVar("R", bound=_Record)


def new_id() -> str:
    """A request's identifier: its first digits are the time, so that names sort by it, the rest cannot be guessed."""
    value = (int(time.time() * 1000) & (2**48 - 1)) << 80 | int.from_bytes(os.urandom(10))
    # Version 7, variant 10: RFC 9562.
    value = value & ~(0xF << 76) | 7 << 76
    return str(uuid.UUID(int=value & ~(0b11 << 62) | 0b10 << 62))


def accepted_at(identifier: str) -> float:
    """When a request was accepted, in seconds since 1970."""
    return int(identifier[:8] + identifier[9:13], 16) / 1000


def begun_state(request: QueuedRequest, owner: str, status: Status = "IN_QUEUE") -> QueueState:
    """The state of a request that has no answer yet.

    Args:
        request: whose.
        owner: the server that answers for it.
        status: where it stands.
    """
    submission = None if request.submission is None else request.submission.name
    return QueueState(key=request.key, model=request.model, owner=owner, status=status, submission=submission)


class QueueRecords:
    """The queue's files: ``ID.request.json``, ``ID.state.json``, ``ID.result.json``, ``ID.cancel.json``; submissions' own.

    Args:
        storage: where they are.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def accept(self, request: QueuedRequest, owner: str) -> bool:
        """Keep a request, then say who answers for it, then to which submission it belongs.

        Returns:
            Whether it is accepted: another one of its submission may have been before. Then nothing of it is left.
        """
        self._write(request.id, "request", request.model_dump_json().encode())
        self.put_state(request.id, begun_state(request, owner))
        return self._claim(request)

    def adopt(self, request: QueuedRequest, owner: str) -> bool:
        """Say that another server answers for a request, of which nobody may have been told; as `accept`."""
        # First: of a request that half an acceptance has left, another one of its submission may be there.
        if not self._claim(request):
            return False
        self.put_state(request.id, begun_state(request, owner))
        return True

    def withdraw(self, request: QueuedRequest) -> bool:
        """Remove a request of which nobody was told that it is accepted, however much of it was written.

        Returns:
            Whether it was removed. One that its submission leads to stays: whoever sends that again is told of it.
        """
        if request.submission is not None:
            found = self.submitted(request.submission.name)
            if found is not None and found.id == request.id:
                return False
        for kind in ("request", "state"):
            self._delete(request.id, kind)
        return True

    def submitted(self, name: str) -> Submitted | None:
        """Which request a submission became; None where it was not made, or its request has expired."""
        try:
            return Submitted.model_validate_json(self._storage.read(f"{KEYS}/{name}.json"))
        except (FileNotFoundError, ValidationError):
            return None

    def forget(self, name: str, identifier: str) -> None:
        """Let a submission be made anew, unless it has been: then it leads to another request than this one, and stays."""
        found = self.submitted(name)
        if found is not None and found.id == identifier:
            self._storage.delete(f"{KEYS}/{name}.json")

    def request(self, identifier: str) -> QueuedRequest | None:
        """An accepted request; None where there is none, or it has been answered."""
        return self._read(identifier, "request", QueuedRequest)

    def state(self, identifier: str) -> QueueState | None:
        """Where a request stands; None where there is none."""
        return self._read(identifier, "state", QueueState)

    def put_state(self, identifier: str, state: QueueState) -> None:
        """Say where a request stands."""
        self._write(identifier, "state", state.model_dump_json().encode())

    def finish(self, identifier: str, state: QueueState, body: bytes) -> None:
        """Keep an answer, then say that it is there, then let go of the request and its pictures."""
        self._write(identifier, "result", body)
        self.put_state(identifier, state)
        self.let_go(identifier)

    def let_go(self, identifier: str) -> None:
        """Remove a request that has been answered, and its pictures."""
        for kind in ("request", "cancel"):
            self._delete(identifier, kind)

    def result(self, identifier: str) -> bytes | None:
        """The answer's body; None where there is none."""
        try:
            return self._storage.read(self._name(identifier, "result"))
        except FileNotFoundError:
            return None

    def ask_to_cancel(self, identifier: str) -> None:
        """Say that a request is to be cancelled: its owner may be another server, or end before it has written the end."""
        self._write(identifier, "cancel", b"{}")

    def unfinished(self) -> dict[str, bool]:
        """Identifiers of requests that have no answer yet, oldest first, and whether each is to be cancelled."""
        kinds = self._kinds()
        return {one: "cancel" in found for one, found in kinds.items() if "request" in found}

    def sweep(self, now: float, expiry_s: float) -> None:
        """Remove answers that have expired, and after as long what nobody can answer: states without their request."""
        for identifier, kinds in self._kinds().items():
            if accepted_at(identifier) + expiry_s > now:
                return  # Names sort by time: what follows is younger.
            state = self.state(identifier)
            if state is None or state.status != "COMPLETED":
                if "request" in kinds and self.request(identifier) is not None:
                    continue
                state = self.state(identifier)  # It may have been answered, and its request let go of, in between.
            answered = state is not None and state.status == "COMPLETED"
            if state is None or not answered or (state.expires is not None and state.expires <= now):
                self._remove(identifier, None if state is None else state.submission)

    def _remove(self, identifier: str, submission: str | None) -> None:
        if submission is not None:
            self.forget(submission, identifier)
        for kind in ("result", "request", "cancel", "state"):  # The state last: it alone knows the submission.
            self._delete(identifier, kind)

    def _claim(self, request: QueuedRequest) -> bool:
        """Whether a request is the one of its submission; if it is not, it is removed."""
        if request.submission is None:
            return True
        name = request.submission.name
        made = Submitted(id=request.id, fingerprint=request.submission.fingerprint)
        if self._storage.create(f"{KEYS}/{name}.json", made.model_dump_json().encode(), _JSON):
            return True
        found = self.submitted(name)
        if found is None or found.id == request.id:  # What is no record of ours leads nowhere.
            return True
        for kind in ("request", "state"):
            self._delete(request.id, kind)
        return False

    def _kinds(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for name in self._storage.names(FOLDER):
            match = _FILE.fullmatch(name)
            if match is not None:
                found.setdefault(match[1], set()).add(match[2])
        return found

    def _read(self, identifier: str, kind: str, record: type[R]) -> R | None:
        try:
            return record.model_validate_json(self._storage.read(self._name(identifier, kind)))
        except (FileNotFoundError, ValidationError):
            # A record of another version of this server is none of ours.
            return None

    def _write(self, identifier: str, kind: str, data: bytes) -> None:
        self._storage.write(self._name(identifier, kind), data, _JSON)

    def _delete(self, identifier: str, kind: str) -> None:
        self._storage.delete(self._name(identifier, kind))

    @staticmethod
    def _name(identifier: str, kind: str) -> str:
        return f"{FOLDER}/{identifier}.{kind}.json"


def is_identifier(text: str) -> bool:
    """Whether a text has the form of `new_id`; anything else names no request."""
    return re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", text) is not None
