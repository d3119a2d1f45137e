"""Any picture as plain upright RGB: orientation, transparency, ink colours, palettes, 16-bit greys."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np
from PIL import Image

from uso_engine.errors import ImageError
from uso_engine.imaging.orientation import UPRIGHT

Alpha: TypeAlias = Literal["white", "drop"]

# EXIF orientation -> what brings the stored pixels upright (EXIF 2.32, tag 0x0112). 1 is upright already.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE = (255, 255, 255)


def to_rgb(image: Image.Image, *, label: str, orientation: int = UPRIGHT, alpha: Alpha = "white") -> Image.Image:
    """Bring a loaded image upright and to 8-bit RGB.

    16-bit grey is scaled to 8 bits by rounding; ink colours (CMYK) are converted without their colour profile.

    Args:
        image: a loaded image of any mode; it is not changed.
        label: what error messages call the picture.
        orientation: as EXIF has it, 1 to 8; anything else is upright.
        alpha: "white" lays transparent pixels on **white**, the paper most logos and cut-outs are meant for. "drop" takes the
            colours as they are stored, as the authors' bare conversion does, and so brings out whatever an editor left in
            pixels nobody was meant to see.

    Returns:
        A new RGB image without metadata.

    Raises:
        ImageError: a mode whose values have no defined range (32-bit integers, floats), or contents that contradict the mode.
        ValueError: another ``alpha``.
    """
    if alpha not in get_args(Alpha):
        raise ValueError(f"alpha must be 'white' or 'drop', got {alpha!r}")
    if image.mode in ("I", "F") and not (image.mode == "I" and image.format == "PNG"):
        raise ImageError(f"{label}: mode {image.mode} has no defined range of values; convert it to L, I;16 or RGB first")
    try:
        rgb = _flatten(image, alpha)
    except MemoryError:
        raise
    except Exception as error:  # palettes and transparency that contradict the pixels surface only here, as anything there is
        raise ImageError(f"{label}: an image of mode {image.mode} that cannot be converted to RGB; it is damaged") from error
    turn = _TURNS.get(orientation)
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}
    return rgb


def _flatten(image: Image.Image, alpha: Alpha) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _flatten_deep_grey(image, alpha)
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode != "RGB" else image.copy()
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    if alpha == "drop":
        return rgba.convert("RGB")
    canvas = Image.new("RGB", image.size, _WHITE)
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _flatten_deep_grey(image: Image.Image, alpha: Alpha) -> Image.Image:
    """16-bit grey to RGB; Pillow's own conversion clips at 255 instead of scaling, which turns nearly everything white."""
    deep = np.asarray(image).astype(np.uint32)
    grey = ((deep * 255 + 32767) // 65535).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and alpha == "white":
        grey[deep == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
