"""A transformers image processor that was read from a folder, tried once: wrong settings show now and not in a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from uso_engine.errors import CheckpointError, USOError
from uso_engine.weights.files.key_report import short_key, short_reason

_LARGEST_SIDE = 8_192
_SIZES = ("size", "crop_size", "pad_size")


class ImageProcessor(Protocol):
    """Turns images into a model's input."""

    def __call__(self, images: Sequence[Image.Image], *, return_tensors: str) -> Mapping[str, torch.Tensor]:
        """Resize and normalise."""


def check_processor(processor: Callable[..., Mapping[str, torch.Tensor]], folder: Path, what: str) -> None:
    """Check that an image processor makes finite pixels of a picture.

    Args:
        processor: an `ImageProcessor` as it was loaded.
        folder: where from.
        what: what to call it in the message.

    Raises:
        CheckpointError: sizes that no encoder takes (they are not tried), an answer of another form, or none.
    """
    try:
        for name in _SIZES:
            size = getattr(processor, name, None)
            sides = {} if size is None else dict(size)
            if any(isinstance(side, int) and not 0 < side <= _LARGEST_SIDE for side in sides.values()):
                raise CheckpointError(f"{what} in {folder} cannot be used: {name} is {short_key(str(sides))}")
        pixels = processor([Image.new("RGB", (8, 8), "grey")], return_tensors="pt")["pixel_values"]
        if pixels.ndim != 4 or tuple(pixels.shape[:2]) != (1, 3) or not bool(pixels.isfinite().all()):
            raise CheckpointError(f"{what} in {folder} cannot be used: it gives no finite pixels [1, 3, height, width]")
    except USOError:
        raise
    except Exception as error:  # of any type: its settings come from a foreign file
        raise CheckpointError(f"{what} in {folder} cannot be used: {short_reason(error)}") from error
