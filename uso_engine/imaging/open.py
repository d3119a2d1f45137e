"""Pictures from wherever callers keep them: files, URLs, data URIs, bytes, file objects, Pillow images, arrays, tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING, BinaryIO, cast

from PIL import Image

from uso_engine.errors import ImageError, ImageTypeError, MissingFileError
from uso_engine.imaging.arrays import array_to_image, tensor_to_image
from uso_engine.imaging.data_uri import decode_data_uri
from uso_engine.imaging.decode import Formats, check_size, decode_image
from uso_engine.imaging.hosts import HostList
from uso_engine.imaging.orientation import UPRIGHT, orientation_of
from uso_engine.imaging.rgb import Alpha, to_rgb
from uso_engine.imaging.source import (
    EXPECTED_SOURCE,
    SCHEME,
    ImageSource,
    describe_source,
    is_array,
    is_image_source,
    is_tensor,
)
from uso_engine.local_names import has_file_scheme, is_local_name, local_name

if TYPE_CHECKING:
    from uso_engine.imaging.decode_pool import DecodePool

__all__ = ["Alpha", "ImageLimits", "ImageSource", "describe_source", "open_image"]

_BLOCK = 2**20


@dataclass(frozen=True)
class ImageLimits:
    """What is accepted as an input picture, and from where.

    Args:
        max_bytes: the most bytes of one encoded picture, wherever it comes from.
        max_pixels: the most pixels (width x height), read from the header before decoding; the default is 8192 x 8192.
        deadline_s: the most seconds that fetching one URL may take in all.
        decode_deadline_s: the most seconds that decoding one picture may take, a net under bounds that hold without a clock.
        allow_http: whether plain ``http`` URLs are fetched besides ``https``.
        allow_private_addresses: whether URLs may lead to this machine and its networks (private, loopback, link-local and every
            other address that is not public). Where strangers choose the URLs, turn this off, or they reach what you reach.
        allow_paths: whether local paths are opened; a server, whose pictures come from strangers, turns this off. Then the
            formats are those of URLs and data URIs, for bytes too.
        private_hosts: hosts that URLs may lead to although their addresses are not public: ``minio.internal``,
            ``minio.internal:9000``, ``*.internal``, ``10.0.0.7``, ``[fd00::7]:9000``.
        allowed_hosts: the only hosts that URLs may lead to, written in the same way, redirects included; None for all.
        decode_pool: processes of their own in which pictures are decoded; None decodes in the caller's thread, where what it
            costs is bounded by the picture's size, and a decoder that does not end cannot be ended.

    Raises:
        ValueError: a limit that is no positive number, a switch that is neither True nor False, or an entry that is no host.
    """

    max_bytes: int = 50 * 2**20
    max_pixels: int = 8192 * 8192
    deadline_s: float = 30.0
    decode_deadline_s: float = 10.0
    allow_http: bool = True
    allow_private_addresses: bool = True
    allow_paths: bool = True
    private_hosts: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] | None = None
    decode_pool: DecodePool | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # Frozen for everyone else.
        for name in ("max_bytes", "max_pixels"):
            set_field(self, name, _whole(name, getattr(self, name)))
        for name in ("deadline_s", "decode_deadline_s"):
            set_field(self, name, _seconds(name, getattr(self, name)))
        for name in ("allow_http", "allow_private_addresses", "allow_paths"):
            if not isinstance(getattr(self, name), bool):  # "no" would be a yes.
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r:.60}")
        set_field(self, "private_hosts", _hosts("private_hosts", self.private_hosts))
        if self.allowed_hosts is not None:
            set_field(self, "allowed_hosts", _hosts("allowed_hosts", self.allowed_hosts))
        if self.decode_pool is not None and not callable(getattr(self.decode_pool, "decode", None)):
            raise ValueError(f"decode_pool must be a DecodePool, got {type(self.decode_pool).__name__}")


def open_image(
    source: ImageSource, *, limits: ImageLimits | None = None, name: str | None = None, alpha: Alpha = "white"
) -> Image.Image:
    """Open a picture and bring it to upright RGB.

    Of files, PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF and HEIC are accepted, by content and not by name; behind URLs and in data
    URIs only the first three. Of an animation or several pages the first is taken; orientation is applied; transparency is laid
    on white. A Pillow image is taken as it stands, whatever it was read from.

    Args:
        source: a path (also with ``~``, and after ``file:``), an http(s) URL, a data URI, the bytes of an encoded picture (also
            as bytearray or memoryview), a binary file object (read from where it stands), a Pillow image (not changed), a numpy
            array [h, w], [h, w, 3] or [h, w, 4], or a torch tensor [h, w], [3, h, w] or [4, h, w]; arrays and tensors hold
            uint8, or floats from 0 to 1.
        limits: what is accepted; ``ImageLimits()`` if left out.
        name: what error messages call the picture, e.g. ``image_urls[0]``; a short description of the source by default.
        alpha: "white" lays transparent pixels on white, "drop" takes their colours as they are stored.

    Returns:
        A new RGB image of at least 1x1 pixels.

    Raises:
        ImageError: not a picture that is accepted; the message says what was expected and what came.
        ImageTypeError: a source of another type; a TypeError as well.
        FetchError: a URL that could not be read within its limits.
        MissingFileError: no file at that path.
        BackendError: HEIC without the ``heif`` extra, or AVIF where Pillow was built without it.
    """
    limits = limits or ImageLimits()
    if not is_image_source(source):
        prefix = "" if name is None else f"{name}: "
        raise ImageTypeError(f"{prefix}{type(source).__name__} is not an image source; expected {EXPECTED_SOURCE}")
    label = describe_source(source) if name is None else f"{name} ({describe_source(source)})"
    orientation = UPRIGHT
    if isinstance(source, Image.Image):
        image = _load_pillow(source, limits, label)
        orientation = orientation_of(source, label=label)
    elif is_array(source):
        image = array_to_image(source, max_pixels=limits.max_pixels, label=label)
    elif is_tensor(source):
        image = tensor_to_image(source, max_pixels=limits.max_pixels, label=label)
    else:
        data = _read(source, limits, label)
        is_from_elsewhere = isinstance(source, str) and not is_local_name(source)
        formats: Formats = "web" if is_from_elsewhere or not limits.allow_paths else "all"
        if limits.decode_pool is not None:
            return limits.decode_pool.decode(
                data,
                max_pixels=limits.max_pixels,
                label=label,
                deadline_s=limits.decode_deadline_s,
                alpha=alpha,
                formats=formats,
            )
        image, orientation = decode_image(
            data, max_pixels=limits.max_pixels, label=label, deadline_s=limits.decode_deadline_s, formats=formats
        )
    return to_rgb(image, label=label, orientation=orientation, alpha=alpha)


def _whole(name: str, value: object) -> int:
    number = cast("float", value)  # Numpy's too, which is what the check says.
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < number < 2**63 or number != int(number):
        raise ValueError(f"{name} must be positive and a whole number, got {value!r:.60}")
    return int(number)


def _seconds(name: str, value: object) -> float:
    number = cast("float", value)
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < number <= TIMEOUT_MAX:
        raise ValueError(f"{name} must be positive and a number of seconds, got {value!r:.60}")
    return float(number)


def _hosts(name: str, entries: object) -> tuple[str, ...]:
    # A name alone would be taken for a list of its letters.
    listed = tuple(entries) if isinstance(entries, Iterable) and not isinstance(entries, (str, bytes)) else (entries,)
    if isinstance(entries, str) or not all(isinstance(entry, str) for entry in listed):
        raise ValueError(f"{name} must be a list of hosts, got {entries!r:.100}")
    HostList(listed)
    return listed


def _read(source: ImageSource, limits: ImageLimits, label: str) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        _check_length(memoryview(source).nbytes, limits, label)
        return bytes(source)
    if isinstance(source, str):
        return _read_text(source, limits, label)
    if isinstance(source, Path):
        return _read_path(source, limits, label)
    return _read_file(cast(BinaryIO, source), limits, label)


def _read_file(file: BinaryIO, limits: ImageLimits, label: str) -> bytes:
    """Read to the end: a pipe, a socket and an unbuffered file give less at a time than they are asked for."""
    data = bytearray()
    while len(data) <= limits.max_bytes:
        try:
            block = file.read(min(_BLOCK, limits.max_bytes + 1 - len(data)))
        except (OSError, ValueError) as error:  # ValueError: a closed file
            raise ImageError(f"{label}: cannot be read: {_reason(error, 'closed or broken')}") from error
        if not isinstance(block, bytes):
            raise ImageError(f"{label}: reading it gives {type(block).__name__}; open the file in binary mode ('rb')")
        if not block:
            break
        data += block
    if not data and _has_passed_something(file):
        raise ImageError(f"{label}: nothing is left after where it stands; go back to its beginning first: .seek(0)")
    _check_length(len(data), limits, label)
    return bytes(data)


def _has_passed_something(file: BinaryIO) -> bool:
    try:
        return file.tell() > 0
    except (AttributeError, OSError, TypeError, ValueError):  # a pipe, or an object that can only be read
        return False


def _read_text(text: str, limits: ImageLimits, label: str) -> bytes:
    if not text:
        raise ImageError("an empty string is no image; expected a path, URL or data URI")
    if text[:5].lower() == "data:":
        return decode_data_uri(text, max_bytes=limits.max_bytes, label=label)
    scheme = SCHEME.match(text)
    if scheme is None or has_file_scheme(text):
        try:
            path = local_name(text)
        except ValueError as error:
            raise ImageError(f"{label}: {error}") from error
        return _read_path(path, limits, label)
    if scheme[1].lower() not in ("http", "https"):
        raise ImageError(f"{label}: {scheme[1].lower()}:// is not opened; expected https://, http://, data: or a path")
    from uso_engine.imaging.fetch import fetch  # httpx takes a quarter of a second to import

    return fetch(
        text,
        max_bytes=limits.max_bytes,
        deadline_s=limits.deadline_s,
        allow_http=limits.allow_http,
        allow_private_addresses=limits.allow_private_addresses,
        private_hosts=HostList(limits.private_hosts),
        allowed_hosts=None if limits.allowed_hosts is None else HostList(limits.allowed_hosts),
    )


def _read_path(path: Path, limits: ImageLimits, label: str) -> bytes:
    if not limits.allow_paths:
        raise ImageError(f"{label}: local paths are not opened here; expected an http(s) URL or a data URI")
    try:
        if not path.exists():
            raise MissingFileError(f"{label}: no such file")
        if not path.is_file():  # a device or a pipe can be endless
            raise ImageError(f"{label}: not a regular file")
        with path.open("rb") as file:
            data = file.read(limits.max_bytes + 1)
    except (ImageError, MissingFileError):
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte or half a surrogate pair in the path
        raise ImageError(f"{label}: cannot be read: {_reason(error, 'not a usable path')}") from error
    _check_length(len(data), limits, label)
    return data


def _reason(error: Exception, otherwise: str) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or otherwise


def _check_length(length: int, limits: ImageLimits, label: str) -> None:
    if length > limits.max_bytes:
        raise ImageError(f"{label}: more than {limits.max_bytes:,} bytes, the most that is accepted for one image")


def _load_pillow(image: Image.Image, limits: ImageLimits, label: str) -> Image.Image:
    check_size(image.size, max_pixels=limits.max_pixels, label=label)
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # a lazily opened file fails only now, with whatever its decoder raises
        raise ImageError(f"{label}: it cannot be loaded; its file is truncated, damaged or closed") from error
    return image
