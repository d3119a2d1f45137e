"""What an engine makes of a list of requests, kept so that another engine can be held against it.

One engine at a time: two full-size models need not fit beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from uso_engine.sampling.step import Step

if TYPE_CHECKING:
    from uso_engine.engine import USOEngine

Progress = Callable[[int, int], None]
"""Told the requests done and the requests to do."""


@dataclass(frozen=True)
class RecordedRequest:
    """One request's answer.

    Args:
        prompt: as it was given.
        seed: of the first image.
        latents: [steps][images] of [L_img, 64], float32 on the CPU, after each step.
        images: the pictures.
    """

    prompt: str
    seed: int
    latents: tuple[tuple[Tensor, ...], ...]
    images: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Recording:
    """Everything one engine made.

    Args:
        name: of the configuration and tier.
        requests: in the order in which they were given.
    """

    name: str
    requests: tuple[RecordedRequest, ...]


def record(
    name: str, engine: USOEngine, requests: Sequence[Mapping[str, object]], *, progress: Progress | None = None
) -> Recording:
    """Run requests and keep the latents of every step.

    Args:
        name: what reports call the engine.
        engine: a loaded engine.
        requests: fields of each request; every one must name its seed, or the engines would draw different ones.
        progress: told after each request.

    Raises:
        ValueError: no requests, one without a seed, or one outside the schema.
    """
    if not requests:
        raise ValueError("nothing to compare: expected at least one request")
    seedless = [number for number, fields in enumerate(requests) if fields.get("seed") is None]
    if seedless:
        raise ValueError(f"every compared request needs a seed; missing in {', '.join(map(str, seedless))} (counted from 0)")
    done = []
    for number, fields in enumerate(requests):
        latents: list[tuple[Tensor, ...]] = []

        def keep(step: Step, latents: list[tuple[Tensor, ...]] = latents) -> None:
            latents.append(tuple(latent.detach().to("cpu", copy=True).float() for latent in step.latents))

        result = engine.generate(engine.request_type.model_validate(dict(fields)), on_step=keep)
        done.append(RecordedRequest(result.prompt, result.seed, tuple(latents), result.images))
        if progress is not None:
            progress(number + 1, len(requests))
    return Recording(name, tuple(done))
