"""References and results in one picture, with captions."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 16
_GAP = 6
_BACKGROUND = (250, 250, 248)
_INK = (24, 24, 24)
_FAINT = (110, 110, 110)
_CAPTION_POINTS = 17
_TITLE_POINTS = 20
_CAPTION_LINES = 3
_TITLE_LINES = 4
_PUNCTUATION = str.maketrans({"–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "„": '"', "×": "x"})

Captioned = tuple[str, Image.Image]


def contact_sheet(
    references: Sequence[Captioned], results: Sequence[Captioned], *, title: str = "", cell: int = 320
) -> Image.Image:
    """Lay references in a first row and results in a second, each over its caption.

    Pictures keep their shape; small ones are enlarged without smoothing, so that their pixels can be seen. Text is set in
    Pillow's built-in font, which has ASCII only: accents are dropped, and letters of other scripts show as '?'.

    Args:
        references: (caption, RGB image); may be empty.
        results: (caption, RGB image).
        title: a line or more over everything, such as the prompt.
        cell: side of the square that a picture is fitted into, in pixels.

    Returns:
        One RGB image.

    Raises:
        ValueError: nothing to show, or a cell under 64 pixels.
    """
    if not references and not results:
        raise ValueError("a contact sheet needs at least one picture")
    if cell < 64:
        raise ValueError(f"cell must be at least 64 pixels, got {cell}")
    rows = [[(caption, _fit(picture, cell)) for caption, picture in row] for row in (references, results) if row]
    width = _MARGIN + max(len(row) for row in rows) * (cell + _MARGIN)
    title_lines = _wrap(title, _font(_TITLE_POINTS), width - 2 * _MARGIN, _TITLE_LINES) if title else []
    captions = [[_wrap(caption, _font(_CAPTION_POINTS), cell, _CAPTION_LINES) for caption, _ in row] for row in rows]
    picture_heights = [max(picture.height for _, picture in row) for row in rows]
    caption_heights = [_GAP + _line_height(_CAPTION_POINTS) * max(len(lines) for lines in row) for row in captions]
    top = _MARGIN + (_line_height(_TITLE_POINTS) * len(title_lines) + _MARGIN if title_lines else 0)
    height = top + sum(picture_heights) + sum(caption_heights) + _MARGIN * len(rows)
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    _write(draw, title_lines, (_MARGIN, _MARGIN), _TITLE_POINTS, _INK)
    for row, lines, tallest, text_height in zip(rows, captions, picture_heights, caption_heights, strict=True):
        for column, (_, picture) in enumerate(row):
            left = _MARGIN + column * (cell + _MARGIN)
            sheet.paste(picture, (left, top + tallest - picture.height))
            _write(draw, lines[column], (left, top + tallest + _GAP), _CAPTION_POINTS, _FAINT)
        top += tallest + text_height + _MARGIN
    return sheet


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    filter_ = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, filter_)


@cache
def _font(points: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(points)


def _line_height(points: int) -> int:
    return round(points * 1.35)


def _write(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], at: tuple[int, int], points: int, colour: tuple[int, int, int]
) -> None:
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * _line_height(points)), line, font=_font(points), fill=colour)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int) -> list[str]:
    """Break text at spaces, and inside words that are too long for a line; what is over ``most`` lines ends in '…'."""
    lines: list[str] = []
    line = ""
    for word in _in_ascii(text).split():
        candidate = f"{line} {word}" if line else word
        if font.getlength(candidate) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        line = word
        while len(line) > 1 and len(lines) <= most and font.getlength(line) > width:
            fits = _fitting(line, font, width)
            lines.append(line[:fits])
            line = line[fits:]
        if len(lines) > most:
            break
    if line:
        lines.append(line)
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip() + "…"]
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> int:
    """How many letters of a text fit; at least one."""
    return max(1, bisect_right(range(len(text)), float(width), key=lambda count: float(font.getlength(text[:count]))) - 1)


def _in_ascii(text: str) -> str:
    """Text that the built-in font can show: it has no accents, dashes or curly quotes."""
    plain = unicodedata.normalize("NFKD", text.translate(_PUNCTUATION))
    return "".join(c if c.isascii() else "?" for c in plain if not unicodedata.combining(c))
