"""Boxes of an AVIF or HEIC file: its items, their properties and where their bytes are (ISO/IEC 14496-12 and 23008-12)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_BOXES = 10_000
MAX_ITEMS = 4096
"""Photographs are in some hundred tiles."""
MAX_META_BYTES = 2**20
MAX_EXTENTS = 100_000


@dataclass
class Item:
    """One item of a container.

    Args:
        kind: four letters, such as ``av01``, ``hvc1`` or ``grid``.
        kind_at: where in the file they stand.
        extents: start and length of its bytes in the file, in order.
        properties: names and bodies, in order.
    """

    kind: bytes
    kind_at: int
    extents: list[tuple[int, int]] = field(default_factory=list)
    properties: list[tuple[bytes, bytes]] = field(default_factory=list)

    def all_of(self, name: bytes) -> list[bytes]:
        """Bodies of all properties of a name."""
        return [body for found, body in self.properties if found == name]


@dataclass(frozen=True)
class Container:
    """What a file's ``ftyp`` and ``meta`` boxes say.

    Args:
        brands: start and end of the names in ``ftyp``.
        others: where the names stand of top-level boxes that a still picture does not need.
        primary: the item that is the picture.
        items: by number.
        references: kind, from, to.
    """

    brands: tuple[int, int]
    others: list[int]
    primary: int
    items: dict[int, Item]
    references: list[tuple[bytes, int, list[int]]]

    def targets(self, kind: bytes, source: int) -> list[int]:
        """The items that an item refers to."""
        return [target for found, start, targets in self.references if (found, start) == (kind, source) for target in targets]

    def sources(self, kind: bytes, target: int) -> list[int]:
        """The items that refer to an item."""
        return [start for found, start, targets in self.references if found == kind and target in targets]


def read_container(data: bytes) -> Container:
    """Read the boxes of a file.

    Raises:
        EOFError: a box breaks off.
        ValueError: broken rules, or more boxes, items or bytes of description than are accepted.
    """
    brands, meta, others = (0, 0), None, []
    for name, name_at, start, end in _boxes(data, 0, len(data)):
        if name == b"ftyp" and brands == (0, 0):
            brands = (start, end)
        elif name == b"meta" and meta is None:
            meta = (start, end)
        elif name != b"mdat":
            others.append(name_at)
    if meta is None:
        raise ValueError("no still picture")
    if meta[1] - meta[0] > MAX_META_BYTES:
        raise ValueError(f"a description of {meta[1] - meta[0]:,} bytes; at most {MAX_META_BYTES:,} are read")
    parts: dict[bytes, tuple[int, int]] = {}
    for name, _, start, end in _boxes(data, meta[0] + 4, meta[1]):
        if name in parts:
            raise ValueError(f"two {name!r} boxes")
        parts[name] = (start, end)
    missing = [name.decode() for name in (b"pitm", b"iinf", b"iloc", b"iprp") if name not in parts]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    items = _items(data, *parts[b"iinf"])
    _locate(data, parts[b"iloc"], parts.get(b"idat", (0, 0)), items)
    _describe(data, parts[b"iprp"], items)
    at, version = parts[b"pitm"][0], _number(data, parts[b"pitm"][0], 1)
    primary = _number(data, at + 4, 4 if version else 2)
    if primary not in items:
        raise ValueError("the picture's item is not there")
    return Container(brands, others, primary, items, _references(data, *parts.get(b"iref", (0, 0))))


def _number(data: bytes, at: int, count: int) -> int:
    if at + count > len(data):
        raise EOFError
    return int.from_bytes(data[at : at + count])


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int, int]]:
    """Name, where the name stands, start and end of the body, of each box between two places."""
    for _ in range(MAX_BOXES):
        if at >= end:
            return
        size, name, start = _number(data, at, 4), data[at + 4 : at + 8], at + 8
        if size == 1:
            size, start = _number(data, at + 8, 8), at + 16
        elif size == 0:  # to the end of the file
            size = end - at
        if at + size > end or at + size < start:
            raise EOFError
        yield name, at + 4, start, at + size
        at += size
    raise ValueError(f"more than {MAX_BOXES:,} boxes")


def _items(data: bytes, start: int, end: int) -> dict[int, Item]:
    items: dict[int, Item] = {}
    first = start + (6 if _number(data, start, 1) == 0 else 8)
    for name, _, at, _ in _boxes(data, first, end):
        version = _number(data, at, 1)
        if name != b"infe" or version not in (2, 3):
            raise ValueError(f"an item's entry {name!r} of version {version}")
        id_bytes = 2 if version == 2 else 4
        number, kind_at = _number(data, at + 4, id_bytes), at + 6 + id_bytes
        if number in items or len(items) == MAX_ITEMS:
            raise ValueError(f"two items of one number, or more than {MAX_ITEMS:,}")
        items[number] = Item(_number(data, kind_at, 4).to_bytes(4), kind_at)
    return items


def _locate(data: bytes, place: tuple[int, int], idat: tuple[int, int], items: dict[int, Item]) -> None:
    """Give every item its extents, which must lie within the file and together be no longer than it."""
    at, extents_left, bytes_left = place[0], MAX_EXTENTS, len(data)
    version, sizes = _number(data, at, 1), _number(data, at + 4, 2)
    offset_bytes, length_bytes, base_bytes = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
    index_bytes = sizes & 15 if version else 0
    id_bytes = 2 if version < 2 else 4
    count, at = _number(data, at + 6, id_bytes), at + 6 + id_bytes
    if count > MAX_ITEMS:
        raise ValueError(f"{count:,} items; at most {MAX_ITEMS:,} are read")
    for _ in range(count):
        number, at = _number(data, at, id_bytes), at + id_bytes
        method, at = (_number(data, at, 2) & 15, at + 2) if version else (0, at)
        base, at = _number(data, at + 2, base_bytes), at + 2 + base_bytes
        extent_count, at = _number(data, at, 2), at + 2
        extents_left -= extent_count
        if extents_left < 0 or method not in (0, 1) or number not in items or items[number].extents:
            raise ValueError("an item whose place in the file is not read")
        origin, limit = (0, len(data)) if method == 0 else idat
        for _ in range(extent_count):
            offset, at = _number(data, at + index_bytes, offset_bytes), at + index_bytes + offset_bytes
            length, at = _number(data, at, length_bytes), at + length_bytes
            first = origin + base + offset
            length = length or limit - first
            bytes_left -= length
            if not first <= first + length <= limit or bytes_left < 0:
                raise ValueError("items beyond the file's end, or longer together than the file")
            items[number].extents.append((first, length))


def _describe(data: bytes, place: tuple[int, int], items: dict[int, Item]) -> None:
    """Give every item its properties."""
    bodies: list[tuple[bytes, bytes]] = []
    links: list[tuple[int, int]] = []
    for name, _, start, end in _boxes(data, *place):
        if name == b"ipco":
            bodies += [(kind, data[first:last]) for kind, _, first, last in _boxes(data, start, end)]
        elif name == b"ipma":
            links.append((start, end))
    for at, _ in links:
        version, flags = _number(data, at, 1), _number(data, at + 1, 3)
        id_bytes, index_bytes = (4 if version else 2), (2 if flags & 1 else 1)
        count, at = _number(data, at + 4, 4), at + 8
        if count > MAX_ITEMS:
            raise ValueError(f"properties of {count:,} items; at most {MAX_ITEMS:,} are read")
        for _ in range(count):
            number, linked, at = _number(data, at, id_bytes), _number(data, at + id_bytes, 1), at + id_bytes + 1
            for _ in range(linked):
                index, at = _number(data, at, index_bytes) & (0x7FFF if index_bytes == 2 else 0x7F), at + index_bytes
                if index and index <= len(bodies) and number in items:
                    items[number].properties.append(bodies[index - 1])


def _references(data: bytes, start: int, end: int) -> list[tuple[bytes, int, list[int]]]:
    if start == end:
        return []
    id_bytes = 2 if _number(data, start, 1) == 0 else 4
    found = []
    for name, _, at, _ in _boxes(data, start + 4, end):
        source, count = _number(data, at, id_bytes), _number(data, at + id_bytes, 2)
        at += id_bytes + 2
        found.append((name, source, [_number(data, at + i * id_bytes, id_bytes) for i in range(count)]))
    return found
