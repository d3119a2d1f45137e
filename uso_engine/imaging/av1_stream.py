"""The sizes and the number of frames in an AV1 stream, read from its headers (AV1 Bitstream Specification, 5.3 to 5.5)."""

from __future__ import annotations

from uso_engine.imaging.bits import BitReader

MAX_UNITS = 10_000
"""Units of a picture: a sequence header, a frame, its tiles, metadata."""
_SEQUENCE, _FRAME_HEADER, _REPEATED_HEADER, _FRAME = 1, 3, 7, 6
_FRAMES = (_FRAME_HEADER, _REPEATED_HEADER, _FRAME)


def examine_av1(payload: bytes) -> list[tuple[int, int]]:
    """The largest sizes that a decoder may be told of by a stream of one still picture.

    Args:
        payload: the units of a picture, each with its length.

    Returns:
        For each sequence header, width and height of its pictures.

    Raises:
        ValueError: more than one frame, a unit without a length, or room for sizes beyond the one that is given.
        EOFError: a header breaks off.
    """
    sizes, frames, at = [], 0, 0
    for _ in range(MAX_UNITS):
        if at >= len(payload):
            break
        kind, has_extension, has_length = payload[at] >> 3 & 15, payload[at] >> 2 & 1, payload[at] >> 1 & 1
        if not has_length:
            raise ValueError("a unit without a length")
        length, at = _leb128(payload, at + 1 + has_extension)
        if at + length > len(payload):
            raise EOFError
        if kind == _SEQUENCE:
            sizes.append(_sequence_size(BitReader(payload[at : at + min(length, 1024)])))
        frames += kind in _FRAMES
        at += length
    else:
        raise ValueError(f"more than {MAX_UNITS:,} units")
    if frames != 1:
        raise ValueError(f"{frames} frames")
    if not sizes:
        raise ValueError("no sequence header")
    return sizes


def _leb128(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, least significant first, and what follows it."""
    number = 0
    for place in range(8):
        if at >= len(data):
            raise EOFError
        number |= (data[at] & 0x7F) << 7 * place
        at += 1
        if not data[at - 1] & 0x80:
            return number, at
    raise ValueError("a length of more than 8 bytes")


def _sequence_size(bits: BitReader) -> tuple[int, int]:
    bits.skip(4)  # profile, still_picture
    if bits.read(1):  # reduced_still_picture_header
        bits.skip(5)
    else:
        _skip_operating_points(bits)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    width, height = bits.read(width_bits) + 1, bits.read(height_bits) + 1
    # A frame may give a size of its own in as many bits.
    if width_bits > width.bit_length() or height_bits > height.bit_length():
        raise ValueError(f"{width_bits} and {height_bits} bits for the sides of {width}x{height} pixels")
    return width, height


def _skip_operating_points(bits: BitReader) -> None:
    delay_bits = 0
    if bits.read(1):  # timing_info_present
        bits.skip(64)
        if bits.read(1):  # equal_picture_interval
            bits.exponential_golomb()
        if bits.read(1):  # decoder_model_info_present
            delay_bits = bits.read(5) + 1
            bits.skip(42)
    has_display_delay = bits.read(1)
    for _ in range(bits.read(5) + 1):
        bits.skip(12)
        if bits.read(5) > 7:
            bits.skip(1)
        if delay_bits and bits.read(1):
            bits.skip(2 * delay_bits + 1)
        if has_display_delay and bits.read(1):
            bits.skip(4)
