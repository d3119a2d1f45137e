"""Which formats are taken from where: all from this machine, three from strangers; anything else is called by its name."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from picture_files import encoded, gradient
from PIL import Image

from uso_engine.errors import ImageError
from uso_engine.imaging.open import ImageLimits, describe_source, open_image

FOREIGN = [
    (b"", r"empty \(0 bytes\)"),
    (b"hello world", r"not an image \(11 bytes"),
    (b"  <!DOCTYPE html><html>", "an HTML page"),
    (b"\xef\xbb\xbf<svg xmlns=''>", "an SVG drawing"),
    (b'{"error": "no"}', "JSON or text"),
    (b"%PDF-1.7", "a PDF document"),
    (b"\0\0\0\x20ftypisom", "a video"),
    (b"\0\0\0\x0cJXL \r\n", "a JPEG XL image"),
]
LOCAL_ONLY = [
    (b"\0\0\0\x20ftypavif", "an AVIF image"),
    (b"\0\0\0\x20ftypheic", "a HEIC image"),
    (encoded(Image.new("P", (3, 3)), "GIF"), "a GIF image"),
    (encoded(Image.new("RGB", (3, 3)), "BMP"), "a BMP image"),
    (encoded(Image.new("RGB", (3, 3)), "TIFF"), "a TIFF image"),
    (encoded(Image.new("RGB", (3, 3)), "TIFF", big_tiff=True), "a TIFF image"),
]


@pytest.mark.parametrize(("data", "came"), FOREIGN, ids=[came for _, came in FOREIGN])
def test_other_things_are_named(data: bytes, came: str) -> None:
    with pytest.raises(ImageError, match=f"{came}.*expected PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC"):
        open_image(data)


@pytest.mark.parametrize(("data", "came"), [*FOREIGN, *LOCAL_ONLY], ids=[str(i) for i in range(len(FOREIGN) + len(LOCAL_ONLY))])
def test_data_uris_and_servers_take_three_formats(data: bytes, came: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever chooses a URL chooses the decoder: the list of formats does not grow with what local files may be."""
    expected = f"{came}.*expected PNG, JPEG or WebP, the formats that URLs and data URIs may lead to"
    with pytest.raises(ImageError, match=expected):
        open_image("data:image/png;base64," + base64.b64encode(data).decode())
    with pytest.raises(ImageError, match=expected):
        open_image(data, limits=ImageLimits(allow_paths=False))
    monkeypatch.setattr("uso_engine.imaging.fetch.fetch", lambda *arguments, **options: data)
    with pytest.raises(ImageError, match=expected):
        open_image("https://example.org/a.png")


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_local_files_of_further_formats(kind: str, tmp_path: Path) -> None:
    image = gradient().quantize(3) if kind == "GIF" else gradient()
    path = tmp_path / "picture.png"  # content decides, not the name
    path.write_bytes(encoded(image, kind))
    for source in (path, str(path), f"file:{path}", path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(image.convert("RGB"))), describe_source(source)
