"""Pictures given as numpy arrays and torch tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from uso_engine.errors import ImageError
from uso_engine.imaging.decode import check_size

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_CHANNELS = (1, 3, 4)
_ARRAY_SHAPES = "[height, width], or with 1, 3 or 4 channels last"
_TENSOR_SHAPES = "[height, width], or with 1, 3 or 4 channels first"
_UNREADABLE = "its values cannot be read; expected a dense tensor of uint8 or floats"


def array_to_image(array: NDArray[np.generic], *, max_pixels: int, label: str) -> Image.Image:
    """Turn a numpy array into a Pillow image.

    Args:
        array: [h, w], [h, w, 1], [h, w, 3] or [h, w, 4] (the fourth is alpha); uint8, or a float dtype from 0 to 1, which is
            scaled by 255 and rounded, as diffusers turns its own arrays into images.
        max_pixels: the most pixels (width x height).
        label: what error messages call the picture.

    Returns:
        A new image of mode L, RGB or RGBA.

    Raises:
        ImageError: another shape or dtype, values outside 0 to 1, masked ones, or too many pixels.
    """
    if np.ma.is_masked(array):
        raise ImageError(f"{label}: some of its values are masked; give them a colour with .filled(…) first")
    plain = np.asarray(array)
    _check_shape(plain.shape, channels_at=-1, expected=_ARRAY_SHAPES, label=label)
    return _image(plain, max_pixels=max_pixels, label=label)


def tensor_to_image(tensor: Tensor, *, max_pixels: int, label: str) -> Image.Image:
    """Turn a torch tensor into a Pillow image.

    Args:
        tensor: [h, w], [1, h, w], [3, h, w] or [4, h, w] (the fourth is alpha); uint8, or a float dtype from 0 to 1, as
            torchvision and diffusers ("pt") have it; any device.
        max_pixels: the most pixels (width x height).
        label: what error messages call the picture.

    Returns:
        A new image of mode L, RGB or RGBA.

    Raises:
        ImageError: another shape, dtype or layout, values outside 0 to 1, or too many pixels.
    """
    if tensor.is_nested:  # which has no shape to check
        raise ImageError(f"{label}: {_UNREADABLE}")
    _check_shape(tuple(tensor.shape), channels_at=0, expected=_TENSOR_SHAPES, label=label)
    check_size((tensor.shape[-1], tensor.shape[-2]), max_pixels=max_pixels, label=label)
    try:
        held = tensor.detach().cpu()
        held = held.float() if held.is_floating_point() else held
        plain = held.numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # a meta, sparse or quantised tensor
        raise ImageError(f"{label}: {_UNREADABLE}") from error
    return _image(plain if plain.ndim == 2 else np.moveaxis(plain, 0, -1), max_pixels=max_pixels, label=label)


def _check_shape(shape: tuple[int, ...], *, channels_at: int, expected: str, label: str) -> None:
    if len(shape) == 2 or (len(shape) == 3 and shape[channels_at] in _CHANNELS):
        return
    hint = "; give the pictures of a batch one by one" if len(shape) == 4 else ""
    raise ImageError(f"{label}: expected the shape {expected}, got {list(shape)}{hint}")


def _image(array: NDArray[np.generic], *, max_pixels: int, label: str) -> Image.Image:
    """From [h, w] or [h, w, channels]."""
    check_size((array.shape[1], array.shape[0]), max_pixels=max_pixels, label=label)
    if array.dtype != np.uint8:
        array = _to_bytes(array, label)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _to_bytes(array: NDArray[np.generic], label: str) -> NDArray[np.uint8]:
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"{label}: expected values of uint8, or floats from 0 to 1, got {array.dtype}")
    with np.errstate(all="ignore"):  # What is too large for float32 is refused below.
        floats = array.astype(np.float32)
    low, high = float(floats.min()), float(floats.max())
    if not (low >= 0 and high <= 1):  # not a number fails both
        raise ImageError(f"{label}: expected floats from 0 to 1, got values from {low:.9g} to {high:.9g}")
    return (floats * 255).round().astype(np.uint8)
