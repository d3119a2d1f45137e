"""``data:`` URIs: a picture inside a string."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING

import numpy as np

from uso_engine.errors import ImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_HEADER = 1024
"""Characters before the comma: a media type and its parameters."""
_PIECE = 2**18
_WHITE_SPACE = b" \t\r\n\v\f"
_DIGITS = np.full(256, 255, np.uint8)
"""The value of each hexadecimal digit's character; 255 for all other characters."""
for _value, _characters in enumerate(zip(b"0123456789abcdef", b"0123456789ABCDEF", strict=True)):
    _DIGITS[list(_characters)] = _value


def decode_data_uri(uri: str, *, max_bytes: int, label: str) -> bytes:
    """Take the bytes out of a ``data:`` URI.

    The declared media type is not looked at: content decides.

    Args:
        uri: the URI; base64 or percent-encoded.
        max_bytes: the most bytes it may carry, checked before they are decoded.
        label: what error messages call it.

    Returns:
        The bytes.

    Raises:
        ImageError: no comma, not ASCII, broken base64, or over ``max_bytes``.
        Source: RFC 2397.
    """
    comma = uri.find(",", 0, _MAX_HEADER)
    if comma < 0:
        raise ImageError(f"{label}: a data URI without a comma; expected data:image/png;base64,…")
    is_base64 = uri[:comma].lower().rstrip().endswith(";base64")
    length = len(uri) - comma - 1
    # Percent-encoding triples a byte and base64 adds a third; what is longer than both together cannot be within the limit.
    if length > max_bytes * 4 + 1024:
        raise ImageError(f"{label}: a data URI of {length:,} characters; at most {max_bytes:,} bytes are accepted")
    if not uri.isascii():
        raise ImageError(f"{label}: a data URI with characters outside ASCII; expected base64 or percent-encoding")
    raw = _percent_decoded(uri[comma + 1 :].encode("ascii"))
    if is_base64:
        raw = raw.translate(None, _WHITE_SPACE)
        try:
            raw = base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
        except binascii.Error as error:
            raise ImageError(f"{label}: a data URI whose base64 is broken ({length:,} characters)") from error
    if len(raw) > max_bytes:
        raise ImageError(f"{label}: a data URI of {len(raw):,} bytes; at most {max_bytes:,} are accepted")
    return raw


def _percent_decoded(text: bytes) -> bytes:
    """Decode piece by piece, so that memory stays within a few megabytes beyond the text and the answer."""
    if b"%" not in text:
        return text
    decoded, at = bytearray(), 0
    while at < len(text):
        end = min(at + _PIECE, len(text))
        if end < len(text):  # no piece ends within an escape
            escape = text.find(b"%", end - 2, end)
            end = end if escape < 0 else escape
        decoded += _percent_decoded_piece(np.frombuffer(text, np.uint8, end - at, at))
        at = end
    return bytes(decoded)


def _percent_decoded_piece(text: NDArray[np.uint8]) -> bytes:
    """Replace ``%`` and two hexadecimal digits by their byte; a ``%`` before anything else stands for itself."""
    digits = _DIGITS[text]
    marks = np.flatnonzero(text[:-2] == ord("%"))
    marks = marks[(digits[marks + 1] < 16) & (digits[marks + 2] < 16)]
    decoded, kept = text.copy(), np.ones(len(text), bool)
    decoded[marks] = digits[marks + 1] * 16 + digits[marks + 2]
    kept[marks + 1] = kept[marks + 2] = False
    return decoded[kept].tobytes()
