"""What `ImageLimits` takes, and what it refuses to take for something else."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
from picture_files import encoded, flag

from uso_engine.imaging.open import ImageLimits, open_image


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_bytes": "50"}, "max_bytes must be positive and a whole number, got '50'"),
        ({"max_bytes": 1.5}, "max_bytes must be positive and a whole number, got 1.5"),
        ({"max_pixels": float("inf")}, "max_pixels must be positive and a whole number, got inf"),
        ({"max_pixels": True}, "max_pixels must be positive and a whole number, got True"),
        ({"deadline_s": None}, "deadline_s must be positive and a number of seconds, got None"),
        ({"decode_deadline_s": 1e300}, "decode_deadline_s must be positive and a number of seconds, got 1e"),
        ({"allow_private_addresses": "no"}, "allow_private_addresses must be True or False, got 'no'"),
        ({"allow_paths": 0}, "allow_paths must be True or False, got 0"),
        ({"allow_http": None}, "allow_http must be True or False, got None"),
        ({"private_hosts": "abc"}, "private_hosts must be a list of hosts, got 'abc'"),
        ({"private_hosts": None}, "private_hosts must be a list of hosts, got None"),
        ({"allowed_hosts": "abc"}, "allowed_hosts must be a list of hosts, got 'abc'"),
        ({"allowed_hosts": (7,)}, "allowed_hosts must be a list of hosts, got (7,)"),
        ({"decode_pool": 3}, "decode_pool must be a DecodePool, got int"),
    ],
)
def test_limits_of_another_type_are_refused(arguments: dict[str, Any], says: str) -> None:
    """A text is neither a switch nor a list: "no" would allow, and "abc" would be the hosts a, b and c."""
    with pytest.raises(ValueError, match=re.escape(says)):
        ImageLimits(**arguments)


def test_limits_are_kept_as_plain_values() -> None:
    given: dict[str, Any] = {"max_bytes": 5e6, "max_pixels": np.int32(4), "deadline_s": np.float32(2)}
    limits = ImageLimits(**given, private_hosts=(host for host in ["a.b"]))  # type: ignore[arg-type]
    assert limits == ImageLimits(max_bytes=5_000_000, max_pixels=4, deadline_s=2.0, private_hosts=("a.b",))
    assert [type(value) for value in (limits.max_bytes, limits.max_pixels, limits.deadline_s)] == [int, int, float]
    assert open_image(io.BytesIO(encoded(flag().resize((2, 2)), "PNG")), limits=limits).size == (2, 2)
    hash(ImageLimits(allowed_hosts=["a.b"]))  # type: ignore[arg-type]
