"""A generation as every dialect hands it on: the engine's request, and how its result is written down."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from uso_engine.api.request import GenerationRequest
from uso_engine.api.response import GenerationResponse
from uso_engine.api.result import GenerationResult
from uso_engine.imaging.encode import Encoder
from uso_engine.imaging.store import ImageStore

Write = Callable[[GenerationResponse], bytes]
"""A response as a dialect's JSON."""


@dataclass(frozen=True)
class ImageCall:
    """One request for images.

    Args:
        dialect: whose words it came in: ``hosted``, ``openai`` or ``fal``.
        request: what to make.
        status: of a success.
        write: how a response is written.
    """

    dialect: str
    request: GenerationRequest
    status: int
    write: Write

    def rendered(self, result: GenerationResult, store: ImageStore, encoder: Encoder) -> bytes:
        """Store the images, or put them into the answer, and write it.

        Raises:
            OutputError: an image could not be stored.
        """
        return self.write(result.to_response(store, encoder=encoder))

    def log_fields(self, *, with_prompt: bool) -> dict[str, object]:
        """What the log line says of it: sizes and counts; no pictures, and prompts only where they were asked for."""
        request = self.request
        fields: dict[str, object] = {
            "images": request.num_images,
            "references": len([image for image in request.image_urls if image is not None]),
            "steps": request.num_inference_steps,
        }
        return {**fields, "prompt": request.prompt, "negative_prompt": request.negative_prompt} if with_prompt else fields


def written_hosted(response: GenerationResponse) -> bytes:
    """The hosted API's JSON."""
    return response.model_dump_json().encode()


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
