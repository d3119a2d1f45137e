"""Where a command's results go, and whether they can go there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from uso_engine.errors import OutputError
from uso_engine.imaging.output_formats import CONTENT_TYPES, ENDINGS, SUFFIXES
from uso_engine.local_names import is_local_name, local_name

_ENDING_OF = {name: suffix for suffix, name in reversed(SUFFIXES.items())}


@dataclass(frozen=True)
class Outputs:
    """Where a request's results go.

    Args:
        image: path of the image; several get -0, -1 … before the ending.
        sheet: path of the contact sheet, if one is wanted.
        response: whether the response as JSON is written beside the image.
        parameters: whether the files say what made them.
    """

    image: Path
    sheet: Path | None = None
    response: bool = False
    parameters: bool = False

    @property
    def response_path(self) -> Path:
        """Path of the response as JSON."""
        return self.image.with_suffix(".json")

    def of_line(self, number: int, output_format: object) -> Outputs:
        """Those of one line of a batch, counted from 0: numbered, with an ending that fits the line's format."""
        suffix = self.image.suffix
        for name in CONTENT_TYPES:
            if output_format == name and SUFFIXES.get(suffix.lower()) != name:
                suffix = _ENDING_OF[name]
        image = self.image.with_name(f"{self.image.stem}-{number + 1:04d}{suffix}")
        sheet = None if self.sheet is None else self.sheet.with_stem(f"{self.sheet.stem}-{number + 1:04d}")
        return replace(self, image=image, sheet=sheet)

    def files(self, num_images: object) -> list[Path]:
        """Every file that a request with so many images writes."""
        count = int(num_images) if num_images in (2, 3, 4) else 1  # 2.0 is 2 in JSON
        names = [self.image] if count == 1 else [self.image.with_stem(f"{self.image.stem}-{j}") for j in range(count)]
        names += [] if self.sheet is None else [self.sheet]
        return [*names, *([self.response_path] if self.response else [])]


def hosted_format(path: Path) -> str | None:
    """What a request says of its format: PNG or JPEG by the file's ending; WebP files are written without a word in it."""
    name = SUFFIXES.get(path.suffix.lower())
    return None if name == "webp" else name


def named_output(output: Path | None, format_: str | None) -> Path:
    """Where to write, from a name and a format that may each be left out.

    Args:
        output: as given; without an ending it gets the format's.
        format_: an ending without its dot, such as ``jpg``.

    Returns:
        The path; ``out.png`` if neither is given.

    Raises:
        ValueError: no format, or another one than the name's.
    """
    suffix = ".png" if format_ is None else f".{format_.lower()}"
    if suffix not in SUFFIXES:
        raise ValueError(f"--format takes png, jpg, jpeg or webp, got {format_!r}")
    path = Path("out") if output is None else output
    if path.suffix == "" and path.name and (output is None or format_ is not None):
        return path.with_name(path.name + suffix)
    if format_ is not None and SUFFIXES.get(path.suffix.lower()) not in (None, SUFFIXES[suffix]):
        raise ValueError(f"--format {format_} contradicts the name {path}, which ends in {path.suffix}; give one of them")
    return path


def check_outputs(
    outputs: Outputs, requests: Sequence[tuple[Outputs, Mapping[str, object]]], *, read: Path | None = None
) -> None:
    """Find out before minutes of work whether every result can be written without another being lost.

    Args:
        outputs: as asked for.
        requests: each request's outputs and fields.
        read: the file of requests, which must not be overwritten either.

    Raises:
        ValueError: an ending that names no format, two results of one name, or a sheet in the place of a request's picture.
        OutputError: a folder that is not there or not writable, or a result's name that is a folder's.
    """
    for path in (outputs.image, *([] if outputs.sheet is None else [outputs.sheet])):
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path}: expected a name that ends in {ENDINGS}")
        check_writable(path)
    written = [path for target, fields in requests for path in target.files(fields.get("num_images"))]
    for path in written:
        check_writable(path)
    places = Counter(path.parent.resolve() / path.name for path in [*written, *([] if read is None else [read])])
    sheets = {target.sheet.resolve(): target.sheet for target, _ in requests if target.sheet is not None}
    for _, fields in requests:
        for source in input_files(fields):
            if source.resolve() in sheets:
                raise ValueError(
                    f"--contact-sheet {sheets[source.resolve()]} would overwrite the picture {source}; name another file"
                )
    twice = [str(place) for place, count in places.items() if count > 1]
    if twice:
        raise ValueError(
            f"more than one file would be named {', '.join(twice)}; "
            "give --output and --contact-sheet names that stay different with -0, -1 … for several images, .json for responses"
        )


def input_files(fields: Mapping[str, object]) -> Iterator[Path]:
    """The pictures of a request that are files of this machine."""
    sources = fields.get("images", fields.get("image_urls"))
    for source in sources if isinstance(sources, (list, tuple)) else ():
        if isinstance(source, str) and is_local_name(source):
            with suppress(ValueError):  # a name that is none is refused where it is opened
                yield local_name(source)


def check_writable(path: Path) -> None:
    """Check that a file can be written.

    Raises:
        OutputError: its folder is not there or not writable, or the name is a folder's.
    """
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {folder}")
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {path}: {'it is a folder' if path.is_dir() else f'{folder} is not writable'}")


def make_folder(folder: Path) -> None:
    """Make the folder that a command writes to, before its work.

    Raises:
        OutputError: it cannot be made or is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write to {folder}: it is not writable")
