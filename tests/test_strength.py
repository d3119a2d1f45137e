"""Starting from the content image: the end of a schedule, the mixture, and what a strength means in a request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from uso_engine import ResearchOptions, Step, USOEngine
from uso_engine.imaging.pixels import from_pixels, to_pixels
from uso_engine.offload.phases import Choice, phases_of
from uso_engine.offload.sizes import EngineSizes, RequestSize, TransformerSizes
from uso_engine.sampling.latents import draw_noise
from uso_engine.sampling.schedule import schedule
from uso_engine.sampling.strength import last_steps, noised

FIELDS: dict[str, Any] = {"image_size": {"width": 96, "height": 64}, "num_inference_steps": 10, "seed": 7}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    rows = np.indices((80, 160)).astype(np.float64)
    channels = [rows[0] * 3, 255 - rows[1] * 1.5, (rows[0] // 16 + rows[1] // 16) % 2 * 255]
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("steps", "strength", "taken"),
    [(10, 1.0, 10), (10, 0.5, 5), (10, 0.41, 5), (10, 0.05, 1), (10, 1e-9, 1), (30, 0.1, 3), (28, 0.75, 21), (1, 0.5, 1)],
)
def test_the_last_steps_are_taken(steps: int, strength: float, taken: int) -> None:
    sigmas = schedule(steps, 64, 64)
    assert last_steps(sigmas, strength) == tuple(sigmas[steps - taken :])


def test_the_mixture_lies_on_the_line_from_picture_to_noise() -> None:
    clean = torch.randn(16, 8, 12, generator=torch.Generator().manual_seed(0))
    noise = [draw_noise(96, 64, seed) for seed in (3, 4)]
    assert torch.equal(noised(clean, 1.0, (3, 4)), torch.stack(noise))
    assert torch.equal(noised(clean, 0.0, (3,))[0], clean)
    mixed = noised(clean, 0.25, (3, 4))
    for i in range(2):
        assert torch.allclose(mixed[i], 0.75 * clean + 0.25 * noise[i], atol=1e-6)
    assert torch.equal(noised(clean[:8], 1.0, (3,))[0], draw_noise(96, 64, 3, channels=8))


def test_full_strength_is_noise_alone(engine: USOEngine, picture: Image.Image) -> None:
    plain = engine.generate("a cup", images=picture, **FIELDS)
    full = engine.generate("a cup", images=picture, research=ResearchOptions(strength=1.0), **FIELDS)
    assert plain.latents is not None and full.latents is not None
    assert torch.equal(plain.latents, full.latents)
    assert full.parameters["strength"] == 1.0
    assert "strength" not in plain.parameters


def test_a_weak_strength_keeps_the_picture(engine: USOEngine, picture: Image.Image) -> None:
    covered = ImageOps.fit(picture, (96, 64), Image.Resampling.LANCZOS)
    expected = from_pixels(engine.pipeline.decode(engine.pipeline.encode_content(to_pixels(covered))[None]))[0]

    def distance(strength: float) -> float:
        made = engine.generate("a cup", images=picture, research=ResearchOptions(strength=strength), **FIELDS).images[0]
        assert made.size == (96, 64)
        return float(np.abs(np.asarray(made, np.float64) - np.asarray(expected, np.float64)).mean())

    distances = [distance(strength) for strength in (0.1, 0.4, 0.7, 1.0)]
    assert distances == sorted(distances)
    assert distances[0] < distances[-1] / 4


def test_steps_and_sigmas_are_those_that_are_left(engine: USOEngine, picture: Image.Image) -> None:
    seen: list[tuple[int, float]] = []

    def look(step: Step) -> None:
        seen.append((step.steps, step.sigmas[0]))

    def made(**options: Any) -> list[tuple[int, float]]:
        seen.clear()
        engine.generate("a cup", images=picture, on_step=look, research=ResearchOptions(**options), **FIELDS)
        return list(seen)

    assert made(strength=0.3) == [(3, sigma) for sigma in schedule(10, 96, 64)[7:10]]
    own = (1.0, 0.8, 0.5, 0.2, 0.0)
    assert made(strength=0.5, sigmas=own) == [(2, 0.5), (2, 0.2)]


def test_a_strength_needs_a_picture(engine: USOEngine, picture: Image.Image) -> None:
    for images in ([], [None, picture]):
        with pytest.raises(ValueError, match="starts from the content image, the first of images, but there is none"):
            engine.generate("a cup", images=images, research=ResearchOptions(strength=0.5), **FIELDS)


def test_the_plan_counts_a_picture_that_is_encoded_at_the_outputs_size() -> None:
    transformer = TransformerSizes(
        hidden_size=64, vectors=2, always=1000, double_blocks=(1000,), single_blocks=(10,), modulation=(50,), scratch=0
    )
    sizes = EngineSizes(transformer, {})
    work = RequestSize(width=2048, height=1024)

    def encoding(work: RequestSize) -> int:
        return next(phase.peak_bytes for phase in phases_of(Choice(frozenset()), sizes, work) if phase.name == "content")

    small, large = (sizes.encoder.peak_bytes(sizes.encoding, pixels) for pixels in (512 * 512, 2048 * 1024))
    assert encoding(replace(work, start_pixels=2048 * 1024)) - encoding(work) == large - small > 0
