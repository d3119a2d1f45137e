"""What calls in the words of diffusers give back: images of all requests, as pictures, arrays, tensors or latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from uso_engine.errors import SafetyError

from .messages import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

    from .result import GenerationResult

OutputType = Literal["pil", "np", "pt", "latent"]


@dataclass(frozen=True)
class PromptResults:
    """Results of several requests of one call, in its order.

    Args:
        results: one for each prompt; for a list of generators one for each of them.
    """

    results: tuple[GenerationResult, ...]

    @property
    def images(self) -> tuple[Image, ...]:
        """All images, those of the first prompt first."""
        return tuple(image for result in self.results for image in result.images)

    def __iter__(self) -> Iterator[GenerationResult]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, index: int) -> GenerationResult:
        return self.results[index]


@dataclass(frozen=True)
class ConvertedResults:
    """Images in another form than Pillow's, and the results that they come from.

    Args:
        images: float32 from 0 to 1, an array [n, h, w, 3] or a tensor [n, 3, h, w]; or packed latents [n, L, 64].
        results: one for each request.
    """

    images: NDArray[np.float32] | Tensor
    results: tuple[GenerationResult, ...]


def checked_output_type(value: object) -> OutputType:
    """The form that images are wanted in; ValueError for another."""
    known = get_args(OutputType)
    if value not in known:
        raise ValueError(f"output_type must be one of {', '.join(map(repr, known))}, got {shown(value)}")
    return value  # type: ignore[return-value]


def converted(results: Sequence[GenerationResult], output_type: OutputType) -> ConvertedResults:
    """Images of several results in one array or tensor.

    Args:
        results: all of one size.
        output_type: "np", "pt" or "latent".

    Raises:
        SafetyError: latents, and the safety checker objected to an image of them.
    """
    import numpy as np
    import torch

    from uso_engine.sampling.latents import pack_latent

    if output_type == "latent":
        latents = [result.latents for result in results if result.latents is not None]
        if len(latents) < len(results):
            raise SafetyError("the safety checker objected to an image; its latents are withheld, ask for output_type='pil'")
        return ConvertedResults(pack_latent(torch.cat(latents)), tuple(results))
    images = [np.asarray(image) for result in results for image in result.images]
    pixels = np.stack(images).astype(np.float32) / np.float32(255)
    if output_type == "np":
        return ConvertedResults(pixels, tuple(results))
    return ConvertedResults(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), tuple(results))
