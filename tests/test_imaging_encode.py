"""Files that say what they are, and are written whole or not at all."""

from __future__ import annotations

import io
import json
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from uso_engine.errors import OutputError
from uso_engine.imaging import encode as encode_module
from uso_engine.imaging.atomic import write_atomically
from uso_engine.imaging.encode import Encoder, ImageMetadata, OutputFormat, encode_image, output_format_of, save_image

NOTHING = ImageMetadata(model="uso-tiny")


def noise(side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (side, side, 3), dtype=np.uint8))


def exif_of(data: bytes) -> Image.Exif:
    return Image.open(io.BytesIO(data)).getexif()


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_every_file_says_that_it_was_generated(output_format: OutputFormat) -> None:
    data = encode_image(noise(), output_format, NOTHING)
    exif = exif_of(data)
    assert Image.open(io.BytesIO(data)).format == output_format.upper()
    assert exif[ExifTags.Base.Software] == "AI generated; uso_engine"
    assert exif[ExifTags.Base.Make] == "uso_engine"
    assert exif[ExifTags.Base.Model] == "uso-tiny"
    assert ExifTags.Base.ImageDescription not in exif


def test_png_is_lossless_and_jpeg_is_quality_95() -> None:
    image = noise()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_image(image, "png", NOTHING)))), np.asarray(image))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    ours = Image.open(io.BytesIO(encode_image(image, "jpeg", NOTHING)))
    assert getattr(ours, "quantization") == getattr(Image.open(buffer), "quantization")  # noqa: B009 - JpegImageFile has it


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_parameters_come_back_with_every_character(output_format: OutputFormat) -> None:
    parameters: Mapping[str, object] = {"prompt": 'ein "Schwan", 天鹅 🦢', "seed": 2**53 - 1, "size": [64, 48]}
    data = encode_image(noise(), output_format, ImageMetadata("uso-tiny", parameters))
    assert json.loads(exif_of(data)[ExifTags.Base.ImageDescription]) == parameters


def test_parameters_too_long_for_jpeg_are_cut_and_not_fatal() -> None:
    """4000 characters outside the basic plane take 48 kB as JSON; two such texts do not fit a JPEG's one segment."""
    parameters = {"prompt": "🦢" * 4000, "negative_prompt": "🦆" * 4000, "seed": 5}
    png = json.loads(exif_of(encode_image(noise(), "png", ImageMetadata("m", parameters)))[ExifTags.Base.ImageDescription])
    jpeg = json.loads(exif_of(encode_image(noise(), "jpeg", ImageMetadata("m", parameters)))[ExifTags.Base.ImageDescription])
    assert png == parameters
    assert jpeg["prompt"] == "🦢" * 1000 + "…"
    assert jpeg["seed"] == 5


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="output_format must be one of png, jpeg, webp, got 'gif'"):
        encode_image(noise(), "gif", NOTHING)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'a\.tiff' ends in '\.tiff'; expected \.png, \.jpg, \.jpeg or \.webp"):
        output_format_of(Path("a.tiff"))
    with pytest.raises(ValueError, match="ends in 'nothing'"):
        output_format_of(Path("a"))


def test_save_makes_folders_and_follows_the_ending(tmp_path: Path) -> None:
    for name, kind in (("a.png", "PNG"), ("b.JPG", "JPEG"), ("c.jpeg", "JPEG")):
        path = save_image(noise(), tmp_path / "new" / "folder" / name, NOTHING)
        assert Image.open(path).format == kind
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["a.png", "b.JPG", "c.jpeg"]


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write_atomically(tmp_path / "a", b"1")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def unwritable(tmp_path: Path) -> list[Path]:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    return [tmp_path / "file" / "a.png", tmp_path / "folder", tmp_path / ("x" * 300), Path("/proc/nowhere/a.png"), Path("/")]


def test_unwritable_outputs_say_which_and_leave_nothing(tmp_path: Path) -> None:
    for path in unwritable(tmp_path):
        with pytest.raises(OutputError, match=r"cannot write '.+': \w"):
            write_atomically(path, b"data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    with pytest.raises(OutputError, match="cannot write"):
        write_atomically(tmp_path / "a\0b", b"data")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folders(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            write_atomically(tmp_path / "a.png", b"data")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException, moment: str
) -> None:
    target = tmp_path / "a.png"
    target.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise fault

    monkeypatch.setattr(f"os.{moment}" if moment == "fsync" else f"pathlib.Path.{moment}", fail)
    with pytest.raises(OutputError if isinstance(fault, OSError) else type(fault)):
        write_atomically(target, b"new" * 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert target.read_bytes() == b"old"


def test_encoder_works_in_its_own_threads_and_finishes_on_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()
    original = encode_module.encode_image

    def watched(image: Image.Image, output_format: OutputFormat, metadata: ImageMetadata) -> bytes:
        threads.add(threading.current_thread().name)
        return original(image, output_format, metadata)

    monkeypatch.setattr(encode_module, "encode_image", watched)
    with Encoder(workers=2) as encoder:
        data = encoder.encode(noise(), "png", NOTHING)
        saved = [encoder.save(noise(), tmp_path / f"{number}.jpg", NOTHING) for number in range(4)]
    assert data.result() == original(noise(), "png", NOTHING)
    assert [future.result().name for future in saved] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert all(name.startswith("encode") for name in threads)


def test_encoder_hands_errors_to_whoever_asks(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with Encoder() as encoder:
        with pytest.raises(ValueError, match=r"expected \.png"):
            encoder.save(noise(), tmp_path / "a.bmp", NOTHING)
        failed = encoder.save(noise(), tmp_path / "file" / "a.png", NOTHING)
        with pytest.raises(OutputError):
            failed.result()
