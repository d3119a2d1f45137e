"""Who asks: the key of a request, as a dependency of the routes."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from .auth import ANONYMOUS, Key, KeyRing
from .refusal import Refusal
from .request_record import record_of

NOBODY = Key(ANONYMOUS, b"")
"""Whoever asks a server that has no keys."""
_SCHEMES = ("bearer", "key")  # "Key" is what fal's clients say.
_CHALLENGE = {"WWW-Authenticate": "Bearer"}


def identified(request: Request) -> Key:
    """The key that a request shows; everybody is let in where the server has none.

    Raises:
        Refusal: 401.
    """
    keys: KeyRing | None = request.app.state.keys
    if keys is None:
        return NOBODY
    given = request.headers.getlist("authorization")
    scheme, _, text = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    if scheme.lower() not in _SCHEMES:
        raise Refusal(401, "A key is needed.", errors=["expected a header Authorization: Bearer KEY"], headers=_CHALLENGE)
    key = keys.identify(text.strip())
    if key is None:
        raise Refusal(401, "The key is not valid.", headers=_CHALLENGE)
    record_of(request.scope).caller = key.name
    return key


Caller = Annotated[Key, Depends(identified)]
