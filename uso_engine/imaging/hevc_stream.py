"""The sizes and the number of pictures in an HEVC stream, read from its headers (ITU-T H.265, 7.3)."""

from __future__ import annotations

from collections.abc import Iterable

from uso_engine.imaging.bits import BitReader

MAX_UNITS = 10_000
"""Units of one picture: parameter sets and slices."""
_SEQUENCE, _LAST_SLICE = 33, 31


def parameter_sets(configuration: bytes) -> tuple[list[bytes], int]:
    """The units in an ``hvcC`` property, and how many bytes the length of a unit takes in the stream (ISO/IEC 14496-15, 8.3.3).

    Raises:
        EOFError: it breaks off.
    """
    units, at = [], 23
    if len(configuration) < at:
        raise EOFError
    for _ in range(configuration[22]):
        count = int.from_bytes(_slice(configuration, at + 1, 2))
        at += 3
        for _ in range(count):
            length = int.from_bytes(_slice(configuration, at, 2))
            units.append(_slice(configuration, at + 2, length))
            at += 2 + length
    return units, (configuration[21] & 3) + 1


def examine_hevc(configuration: bytes, payload: bytes) -> list[tuple[int, int]]:
    """The sizes that a decoder may be told of by a stream of one still picture.

    Args:
        configuration: the ``hvcC`` property.
        payload: the units of a picture, each after its length.

    Returns:
        For each sequence parameter set, width and height of its pictures before they are cropped.

    Raises:
        ValueError: more than one picture.
        EOFError: a header breaks off.
    """
    sets, length_bytes = parameter_sets(configuration)
    units = [*sets, *_units(payload, length_bytes)]
    sizes = [_sequence_size(unit) for unit in units if _kind(unit) == _SEQUENCE]
    pictures = sum(_kind(unit) <= _LAST_SLICE and bool(_slice(unit, 2, 1)[0] & 0x80) for unit in units)
    if pictures != 1:
        raise ValueError(f"{pictures} pictures")
    if not sizes:
        raise ValueError("no sequence parameter set")
    return sizes


def _units(payload: bytes, length_bytes: int) -> Iterable[bytes]:
    """The beginnings of the units."""
    at = 0
    for _ in range(MAX_UNITS):
        if at >= len(payload):
            return
        length = int.from_bytes(_slice(payload, at, length_bytes))
        at += length_bytes
        if at + length > len(payload):
            raise EOFError
        yield payload[at : at + min(length, 1024)]
        at += length
    raise ValueError(f"more than {MAX_UNITS:,} units")


def _slice(data: bytes, at: int, count: int) -> bytes:
    if at + count > len(data):
        raise EOFError
    return data[at : at + count]


def _kind(unit: bytes) -> int:
    return _slice(unit, 0, 2)[0] >> 1 & 63


def _sequence_size(unit: bytes) -> tuple[int, int]:
    # Within a unit a 3 stands behind two zero bytes, so that none of them looks like a unit's beginning.
    bits = BitReader(unit[2:].replace(b"\0\0\3", b"\0\0"))
    bits.skip(4)
    layers = bits.read(3)
    bits.skip(1 + 96)  # temporal nesting; profile, tier and level
    present = [(bits.read(1), bits.read(1)) for _ in range(layers)]
    bits.skip(2 * (8 - layers) if layers else 0)
    for has_profile, has_level in present:
        bits.skip(88 * has_profile + 8 * has_level)
    bits.exponential_golomb()
    if bits.exponential_golomb() == 3:  # chroma_format_idc
        bits.skip(1)
    return bits.exponential_golomb(), bits.exponential_golomb()
