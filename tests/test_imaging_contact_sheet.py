"""References and results in one picture, all of them there, captions inside."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from uso_engine.imaging.contact_sheet import _in_ascii, _wrap, contact_sheet

COLOURS = [(200, 0, 0), (0, 180, 0), (0, 0, 220), (200, 0, 200), (0, 160, 160)]


def area_of(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Bounding box of a colour: left, top, right, bottom."""
    ys, xs = np.nonzero((np.asarray(sheet) == colour).all(-1))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def test_every_picture_is_there_in_its_shape_and_row() -> None:
    sizes = [(100, 50), (30, 60), (8, 8), (640, 480), (64, 64)]
    pictures = [Image.new("RGB", size, colour) for size, colour in zip(sizes, COLOURS, strict=True)]
    references = [("content", pictures[0]), ("style", pictures[1])]
    results = [(f"seed {n}", picture) for n, picture in enumerate(pictures[2:])]
    sheet = contact_sheet(references, results, title="a prompt", cell=128)
    areas = [area_of(sheet, colour) for colour in COLOURS]
    for (left, top, right, bottom), (width, height) in zip(areas, sizes, strict=True):
        assert max(right - left, bottom - top) == 128
        assert abs((right - left) * height - (bottom - top) * width) <= max(width, height)
    assert max(area[3] for area in areas[:2]) < min(area[1] for area in areas[2:])
    assert areas[0][2] < areas[1][0]
    assert areas[2][2] < areas[3][0] < areas[3][2] < areas[4][0]


def test_captions_and_title_are_drawn_and_stay_in_their_place() -> None:
    picture = Image.new("RGB", (64, 64), COLOURS[0])
    long = "a caption of many words that has to be broken into several lines and then cut " * 4
    bare = np.asarray(contact_sheet([], [("", picture), ("", picture)], cell=128))
    full = np.asarray(contact_sheet([], [(long, picture), ("b", picture)], title="W" * 500, cell=128))
    assert full.shape[0] > bare.shape[0]
    ink = (full.astype(int).sum(-1) < 600) & ~(full == COLOURS[0]).all(-1)
    ys, xs = np.nonzero(ink)
    assert len(ys) > 500
    assert xs.max() < full.shape[1] - 8
    assert ys.max() < full.shape[0] - 8
    first_caption = ink[area_of(Image.fromarray(full), COLOURS[0])[3] :]
    columns = np.nonzero(first_caption.any(0))[0]
    assert not ((columns > 16 + 128) & (columns < 2 * 16 + 128)).any()  # the gap between the cells stays empty


def test_wrapping_breaks_long_words_and_marks_what_is_cut() -> None:
    font = ImageFont.load_default(17)
    lines = _wrap("x" * 200, font, 100, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 100 for line in lines)
    assert _wrap("one two", font, 1000, 3) == ["one two"]
    assert _wrap("", font, 100, 3) == []
    assert _wrap("ww", font, 1, 5) == ["w", "w"]


def test_text_is_brought_to_what_the_font_has() -> None:
    assert _in_ascii("étude — “blue” 天") == 'etude - "blue" ?'


def test_bad_sheets_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([], [])
    with pytest.raises(ValueError, match="cell must be at least 64 pixels, got 10"):
        contact_sheet([], [("a", Image.new("RGB", (4, 4)))], cell=10)
