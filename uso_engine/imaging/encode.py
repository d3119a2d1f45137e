"""Pictures as PNG, JPEG or WebP files, marked as generated, written whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from PIL import ExifTags, Image

from uso_engine.imaging.atomic import write_atomically
from uso_engine.imaging.output_formats import CONTENT_TYPES, OutputFormat, output_format_of

__all__ = ["CONTENT_TYPES", "Encoder", "ImageMetadata", "OutputFormat", "encode_image", "output_format_of", "save_image"]

# An EXIF block is one JPEG segment of at most 65,533 bytes; the rest of the block needs a few hundred.
_JPEG_JSON_BYTES = 64_000
_JPEG_TEXT_CHARACTERS = 1_000


@dataclass(frozen=True)
class ImageMetadata:
    """What a file says about its picture, besides that it was generated.

    Args:
        model: name of the model, for EXIF ``Model``.
        parameters: prompt, seed and whatever else made the picture, as JSON in EXIF ``ImageDescription``; None writes none.
    """

    model: str
    parameters: Mapping[str, object] | None = None


def encode_image(image: Image.Image, output_format: OutputFormat, metadata: ImageMetadata) -> bytes:
    """Encode a picture: PNG at compression level 1 (fast, lossless), JPEG and WebP at quality 95.

    The EXIF block says ``Software: AI generated; uso_engine``, make and model: the base model's licence asks for disclosure.

    Args:
        image: RGB.
        output_format: ``png``, ``jpeg`` or ``webp``.
        metadata: what else the file says.

    Returns:
        The file's bytes.

    Raises:
        ValueError: another format, or parameters that are not JSON.
    """
    if output_format not in CONTENT_TYPES:
        raise ValueError(f"output_format must be one of {', '.join(CONTENT_TYPES)}, got {output_format!r}")
    buffer = io.BytesIO()
    exif = _exif(metadata, output_format)
    if output_format == "png":
        image.save(buffer, format="PNG", compress_level=1, exif=exif)
    else:
        image.save(buffer, format=output_format.upper(), quality=95, exif=exif)
    return buffer.getvalue()


def save_image(image: Image.Image, path: Path, metadata: ImageMetadata) -> Path:
    """Encode a picture in the format its path asks for and write it atomically.

    Args:
        image: RGB.
        path: ends in .png, .jpg, .jpeg or .webp; its folder is made if it is not there.
        metadata: what the file says.

    Returns:
        The path.

    Raises:
        ValueError: another ending.
        OutputError: it cannot be written; nothing half-written is left.
    """
    data = encode_image(image, output_format_of(path), metadata)
    write_atomically(path, data)
    return path


class Encoder:
    """Encodes in threads of its own, so that the thread that drives the GPU does not wait. Pillow releases the GIL meanwhile.

    Args:
        workers: threads.
    """

    def __init__(self, workers: int = 2) -> None:
        self._threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="encode")

    def encode(self, image: Image.Image, output_format: OutputFormat, metadata: ImageMetadata) -> Future[bytes]:
        """:func:`encode_image`, later."""
        return self._threads.submit(encode_image, image, output_format, metadata)

    def save(self, image: Image.Image, path: Path, metadata: ImageMetadata) -> Future[Path]:
        """:func:`save_image`, later; a wrong ending is refused now."""
        output_format_of(path)
        return self._threads.submit(save_image, image, path, metadata)

    def close(self) -> None:
        """Finish what was begun and end the threads."""
        self._threads.shutdown(wait=True)

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _exif(metadata: ImageMetadata, output_format: OutputFormat) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = "AI generated; uso_engine"
    exif[ExifTags.Base.Make] = "uso_engine"
    exif[ExifTags.Base.Model] = metadata.model
    if metadata.parameters is not None:
        # EXIF text is ASCII, so other characters travel as JSON escapes.
        text = json.dumps(dict(metadata.parameters), ensure_ascii=True)
        if output_format == "jpeg" and len(text) > _JPEG_JSON_BYTES:
            short = {key: _cut(value) for key, value in metadata.parameters.items()}
            text = json.dumps(short, ensure_ascii=True)
        exif[ExifTags.Base.ImageDescription] = text
    return exif


def _cut(value: object) -> object:
    if isinstance(value, str) and len(value) > _JPEG_TEXT_CHARACTERS:
        return value[:_JPEG_TEXT_CHARACTERS] + "…"
    return value
