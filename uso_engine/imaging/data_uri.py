"""``data:`` URIs: a picture inside a string."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import unquote_to_bytes

from uso_engine.errors import ImageError


def encode_data_uri(data: bytes, content_type: str) -> str:
    """Put bytes into a ``data:`` URI.

    Args:
        data: what to carry.
        content_type: its media type, such as ``image/png``.

    Returns:
        The URI, base64.
    """
    return f"data:{content_type};base64,{base64.b64encode(data).decode('ascii')}"


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
        ImageError: no comma, broken base64, or over ``max_bytes``.
        Source: RFC 2397.
    """
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ImageError(f"{label}: a data URI without a comma; expected data:image/png;base64,…")
    is_base64 = header.lower().rstrip().endswith(";base64")
    # Percent-encoding triples a byte and base64 adds a third; what is longer than both together cannot be within the limit.
    if len(payload) > max_bytes * 4 + 1024:
        raise ImageError(f"{label}: a data URI of {len(payload):,} characters; at most {max_bytes:,} bytes are accepted")
    raw = unquote_to_bytes(payload) if "%" in payload or not is_base64 else payload.encode("ascii", "replace")
    if is_base64:
        raw = b"".join(raw.split())
        try:
            raw = base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
        except binascii.Error as error:
            raise ImageError(f"{label}: a data URI whose base64 is broken ({len(payload):,} characters)") from error
    if len(raw) > max_bytes:
        raise ImageError(f"{label}: a data URI of {len(raw):,} bytes; at most {max_bytes:,} are accepted")
    return raw
