"""Two recordings held against each other, with the noise floor beside them.

The floor is what rounding alone does: the same configuration in bf16 against float32. A difference near it says nothing about a
tier; pictures of a few steps' distance from it look the same. PSNR and SSIM of pictures from a lossy tier are poor judges by
themselves (rounding can move a composition), so the latents' error after every step stands before them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from PIL import Image

from uso_engine.api.fields import image_seeds
from uso_engine.verification.measure import relative_error

from .image_metrics import psnr, ssim
from .recording import RecordedRequest, Recording


@dataclass(frozen=True)
class ImageComparison:
    """One image made twice.

    Args:
        request: which request, from 0.
        image: which of its images, from 0.
        prompt: of the request.
        seed: of the image.
        latent_errors: ||a - b|| / ||b|| after each step.
        psnr_db: of the pictures; infinite if they are the same.
        ssim: of the pictures.
        pictures: a's and b's.
    """

    request: int
    image: int
    prompt: str
    seed: int
    latent_errors: tuple[float, ...]
    psnr_db: float
    ssim: float
    pictures: tuple[Image.Image, Image.Image] = field(repr=False, compare=False)

    def document(self) -> dict[str, object]:
        """As plain JSON; null stands for an infinite PSNR."""
        return {
            "request": self.request,
            "image": self.image,
            "prompt": self.prompt,
            "seed": self.seed,
            "latent_errors": list(self.latent_errors),
            "psnr_db": None if math.isinf(self.psnr_db) else self.psnr_db,
            "ssim": self.ssim,
        }


@dataclass(frozen=True)
class Comparison:
    """Two engines on the same requests.

    Args:
        a: name of the one.
        b: name of the other, which the errors are relative to.
        images: every image of every request.
        floor: the same for bf16 against float32, if it was recorded.
    """

    a: str
    b: str
    images: tuple[ImageComparison, ...]
    floor: Comparison | None = None

    def document(self) -> dict[str, object]:
        """As plain JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "images": [image.document() for image in self.images],
            "noise_floor": None if self.floor is None else self.floor.document(),
        }


def compare(a: Recording, b: Recording, *, floor: tuple[Recording, Recording] | None = None) -> Comparison:
    """Hold one recording against another.

    Args:
        a: the one.
        b: the other; errors are relative to its latents.
        floor: recordings of the same requests in bf16 and in float32.

    Raises:
        ValueError: recordings of different requests.
    """
    beside = None if floor is None else compare(*floor)
    if len(a.requests) != len(b.requests):
        raise ValueError(f"{a.name} answered {len(a.requests)} requests, {b.name} {len(b.requests)}")
    images: list[ImageComparison] = []
    for number, (x, y) in enumerate(zip(a.requests, b.requests, strict=True)):
        images += _compare_request(number, x, y)
    comparison = Comparison(a.name, b.name, tuple(images), beside)
    if beside is not None and len(beside.images) != len(images):
        raise ValueError(f"the noise floor holds {len(beside.images)} images, the comparison {len(images)}")
    return comparison


def _compare_request(number: int, a: RecordedRequest, b: RecordedRequest) -> list[ImageComparison]:
    shapes = [(r.prompt, r.seed, len(r.latents), tuple(image.size for image in r.images)) for r in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"request {number} differs: prompt, seed, steps and sizes are {shapes[0]} and {shapes[1]}")
    seeds = image_seeds(a.seed, len(a.images))
    return [
        ImageComparison(
            request=number,
            image=j,
            prompt=a.prompt,
            seed=seeds[j],
            latent_errors=tuple(relative_error(x[j], y[j]) for x, y in zip(a.latents, b.latents, strict=True)),
            psnr_db=psnr(a.images[j], b.images[j]),
            ssim=ssim(a.images[j], b.images[j]),
            pictures=(a.images[j], b.images[j]),
        )
        for j in range(len(a.images))
    ]
