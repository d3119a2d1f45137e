"""A comparison to read and to look at: a table of numbers, and one picture with both images and their difference."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from uso_engine.errors import OutputError

from .compare import Comparison, ImageComparison

DIFFERENCE_GAIN = 4
"""How much the difference is amplified in the picture; 255 / 4 and more shows as full."""

_COLUMNS = ("request", "seed", "latent, first step", "middle", "last", "PSNR", "SSIM")


def table(comparison: Comparison) -> str:
    """Every image as a line: latent errors after the first, middle and last step, PSNR and SSIM; the noise floor below."""
    lines = [f"{comparison.a} against {comparison.b}", *_rows(comparison)]
    if comparison.floor is not None:
        lines += ["", f"noise floor: {comparison.floor.a} against {comparison.floor.b}", *_rows(comparison.floor)]
    return "\n".join(lines)


def picture(comparison: Comparison) -> Image.Image:
    """One row per image: a's, b's, and the amplified difference on black."""
    rows = [_row(image) for image in comparison.images]
    gap = 8
    width = max(row.width for row in rows)
    canvas = Image.new("RGB", (width, sum(row.height for row in rows) + gap * (len(rows) - 1)), "white")
    top = 0
    for row in rows:
        canvas.paste(row, (0, top))
        top += row.height + gap
    return canvas


def write_report(comparison: Comparison, folder: Path) -> tuple[Path, Path, Path]:
    """Write ``comparison.json``, ``comparison.txt`` and ``comparison.png``.

    Args:
        comparison: what to write.
        folder: made if it is not there.

    Returns:
        The three paths.

    Raises:
        OutputError: something cannot be written.
    """
    paths = folder / "comparison.json", folder / "comparison.txt", folder / "comparison.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(json.dumps(comparison.document(), indent=1) + "\n", encoding="utf-8")
        paths[1].write_text(table(comparison) + "\n", encoding="utf-8")
        picture(comparison).save(paths[2])
    except OSError as error:
        raise OutputError(f"{folder}: the comparison cannot be written: {error.strerror or error}") from error
    return paths


def _rows(comparison: Comparison) -> list[str]:
    cells = [_COLUMNS, *(_cells(image) for image in comparison.images)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_COLUMNS))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def _cells(image: ImageComparison) -> tuple[str, ...]:
    errors = image.latent_errors
    chosen = (errors[0], errors[len(errors) // 2], errors[-1]) if errors else (math.nan,) * 3
    decibels = "same" if math.isinf(image.psnr_db) else f"{image.psnr_db:.1f} dB"
    return (
        f"{image.request}.{image.image}",
        str(image.seed),
        *(f"{100 * error:.2f} %" for error in chosen),
        decibels,
        f"{image.ssim:.4f}",
    )


def _row(image: ImageComparison) -> Image.Image:
    a, b = (np.asarray(picture.convert("RGB"), dtype=np.int16) for picture in image.pictures)
    difference = np.clip(np.abs(a - b) * DIFFERENCE_GAIN, 0, 255).astype(np.uint8)
    gap = np.full((a.shape[0], 8, 3), 255, dtype=np.uint8)
    return Image.fromarray(np.concatenate((a.astype(np.uint8), gap, b.astype(np.uint8), gap, difference), axis=1))
