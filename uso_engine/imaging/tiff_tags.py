"""TIFF directories: the entries that a picture's pixels need, read with bounds and written back (TIFF 6.0; BigTIFF)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from uso_engine.imaging.encoded import damaged

KIND, WIDTH, HEIGHT, BITS, COMPRESSION, COLOUR, FILL_ORDER = 254, 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, ORIENTATION, SAMPLES, STRIP_ROWS, STRIP_COUNTS, PLANES = 273, 274, 277, 278, 279, 284
PREDICTOR, PALETTE, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS = 317, 320, 322, 323, 324, 325
INKS, EXTRA, FORMAT, DNG_VERSION = 332, 338, 339, 50706

KEPT = (
    WIDTH,
    HEIGHT,
    BITS,
    COMPRESSION,
    COLOUR,
    SAMPLES,
    STRIP_ROWS,
    PLANES,
    PREDICTOR,
    PALETTE,
    TILE_WIDTH,
    TILE_HEIGHT,
    EXTRA,
)
"""What a decoder is shown, besides where the pixels are."""
MAX_VALUES = 200_000
"""The most numbers of one entry: a strip for each row of the tallest picture takes 65,536."""
_READ = {
    *KEPT,
    KIND,
    FILL_ORDER,
    STRIP_OFFSETS,
    ORIENTATION,
    STRIP_COUNTS,
    TILE_OFFSETS,
    TILE_COUNTS,
    INKS,
    FORMAT,
    DNG_VERSION,
}
_LONG = {WIDTH, HEIGHT, STRIP_OFFSETS, STRIP_ROWS, STRIP_COUNTS, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS}
_CODES = {1: "B", 3: "H", 4: "I", 16: "Q"}


@dataclass(frozen=True)
class Directory:
    """The entries of one picture, each a row of whole numbers.

    Args:
        order: "<" or ">", the byte order of the file and of its 16-bit samples.
        values: numbers by the entry's code.
        label: what error messages call the picture.
    """

    order: str
    values: Mapping[int, tuple[int, ...]]
    label: str

    def has(self, code: int) -> bool:
        """Whether there is such an entry."""
        return code in self.values

    def one(self, code: int, default: int | None = None) -> int:
        """The first number of an entry.

        Raises:
            ImageError: there is none, and no default.
        """
        found = self.values.get(code)
        if found:
            return found[0]
        if default is None:
            raise damaged(self.label, "TIFF", f"it has no entry {code}")
        return default

    def many(self, code: int, default: tuple[int, ...]) -> tuple[int, ...]:
        """All numbers of an entry."""
        return self.values.get(code, default)


def read_directory(data: bytes, *, label: str) -> Directory:
    """Read the first directory; later ones, and those within entries, are not followed.

    Args:
        data: a TIFF or BigTIFF file.
        label: what error messages call the picture.

    Raises:
        ImageError: entries outside the file, of a type that holds no whole numbers, or of more than ``MAX_VALUES`` numbers.
    """
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    count_code, offset_code, entry_bytes = ("Q", "Q", 20) if big else ("H", "I", 12)
    inline = struct.calcsize(f"={offset_code}")
    values: dict[int, tuple[int, ...]] = {}
    try:
        if big and struct.unpack_from(f"{order}HH", data, 4) != (8, 0):
            raise damaged(label, "TIFF", "a BigTIFF header whose offsets are not of 8 bytes")
        (start,) = struct.unpack_from(f"{order}{offset_code}", data, 8 if big else 4)
        (count,) = struct.unpack_from(f"{order}{count_code}", data, start)
        if count > 4096:
            raise damaged(label, "TIFF", f"{count:,} entries in a directory")
        start += struct.calcsize(f"={count_code}")
        for at in range(start, start + count * entry_bytes, entry_bytes):
            code, kind, length = struct.unpack_from(f"{order}HH{offset_code}", data, at)
            if code not in _READ:
                continue
            if kind not in _CODES or not 1 <= length <= MAX_VALUES:
                raise damaged(label, "TIFF", f"entry {code} has {length:,} values of type {kind}")
            place = at + entry_bytes - inline
            if length * struct.calcsize(f"={_CODES[kind]}") > inline:
                (place,) = struct.unpack_from(f"{order}{offset_code}", data, place)
            values.setdefault(code, struct.unpack_from(f"{order}{length}{_CODES[kind]}", data, place))
    except (struct.error, OverflowError) as error:
        raise damaged(label, "TIFF", "it breaks off within its directory") from error
    return Directory(order, values, label)


def written_bytes(values: Mapping[int, tuple[int, ...]]) -> int:
    """How many bytes ``write_directory`` makes of these entries."""
    return len(write_directory("<", values))


def write_directory(order: str, values: Mapping[int, tuple[int, ...]]) -> bytes:
    """Write a TIFF file up to where its pixels begin.

    Args:
        order: "<" or ">".
        values: what the only directory says.
    """
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(values))
    behind = len(head) + 12 * len(values) + 4
    entries, arrays = [], b""
    for code in sorted(values):
        kind = 4 if code in _LONG else 3
        body = struct.pack(f"{order}{len(values[code])}{_CODES[kind]}", *values[code])
        if len(body) > 4:
            place, arrays = struct.pack(f"{order}I", behind + len(arrays)), arrays + body + bytes(len(body) % 2)
        else:
            place = body.ljust(4, b"\0")
        entries.append(struct.pack(f"{order}HHI", code, kind, len(values[code])) + place)
    return head + b"".join(entries) + bytes(4) + arrays
