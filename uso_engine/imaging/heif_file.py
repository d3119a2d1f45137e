"""AVIF and HEIC files: the still picture, its sizes read before a decoder is made (AV1 Image File Format; ISO/IEC 23008-12)."""

from __future__ import annotations

import math

from uso_engine.errors import ImageError
from uso_engine.imaging.av1_stream import examine_av1
from uso_engine.imaging.encoded import EncodedPicture, damaged
from uso_engine.imaging.heif_boxes import Container, Item, read_container
from uso_engine.imaging.hevc_stream import examine_hevc

BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""What follows ``ftyp`` in files that are looked into; the items decide what they are."""
MAX_TILES = 4096

_SEQUENCES = {b"avis": b"avif", b"msf1": b"mif1", b"hevc": b"heic", b"hevx": b"heix"}
_CODED = (b"av01", b"hvc1")
_ALPHA = (b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha", b"urn:mpeg:hevc:2015:auxid:1")
_SLACK_PIXELS = 2**16
_PADDING = 64
"""HEVC codes whole blocks of at most 64x64 pixels and crops."""
# Quarter turns against the clock, then a mirror (1 swaps left and right, 0 top and bottom) -> EXIF orientation.
_ORIENTATIONS = {(0, 1): 2, (0, 0): 4, (1, None): 8, (2, None): 3, (3, None): 6}
_ORIENTATIONS |= {(1, 0): 5, (1, 1): 7, (2, 0): 2, (2, 1): 4, (3, 0): 7, (3, 1): 5}


def is_hevc(picture: EncodedPicture) -> bool:
    """Whether a picture that ``strip_heif`` made is HEIC's; else it is AVIF's."""
    return b"hvc1" in picture.data[: picture.data.find(b"mdat")]


def strip_heif(data: bytes, *, label: str) -> EncodedPicture:
    """Keep the picture, its tiles and its transparency; hide everything else from the decoder: films, previews, metadata.

    Every stream that is kept has one frame, whose size is the one that its item names, and all of them together have at most
    four times as many pixels as the picture.

    Args:
        data: has ``ftyp`` at byte 4.
        label: what error messages call the picture.

    Returns:
        The file with what is not needed renamed, so that everything stays in its place.

    Raises:
        ImageError: broken rules, or a picture that is neither AV1's nor HEVC's.
    """
    try:
        container = read_container(data)
        kept = _kept(container, label)
        size = _size(container.items[container.primary])
        coded = 0
        kinds = {container.items[number].kind for number in kept}
        for number in kept:
            coded += _coded_pixels(container.items[number], data)
        if coded > 4 * size[0] * size[1] + _SLACK_PIXELS * len(kept):
            raise ValueError(f"{coded:,} pixels in {len(kept):,} items for {size[0]}x{size[1]} pixels")
    except EOFError as error:
        raise damaged(label, _name(data), "it breaks off within a header") from error
    except ValueError as error:
        if isinstance(error, ImageError):
            raise
        raise damaged(label, _name(data), str(error)) from error
    if len(kinds & {*_CODED}) != 1:
        raise damaged(label, _name(data), "streams of several kinds")
    orientation = _orientation(container.items[container.primary]) if b"av01" in kinds else 1
    return EncodedPicture(_without_the_rest(data, container, kept), size, orientation=orientation)


def _name(data: bytes) -> str:
    return "AVIF" if data[8:11] == b"avi" else "HEIC"


def _kept(container: Container, label: str) -> set[int]:
    """The numbers of the items that make the picture."""
    wanted = [container.primary, *_alpha_items(container)]
    kept: set[int] = set()
    for number in wanted:
        item = container.items[number]
        kept.add(number)
        if item.kind == b"grid":
            tiles = container.targets(b"dimg", number)
            kinds = {container.items[tile].kind if tile in container.items else b"" for tile in tiles}
            if not 1 <= len(tiles) <= MAX_TILES or not kinds <= {*_CODED}:
                raise ValueError(f"a grid of {len(tiles):,} tiles that are not all coded pictures")
            kept.update(tiles)
        elif item.kind not in _CODED:
            kind = item.kind.decode("ascii", "replace")
            raise ImageError(
                f"{label}: a picture of kind {kind!r} in a HEIF file; expected AVIF (av01) or HEIC (hvc1): save it as PNG"
            )
    return kept


def _alpha_items(container: Container) -> list[int]:
    """Transparency of the picture, or of its tiles."""
    bases = [container.primary, *container.targets(b"dimg", container.primary)]
    sources = [number for base in bases for number in container.sources(b"auxl", base) if number in container.items]
    return [
        number for number in sources if any(body[4:].startswith(_ALPHA) for body in container.items[number].all_of(b"auxC"))
    ]


def _size(item: Item) -> tuple[int, int]:
    """Width and height of an item, before it is turned."""
    bodies = set(item.all_of(b"ispe"))
    if len(bodies) != 1:
        raise ValueError(f"an item of {len(bodies)} sizes")
    body = bodies.pop()
    if len(body) != 12:
        raise EOFError
    return int.from_bytes(body[4:8]), int.from_bytes(body[8:12])


def _coded_pixels(item: Item, data: bytes) -> int:
    """Pixels that decoding an item's stream makes; those of a grid are its tiles'."""
    width, height = _size(item)
    payload = b"".join(data[start : start + length] for start, length in item.extents)
    if item.kind == b"grid":
        return 0
    if item.kind == b"av01":
        sizes = examine_av1(payload)
        fits = all(size == (width, height) for size in sizes)
    else:
        configurations = item.all_of(b"hvcC")
        if len(configurations) != 1:
            raise ValueError(f"an item with {len(configurations)} configurations")
        sizes = examine_hevc(configurations[0], payload)
        fits = all(width <= w <= width + _PADDING and height <= h <= height + _PADDING for w, h in sizes)
    if not fits:
        raise ValueError(f"a stream of {'x'.join(map(str, sizes[0]))} pixels in an item of {width}x{height}")
    return max(math.prod(size) for size in sizes)


def _orientation(item: Item) -> int:
    turns = [body[0] & 3 for body in item.all_of(b"irot") if body]
    mirrors = [body[0] & 1 for body in item.all_of(b"imir") if body]
    return _ORIENTATIONS.get((turns[0] if turns else 0, mirrors[0] if mirrors else None), 1)


def _without_the_rest(data: bytes, container: Container, kept: set[int]) -> bytes:
    """The file in which other items and boxes have names that decoders pass over, and films are called still pictures."""
    changed = bytearray(data)
    for at in container.others:
        changed[at : at + 4] = b"free"
    for number, item in container.items.items():
        if number not in kept:
            changed[item.kind_at : item.kind_at + 4] = b"skip"
    for at in range(*container.brands, 4):
        brand = bytes(changed[at : at + 4])
        changed[at : at + 4] = _SEQUENCES.get(brand, brand)
    return bytes(changed)
