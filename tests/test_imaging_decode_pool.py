"""Decoding in processes of their own: the same pixels, and an end to decoders that hang, crash or fill memory."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from picture_files import encoded, heic
from PIL import Image

from uso_engine.errors import BackendError, ImageError
from uso_engine.imaging import decode_worker
from uso_engine.imaging.decode_pool import DecodePool
from uso_engine.imaging.open import Alpha, ImageLimits, open_image


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with DecodePool(1) as running:
        yield running


def process_ids(pool: DecodePool) -> list[int]:
    return [process._process.pid for process in pool._running]


def pictures() -> dict[str, bytes]:
    random = np.random.default_rng(3)
    colours = Image.fromarray(random.integers(0, 256, (37, 51, 4), dtype=np.uint8), "RGBA")
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "transparent PNG": encoded(colours),
        "turned JPEG": encoded(colours.convert("RGB"), "JPEG", exif=turned),
        "WebP": encoded(colours, "WEBP"),
        "16-bit grey": encoded(Image.fromarray(random.integers(0, 65536, (20, 30), dtype=np.uint16))),
        "ink": encoded(colours.convert("CMYK"), "JPEG"),
        "GIF": encoded(colours.quantize(9), "GIF"),
        "TIFF": encoded(colours, "TIFF", compression="tiff_lzw"),
        "AVIF": encoded(colours, "AVIF"),
        "HEIC": heic(colours),
    }


@pytest.mark.parametrize("name", list(pictures()))
@pytest.mark.parametrize("alpha", ["white", "drop"])
def test_the_pixels_are_those_of_this_process(pool: DecodePool, name: str, alpha: Alpha) -> None:
    data = pictures()[name]
    here, there = (open_image(data, alpha=alpha, limits=limits) for limits in (ImageLimits(), ImageLimits(decode_pool=pool)))
    assert (there.mode, there.size) == (here.mode, here.size)
    assert there.tobytes() == here.tobytes()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GIF89a", "image_urls[0] (6 bytes): the GIF image is truncated or damaged"),
        ("data:;base64,R0lGODlh", "image_urls[0] (data URI of 21 characters): a GIF image; expected PNG, JPEG or WebP"),
        (b"", "image_urls[0] (0 bytes): empty (0 bytes); expected PNG, JPEG"),
        (encoded(Image.new("RGB", (40, 30)))[:60], "image_urls[0] (60 bytes): the PNG image"),
        (encoded(Image.new("RGB", (40, 30))), "40x30 is 1,200 pixels; at most 1,199 are accepted"),
    ],
)
def test_refusals_are_those_of_this_process(pool: DecodePool, data: bytes | str, says: str) -> None:
    texts = []
    for limits in (ImageLimits(max_pixels=1199), ImageLimits(max_pixels=1199, decode_pool=pool)):
        with pytest.raises(ImageError) as caught:
            open_image(data, name="image_urls[0]", limits=limits)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert says in texts[1]


def test_a_decoder_that_does_not_end_is_ended(pool: DecodePool) -> None:
    """A stopped process stands for a decoder in an endless loop: it answers nothing, and only a kill ends it."""
    data = encoded(Image.new("RGB", (8, 8), "red"))
    pool.decode(data, max_pixels=64, label="warm")
    (stopped,) = process_ids(pool)
    os.kill(stopped, signal.SIGSTOP)
    with pytest.raises(ImageError, match=r"^picture: decoding it took longer than 0\.2 s$"):
        pool.decode(data, max_pixels=64, label="picture", deadline_s=0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(stopped, 0)
    assert pool.decode(data, max_pixels=64, label="the next").getpixel((0, 0)) == (255, 0, 0)


def test_a_decoder_that_crashes_takes_one_picture_with_it(pool: DecodePool) -> None:
    data = encoded(Image.new("RGB", (8, 8), "red"))
    pool.decode(data, max_pixels=64, label="warm")
    os.kill(process_ids(pool)[0], signal.SIGKILL)
    with pytest.raises(ImageError, match=r"^picture: its decoder crashed$"):
        pool.decode(data, max_pixels=64, label="picture")
    assert pool.decode(data, max_pixels=64, label="the next").size == (8, 8)


def test_a_picture_that_fills_memory_is_an_answer() -> None:
    """64 megapixels of one colour, which is transparent: 300 KB of file, half a GiB and more to lay it on white."""
    bomb = encoded(Image.new("P", (8192, 8192)), compress_level=1, transparency=b"\x09")
    assert len(bomb) < 300_000
    with DecodePool(1, memory_bytes=512 * 2**20) as small:
        with pytest.raises(ImageError, match=r"^bomb: decoding it needs more than 512 MiB$"):
            small.decode(bomb, max_pixels=8192 * 8192, label="bomb", deadline_s=60)
        assert small.decode(encoded(Image.new("L", (5, 4))), max_pixels=64, label="the next").size == (5, 4)


def test_processes_know_nothing_of_this_ones_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USO_API_KEYS", "secret-of-the-server")
    with DecodePool(1) as pool:
        pool.decode(encoded(Image.new("L", (5, 4))), max_pixels=64, label="warm")
        with open(f"/proc/{process_ids(pool)[0]}/environ", "rb") as environment:  # noqa: PTH123 - a device-like file
            assert b"secret-of-the-server" not in environment.read()


def test_a_library_that_is_missing_there_is_named_here(monkeypatch: pytest.MonkeyPatch) -> None:
    avif = encoded(Image.new("RGB", (8, 8)), "AVIF")
    monkeypatch.setattr("uso_engine.imaging.decode.features.check", lambda name: False)
    job = {"memory_bytes": 2**30, "max_pixels": 64, "label": "a", "deadline_s": 9.0, "alpha": "white", "formats": "all"}
    head, _ = decode_worker._answer(avif, **job)  # type: ignore[arg-type]
    monkeypatch.setattr("uso_engine.imaging.decode_pool._Process._read_line", lambda *arguments: json.dumps(head).encode())
    with DecodePool(1) as other, pytest.raises(BackendError, match="a Pillow that was built with libavif"):
        other.decode(avif, max_pixels=64, label="a")


def test_no_more_processes_than_asked_for_and_every_caller_is_served(pool: DecodePool) -> None:
    data = encoded(Image.new("RGB", (300, 300), "blue"))
    sizes: list[tuple[int, int]] = []
    threads = [
        threading.Thread(target=lambda: sizes.append(pool.decode(data, max_pixels=90_000, label="one of many").size))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [(300, 300)] * 8
    assert len(process_ids(pool)) == 1


def test_closing_ends_those_at_work_and_refuses_others() -> None:
    pool = DecodePool(1)
    data = encoded(Image.new("RGB", (8, 8)))
    pool.decode(data, max_pixels=64, label="warm")
    (worker,) = process_ids(pool)
    os.kill(worker, signal.SIGSTOP)
    said: list[str] = []

    def decode() -> None:
        with pytest.raises(ImageError) as caught:
            pool.decode(data, max_pixels=64, label="at work", deadline_s=60)
        said.append(str(caught.value))

    thread = threading.Thread(target=decode)
    thread.start()
    while not pool._idle.empty():  # until the thread has taken the process
        thread.join(0.001)
    pool.close()
    thread.join()
    assert said == ["at work: its decoder crashed"]
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    with pytest.raises(ValueError, match="closed"):
        pool.decode(data, max_pixels=64, label="late")
    pool.close()


@pytest.mark.parametrize(("options", "says"), [({"processes": 0}, "at least 1, got 0"), ({"memory_bytes": 1}, "got 1")])
def test_bounds_that_cannot_be(options: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DecodePool(**options)
