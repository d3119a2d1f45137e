"""GGUF's blocks in plain loops over float64, as ggml defines them: the truth for what the gguf library makes of them."""

from __future__ import annotations

import struct
from collections.abc import Callable

BLOCK_BYTES = {"Q8_0": 34, "Q5_1": 24, "Q5_0": 22, "Q4_1": 20, "Q4_0": 18}
BLOCK_BYTES |= {"Q6_K": 210, "Q5_K": 176, "Q4_K": 144, "Q3_K": 110, "Q2_K": 84}
HALVES_AT = {"Q8_0": (0,), "Q5_1": (0, 2), "Q5_0": (0,), "Q4_1": (0, 2), "Q4_0": (0,)}
HALVES_AT |= {"Q6_K": (208,), "Q5_K": (0, 2), "Q4_K": (0, 2), "Q3_K": (108,), "Q2_K": (80, 82)}
"""Where a block keeps its float16 factors: random bytes there would be infinities."""


def _half(block: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", block, at)[0])


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def _q8_0(block: bytes) -> list[float]:
    return [_half(block, 0) * _signed(byte) for byte in block[2:]]


def _four_or_five(block: bytes, *, has_fifth: bool, has_minimum: bool) -> list[float]:
    scale, at = _half(block, 0), 2
    minimum = 0.0
    if has_minimum:
        minimum, at = _half(block, at), at + 2
    fifth = 0
    if has_fifth:
        fifth, at = int.from_bytes(block[at : at + 4], "little"), at + 4
    nibbles = [byte & 15 for byte in block[at:]] + [byte >> 4 for byte in block[at:]]
    codes = [nibble | ((fifth >> i & 1) << 4) for i, nibble in enumerate(nibbles)]
    centre = 0 if has_minimum else (16 if has_fifth else 8)
    return [scale * (code - centre) + minimum for code in codes]


def _scale_and_minimum(packed: bytes, j: int) -> tuple[int, int]:
    """Six bits each, of eight groups in twelve bytes (Q4_K, Q5_K)."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4), (packed[j + 4] >> 4) | (packed[j] >> 6 << 4)


def _q4_or_q5_k(block: bytes, *, has_fifth: bool) -> list[float]:
    scale, minimum, packed = _half(block, 0), _half(block, 2), block[4:16]
    high = block[16:48] if has_fifth else bytes(32)
    low = block[48:] if has_fifth else block[16:]
    values = []
    for group in range(8):
        factor, offset = _scale_and_minimum(packed, group)
        for i in range(32):
            nibble = low[group // 2 * 32 + i] >> (4 * (group % 2)) & 15
            code = nibble | (high[i] >> group & 1) << 4
            values.append(scale * factor * code - minimum * offset)
    return values


def _q6_k(block: bytes) -> list[float]:
    low, high, scales, scale = block[:128], block[128:192], block[192:208], _half(block, 208)
    values = []
    for i in range(256):
        half, place = divmod(i, 128)
        quarter, column = divmod(place, 32)
        nibble = low[64 * half + 32 * (quarter % 2) + column] >> (4 * (quarter // 2)) & 15
        top = high[32 * half + column] >> (2 * quarter) & 3
        values.append(scale * _signed(scales[i // 16]) * ((nibble | top << 4) - 32))
    return values


def _q2_k(block: bytes) -> list[float]:
    scales, codes, scale, minimum = block[:16], block[16:80], _half(block, 80), _half(block, 82)
    values = []
    for i in range(256):
        half, place = divmod(i, 128)
        code = codes[32 * half + place % 32] >> (2 * (place // 32)) & 3
        values.append(scale * (scales[i // 16] & 15) * code - minimum * (scales[i // 16] >> 4))
    return values


def _q3_k(block: bytes) -> list[float]:
    high, codes, packed, scale = block[:32], block[32:96], block[96:108], _half(block, 108)
    values = []
    for i in range(256):
        half, place = divmod(i, 128)
        shift = place // 32
        code = codes[32 * half + place % 32] >> (2 * shift) & 3
        code -= 0 if high[place % 32] >> (4 * half + shift) & 1 else 4
        group = i // 16
        low = packed[group % 8] >> (4 * (group // 8)) & 15
        top = packed[8 + group % 4] >> (2 * (group // 4)) & 3
        values.append(scale * ((low | top << 4) - 32) * code)
    return values


FORMULAS: dict[str, Callable[[bytes], list[float]]] = {
    "Q8_0": _q8_0,
    "Q5_1": lambda block: _four_or_five(block, has_fifth=True, has_minimum=True),
    "Q5_0": lambda block: _four_or_five(block, has_fifth=True, has_minimum=False),
    "Q4_1": lambda block: _four_or_five(block, has_fifth=False, has_minimum=True),
    "Q4_0": lambda block: _four_or_five(block, has_fifth=False, has_minimum=False),
    "Q6_K": _q6_k,
    "Q5_K": lambda block: _q4_or_q5_k(block, has_fifth=True),
    "Q4_K": lambda block: _q4_or_q5_k(block, has_fifth=False),
    "Q3_K": _q3_k,
    "Q2_K": _q2_k,
}
