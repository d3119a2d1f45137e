"""What the server notes of one HTTP request while it runs: for its log line, its metrics and its error body."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field

from starlette.types import Scope

_GIVEN_ID = re.compile(rb"[A-Za-z0-9._-]{8,64}")
_KEY = "uso_request"


@dataclass
class RequestRecord:
    """One request.

    Args:
        request_id: in logs, headers and error bodies.
        dialect: which of the server's ways of asking; "" for what generates nothing.
        caller: name of the key.
        outcome: of an answer that says only in its last event how it ended.
        status: of the answer; None before it begins.
        details: further fields of the log line.
    """

    request_id: str
    dialect: str = ""
    caller: str = ""
    outcome: str = ""
    status: int | None = None
    details: dict[str, object] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.perf_counter() - self.began


def begin_record(scope: Scope) -> RequestRecord:
    """The record of a request that has just come; an identifier that a proxy gave it is kept where it is plain."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    record = RequestRecord(given.decode() if _GIVEN_ID.fullmatch(given) else secrets.token_hex(16))
    scope.setdefault("state", {})[_KEY] = record
    return record


def record_of(scope: Scope) -> RequestRecord:
    """The record of a request that is running."""
    record = scope["state"][_KEY]
    assert isinstance(record, RequestRecord)
    return record
