"""Pictures by the names that people write for files: with ``file:`` before them, and in their home."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from uso_engine.errors import ImageError
from uso_engine.imaging.open import open_image


@pytest.mark.parametrize("form", ["file://{}", "file:{}", "FILE://localhost{}", "{}"])
def test_files_may_be_named_with_their_scheme(form: str, tmp_path: Path) -> None:
    path = tmp_path / "a b.png"
    Image.new("RGB", (9, 7)).save(path)
    text = str(path) if form == "{}" else form.format(str(path).replace(" ", "%20"))
    assert open_image(text).size == (9, 7)


def test_files_on_other_machines_and_in_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match=r"a file on the machine 'x'; expected file:///PATH"):
        open_image("FILE://x/a.png")
    with pytest.raises(ImageError, match="the home folder"):
        open_image("~nobody-of-this-name/a.png")
    Image.new("RGB", (9, 7)).save(tmp_path / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_image("~/a.png").size == (9, 7)
