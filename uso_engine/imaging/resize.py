"""The size rules of content images and of outputs that keep a content image's shape. No torch here: requests use it too."""

from __future__ import annotations

from PIL import Image

from uso_engine.errors import ImageError

GRID = 16
"""Width and height are multiples of this: the autoencoder halves three times and the transformer packs 2x2 latents."""


def content_size(width: int, height: int, *, long_side: int = 512) -> tuple[int, int]:
    """Size of a content image after resizing to ``long_side`` and cropping to multiples of 16.

    Args:
        width: of the upright image, in pixels.
        height: of the upright image, in pixels.
        long_side: what the longer side becomes, in pixels.

    Returns:
        Width and height, both multiples of 16. An image of 16x16 stays as it is.

    Raises:
        ImageError: a side would fall under 16 pixels.
        Source: USO, ``preprocess_ref``.
    """
    if (width, height) == (GRID, GRID):
        return GRID, GRID
    scaled = _scaled(width, height, long_side)
    cropped = _on_grid(*scaled)
    if min(cropped) < GRID:
        raise ImageError(
            f"content image {width}x{height} becomes {scaled[0]}x{scaled[1]} at long side {long_side}; "
            f"each side must keep at least {GRID} pixels, so crop it to a squarer shape"
        )
    return cropped


def resize_content(image: Image.Image, *, long_side: int = 512) -> Image.Image:
    """Resize a content image to ``long_side`` (Lanczos) and crop its centre to multiples of 16.

    Args:
        image: an upright RGB image.
        long_side: what the longer side becomes, in pixels.

    Returns:
        An RGB image of ``content_size``; an image of 16x16 is returned as it is.

    Raises:
        ImageError: a side would fall under 16 pixels.
        Source: USO, ``preprocess_ref``.
    """
    width, height = content_size(*image.size, long_side=long_side)
    if image.size == (GRID, GRID):
        return image
    scaled = _scaled(*image.size, long_side)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    # Resize everything, then crop: cropping first would move the sampling grid.
    return image.resize(scaled, Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))


def keep_size(width: int, height: int, *, long_side: int = 512, output_long_side: int = 1024) -> tuple[int, int]:
    """Output size that keeps the shape of a content image.

    Args:
        width: of the content image as it is given, in pixels.
        height: of the content image as it is given, in pixels.
        long_side: the long side the content image is resized to.
        output_long_side: the long side of the output; the reference uses 1024 whatever ``long_side`` is.

    Returns:
        ``content_size`` times ``output_long_side / long_side``, rounded down to multiples of 16.

    Raises:
        ImageError: a side would fall under 16 pixels.
        Source: USO, ``USOPipeline.gradio_generate`` (float arithmetic and truncation as there).
    """
    content = content_size(width, height, long_side=long_side)
    factor = output_long_side / long_side
    scaled = int(content[0] * factor), int(content[1] * factor)
    kept = _on_grid(*scaled)
    if min(kept) < GRID:
        raise ImageError(
            f"keep_size: content image {width}x{height} gives an output of {scaled[0]}x{scaled[1]}; "
            f"each side must be at least {GRID} pixels"
        )
    return kept


def _scaled(width: int, height: int, long_side: int) -> tuple[int, int]:
    # The reference's float arithmetic, kept: it loses a pixel for some shapes (197x197 becomes 512x511, so 512x496).
    if width >= height:
        return long_side, int((long_side / width) * height)
    return int((long_side / height) * width), long_side


def _on_grid(width: int, height: int) -> tuple[int, int]:
    return width // GRID * GRID, height // GRID * GRID
