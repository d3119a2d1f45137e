"""Requests as they come over HTTP, and why they are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from uso_engine.api.messages import validation_messages
from uso_engine.api.request import GenerationRequest

URL = "https://host.example/a.png"


def body(**changes: object) -> dict[str, object]:
    """A valid request, with changes."""
    return {"model": "bytedance/uso", "prompt": "a T-rex", "image_urls": [URL]} | changes


def refusals(kind: type[GenerationRequest], data: object) -> list[str]:
    """The messages about data that is no valid request."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(data)
    return validation_messages(caught.value)
