"""Data URIs are decoded within a bound, whatever they are made of."""

import base64
import tracemalloc
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uso_engine.errors import ImageError
from uso_engine.imaging import data_uri
from uso_engine.imaging.data_uri import decode_data_uri


def decoded(uri: str, max_bytes: int = 10_000_000) -> bytes:
    return decode_data_uri(uri, max_bytes=max_bytes, label="this URI")


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="%%%0aAfFgG,;", max_size=60), st.integers(4, 9))
def test_escapes_read_as_the_standard_library_reads_them(text: str, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_uri, "_PIECE", piece)  # so that pieces end in every place of an escape
        assert decoded("data:," + text) == unquote_to_bytes(text)


def test_every_byte_survives() -> None:
    everything = bytes(range(256)) * 3000
    assert decoded("data:image/png," + "".join(f"%{byte:02X}" for byte in everything)) == everything
    in_base64 = base64.b64encode(everything).decode()
    assert decoded("data:;base64," + in_base64.replace("+", "%2b").replace("/", "%2F").replace("=", "%3d")) == everything
    assert decoded("data:;BASE64 ," + "\n".join(in_base64[i : i + 76] for i in range(0, len(in_base64), 76))) == everything


@pytest.mark.parametrize("text", ["data:," + "%41" * 2_000_000, "data:;base64," + "A " * 3_000_000])
def test_memory_stays_in_proportion(text: str) -> None:
    tracemalloc.start()
    try:
        decoded(text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(text)


def test_too_long_is_said_before_anything_is_decoded() -> None:
    with pytest.raises(ImageError, match=r"a data URI of 8,000 characters; at most 1,000 bytes are accepted"):
        decoded("data:," + "a" * 8000, max_bytes=1000)
    with pytest.raises(ImageError, match=r"a data URI of 1,001 bytes; at most 1,000 are accepted"):
        decoded("data:," + "%41" * 1001, max_bytes=1000)
    assert len(decoded("data:," + "%41" * 1000, max_bytes=1000)) == 1000


@pytest.mark.parametrize("uri", ["data:" + "a" * 5_000_000 + ",", "data:image/png;base64"])
def test_a_header_that_does_not_end(uri: str) -> None:
    with pytest.raises(ImageError, match="a data URI without a comma"):
        decoded(uri)


@pytest.mark.parametrize("payload", ["é", "\ud800", "AAA\uff10"])
def test_characters_outside_ascii(payload: str) -> None:
    for header in ("data:,", "data:;base64,"):
        with pytest.raises(ImageError, match="characters outside ASCII"):
            decoded(header + payload)


def test_all_256_characters_are_looked_up() -> None:
    assert np.flatnonzero(data_uri._DIGITS < 16).tolist() == sorted(b"0123456789abcdefABCDEF")
