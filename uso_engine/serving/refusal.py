"""Answers that are no success: a status, the hosted API's error body, and which exception becomes which."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from uso_engine.api.messages import validation_messages
from uso_engine.api.response import VALIDATION_MESSAGE, error_body
from uso_engine.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineDrainingError,
    FetchError,
    ImageError,
    MemoryBudgetError,
    OutputError,
    PromptError,
    QueueFullError,
    RequestCancelledError,
    RequestTimeoutError,
    SafetyError,
)

logger = logging.getLogger(__name__)

CLIENT_GONE = 499
"""In logs and metrics alone: nobody is left to read an answer."""
RETRY_AFTER_S = 5.0


class Refusal(Exception):
    """An answer that is no success.

    Args:
        status: the HTTP status.
        message: what went wrong.
        errors: details, a sentence each.
        fields: names of the offending fields.
        headers: further headers.
        retry_after_s: when trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        errors: Sequence[str] = (),
        fields: Sequence[str] = (),
        headers: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.errors, self.fields = tuple(errors), tuple(fields)
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))

    def body(self, path: str, request_id: str) -> bytes:
        """The error body as JSON."""
        made = error_body(
            self.message,
            path=path,
            status_code=self.status,
            request_id=request_id,
            errors=self.errors,
            fields=self.fields,
        )
        return made.model_dump_json().encode()


def bad_request(*errors: str, fields: Sequence[str] = ()) -> Refusal:
    """A request that breaks the schema."""
    return Refusal(400, VALIDATION_MESSAGE, errors=errors, fields=fields)


def invalid(error: ValidationError, names: Mapping[str, str] | None = None) -> Refusal:
    """A request that breaks the schema, from what pydantic says.

    Args:
        error: of a request class.
        names: what a dialect calls fields, where it calls them otherwise.
    """
    located = [str(details["loc"][0]) for details in error.errors(include_url=False, include_input=False) if details["loc"]]
    said, messages = names or {}, validation_messages(error)
    for field, name in said.items():
        messages = [name + text.removeprefix(field) if text.startswith(field) else text for text in messages]
    return bad_request(*messages, fields=tuple(dict.fromkeys(said.get(name, name) for name in located)))


def refusal_of(error: BaseException) -> Refusal:
    """The answer to an exception; one that nobody foresaw is logged with its traceback and told to nobody."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ValidationError):
        return invalid(error)
    if isinstance(error, QueueFullError):
        return Refusal(429, "The queue is full.", errors=[str(error)], retry_after_s=error.retry_after_s)
    if isinstance(error, (ImageError, FetchError, PromptError)):
        return bad_request(str(error), fields=["prompt" if isinstance(error, PromptError) else "image_urls"])
    if isinstance(error, MemoryBudgetError):
        return Refusal(400, "The request needs more memory than this engine may use.", errors=[str(error)])
    if isinstance(error, RequestTimeoutError):
        return Refusal(504, "The request was not done in time.", errors=[str(error)])
    if isinstance(error, (EngineDrainingError, EngineClosedError, EngineDeadError)):
        return Refusal(503, "The engine takes no requests.", errors=[_state(error)], retry_after_s=RETRY_AFTER_S)
    if isinstance(error, RequestCancelledError):
        return Refusal(503, "The request was cancelled.", retry_after_s=RETRY_AFTER_S)
    if isinstance(error, OutputError):
        logger.error("storage: %s", error)
        return Refusal(503, "The storage failed.", retry_after_s=RETRY_AFTER_S)
    if isinstance(error, SafetyError):
        logger.error("safety checker: %s", error)
        return Refusal(500, "The safety checker could not run; the images are withheld.")
    logger.error("a request failed", exc_info=error)
    return Refusal(500, "Internal server error")


def _state(error: Exception) -> str:
    """Which of them it is, without what the engine says of its inside."""
    if isinstance(error, EngineDrainingError):
        return "it finishes what it has and accepts no more"
    return "it has failed" if isinstance(error, EngineDeadError) else "it was closed"
