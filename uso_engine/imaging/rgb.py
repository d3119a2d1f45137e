"""Any picture as plain upright RGB: orientation, transparency, ink colours, palettes, 16-bit greys."""

from __future__ import annotations

import logging

import numpy as np
from PIL import ExifTags, Image

from uso_engine.errors import ImageError

logger = logging.getLogger(__name__)

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


def to_rgb(image: Image.Image, *, label: str) -> Image.Image:
    """Bring a loaded image upright and to 8-bit RGB.

    Transparent pixels are laid on **white**, the paper most logos and cut-outs are meant for. (Dropping alpha instead, as a
    bare conversion does, brings out whatever colour an editor left in pixels nobody was meant to see.) 16-bit grey is scaled to
    8 bits by rounding; ink colours (CMYK) are converted without their colour profile.

    Args:
        image: a loaded image of any mode; it is not changed.
        label: what error messages call the picture.

    Returns:
        A new RGB image without metadata.

    Raises:
        ImageError: a mode whose values have no defined range (32-bit integers, floats).
    """
    turn = _TURNS.get(_orientation(image, label))
    if image.mode in ("I", "F") and not (image.mode == "I" and image.format == "PNG"):
        raise ImageError(f"{label}: mode {image.mode} has no defined range of values; convert it to L, I;16 or RGB first")
    rgb = _flatten(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}
    return rgb


def _orientation(image: Image.Image, label: str) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # noqa: BLE001 - damaged metadata around sound pixels raises anything; viewers show it all the same
        logger.warning("%s: its EXIF data is damaged (%s); taken as upright", label, type(error).__name__)
        return 1


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _flatten_deep_grey(image)
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode != "RGB" else image.copy()
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    canvas = Image.new("RGB", image.size, _WHITE)
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _flatten_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit grey to RGB; Pillow's own conversion clips at 255 instead of scaling, which turns nearly everything white."""
    deep = np.asarray(image).astype(np.uint32)
    grey = ((deep * 255 + 32767) // 65535).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[deep == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
