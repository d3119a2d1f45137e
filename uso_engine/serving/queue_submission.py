"""A submission that may be sent again: its Idempotency-Key makes the second the same request as the first.

As draft-ietf-httpapi-idempotency-key-header has it: the key is its caller's, and 422 answers one that comes with another body.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated

from fastapi import Header, Request

from .queue_records import QueuedRequest, Submission
from .queue_runner import AlreadySubmittedError, QueueRunner
from .refusal import Refusal, bad_request

HEADER = "Idempotency-Key"
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias=HEADER,
        pattern=r"^[!-~]{1,255}$",
        description="1 to 255 printable characters without spaces, drawn by the client: sent again, it is the same request.",
    ),
]
_TRIES = 3


def submission_of(key: str, caller: str, model: str, fields: Mapping[str, object]) -> Submission:
    """A submission, from what was sent. Whoever has large pictures in it calls this from a thread.

    Args:
        key: the header's value.
        caller: name of the caller's key: the same value of another one is another submission.
        model: the name that it was sent to.
        fields: of the body. Their order does not count.
    """
    written = json.dumps({"model": model, "fields": fields}, sort_keys=True)
    return Submission(
        name=hashlib.sha256(f"{caller} {key}".encode()).hexdigest(),
        fingerprint=hashlib.sha256(written.encode()).hexdigest(),
    )


def check_single(request: Request) -> None:
    """Refuse a request with several keys.

    Raises:
        Refusal: 400.
    """
    if len(request.headers.getlist(HEADER)) > 1:
        raise bad_request(f"{HEADER} must be given once", fields=[HEADER])


async def submitted_once(runner: QueueRunner, request: QueuedRequest) -> tuple[str, int | None]:
    """Submit a request, unless its submission has been.

    Returns:
        Identifier of the request that the submission is, and how many are before it while it waits.

    Raises:
        Refusal: 422 where something else was submitted under its key, and as `QueueRunner.submit`.
        OutputError: it cannot be kept.
    """
    if request.submission is None:
        return request.id, await runner.submit(request)
    for _ in range(_TRIES):
        known = await runner.submitted(request.submission)
        if known is not None:
            view = await runner.view(known, request.key, request.model)
            return known, None if view is None else view.position
        try:
            return request.id, await runner.submit(request)
        except AlreadySubmittedError:
            continue  # Another server, or another connection, was faster.
    raise Refusal(503, "The request is being submitted elsewhere.", retry_after_s=1)
