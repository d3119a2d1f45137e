"""Pictures from wherever callers keep them: files, URLs, data URIs, bytes, file objects, Pillow images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from uso_engine.errors import ImageError, ImageTypeError, MissingFileError
from uso_engine.imaging.data_uri import decode_data_uri
from uso_engine.imaging.decode import check_size, decode_image
from uso_engine.imaging.rgb import to_rgb
from uso_engine.imaging.source import SCHEME, ImageSource, describe_source

__all__ = ["ImageLimits", "ImageSource", "describe_source", "open_image"]


@dataclass(frozen=True)
class ImageLimits:
    """What is accepted as an input picture.

    Args:
        max_bytes: the most bytes of one encoded picture, wherever it comes from.
        max_pixels: the most pixels (width x height), read from the header before decoding; the default is 8192 x 8192.
        deadline_s: the most seconds that fetching one URL may take in all.
        allow_http: whether plain ``http`` URLs are fetched besides ``https``.
        allow_paths: whether local paths are opened; a server, whose strings come from strangers, turns this off.

    Raises:
        ValueError: a limit that is not positive.
    """

    max_bytes: int = 50 * 2**20
    max_pixels: int = 8192 * 8192
    deadline_s: float = 30.0
    allow_http: bool = True
    allow_paths: bool = True

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "deadline_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def open_image(source: ImageSource, *, limits: ImageLimits | None = None, name: str | None = None) -> Image.Image:
    """Open a picture and bring it to upright RGB.

    Only PNG, JPEG and WebP are accepted, by content and not by name; of an animation the first frame is taken; EXIF orientation
    is applied; transparency is laid on white. A Pillow image is taken as it stands, whatever it was read from.

    Args:
        source: a path, an http(s) URL, a data URI, the bytes of an encoded picture, a binary file object (read from where it
            stands), or a Pillow image (not changed).
        limits: what is accepted; ``ImageLimits()`` if left out.
        name: what error messages call the picture, e.g. ``image_urls[0]``; a short description of the source by default.

    Returns:
        A new RGB image of at least 1x1 pixels.

    Raises:
        ImageError: not a picture that is accepted; the message says what was expected and what came.
        FetchError: a URL that could not be read within its limits.
        MissingFileError: no file at that path.
        TypeError: a source of another type.
    """
    limits = limits or ImageLimits()
    label = describe_source(source) if name is None else f"{name} ({describe_source(source)})"
    if isinstance(source, Image.Image):
        image = _load_pillow(source, limits, label)
    else:
        image = decode_image(_read(source, limits, label), max_pixels=limits.max_pixels, label=label)
    return to_rgb(image, label=label)


def _read(source: ImageSource, limits: ImageLimits, label: str) -> bytes:
    if isinstance(source, bytes):
        return _within(source, limits, label)
    if isinstance(source, str):
        return _read_text(source, limits, label)
    if isinstance(source, Path):
        return _read_path(source, limits, label)
    if isinstance(source, (bytearray, memoryview)):
        return _within(bytes(source), limits, label)
    if isinstance(source, Image.Image) or not hasattr(source, "read"):
        raise ImageTypeError(
            f"{type(source).__name__} is not an image source; expected a path, URL, data URI, bytes, binary file or PIL image"
        )
    data = source.read(limits.max_bytes + 1)
    if not isinstance(data, bytes):
        raise ImageError(f"{label}: reading it gives {type(data).__name__}; open the file in binary mode ('rb')")
    return _within(data, limits, label)


def _read_text(text: str, limits: ImageLimits, label: str) -> bytes:
    if not text:
        raise ImageError("an empty string is no image; expected a path, URL or data URI")
    if text[:5].lower() == "data:":
        return decode_data_uri(text, max_bytes=limits.max_bytes, label=label)
    scheme = SCHEME.match(text)
    if scheme is None:
        return _read_path(Path(text), limits, label)
    if scheme[1].lower() not in ("http", "https"):
        raise ImageError(f"{label}: {scheme[1].lower()}:// is not opened; expected https://, http://, data: or a path")
    from uso_engine.imaging.fetch import fetch  # httpx takes a quarter of a second to import

    return fetch(text, max_bytes=limits.max_bytes, deadline_s=limits.deadline_s, allow_http=limits.allow_http)


def _read_path(path: Path, limits: ImageLimits, label: str) -> bytes:
    if not limits.allow_paths:
        raise ImageError(f"{label}: local paths are not opened here; expected an http(s) URL or a data URI")
    try:
        if not path.exists():
            raise MissingFileError(f"{label}: no such file")
        if not path.is_file():  # a device or a pipe can be endless
            raise ImageError(f"{label}: not a regular file")
        with path.open("rb") as file:
            return _within(file.read(limits.max_bytes + 1), limits, label)
    except (ImageError, MissingFileError):
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a usable path"
        raise ImageError(f"{label}: cannot be read: {reason}") from error


def _within(data: bytes, limits: ImageLimits, label: str) -> bytes:
    if len(data) > limits.max_bytes:
        raise ImageError(f"{label}: more than {limits.max_bytes:,} bytes, the most that is accepted for one image")
    return data


def _load_pillow(image: Image.Image, limits: ImageLimits, label: str) -> Image.Image:
    check_size(image.size, max_pixels=limits.max_pixels, label=label)
    try:
        image.load()
    except Exception as error:  # a lazily opened file fails only now, with whatever its decoder raises
        raise ImageError(f"{label}: it cannot be loaded; its file is truncated, damaged or closed") from error
    return image
