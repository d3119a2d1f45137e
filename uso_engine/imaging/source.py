"""What a picture may be given as, and how a message names it. Light to import: requests use it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeAlias

from PIL import Image

if TYPE_CHECKING:
    from typing import TypeGuard

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


class PixelArray(Protocol):
    """A numpy array with channels last, or a torch tensor with channels first."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Height and width, and channels in their place."""

    @property
    def ndim(self) -> int:
        """How many numbers ``shape`` has."""

    def __len__(self) -> int: ...


ImageSource: TypeAlias = str | Path | bytes | bytearray | memoryview | BinaryIO | Image.Image | PixelArray

EXPECTED_SOURCE = "a path, URL, data URI, bytes, binary file, PIL image, numpy array or torch tensor"
"""What may be given, for messages."""
SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def is_array(source: object) -> TypeGuard[NDArray[np.generic]]:
    """Whether a source is a numpy array. Where numpy was never imported there is none, and it is not imported to find out."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(source, numpy.ndarray)


def is_tensor(source: object) -> TypeGuard[Tensor]:
    """Whether a source is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def is_image_source(source: object) -> TypeGuard[ImageSource]:
    """Whether ``open_image`` takes an object of this type; what it holds is seen when it is opened.

    Args:
        source: anything.
    """
    if isinstance(source, (str, Path, bytes, bytearray, memoryview, Image.Image)):
        return True
    return is_array(source) or is_tensor(source) or callable(getattr(source, "read", None))


def is_same_source(a: object, b: object) -> bool:
    """Whether two pictures are given in the same way with the same contents: True or False, where arrays answer with arrays.

    Args:
        a: anything ``open_image`` takes, or None.
        b: the same. File objects are equal to themselves alone, as are tensors without values (device ``meta``).
    """
    if a is b:
        return True
    if is_array(a) and is_array(b):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if is_tensor(a) and is_tensor(b):
        if (a.dtype, a.shape, a.device, a.layout) != (b.dtype, b.shape, b.device, b.layout) or a.device.type == "meta":
            return False
        return bool((a.to_dense() == b.to_dense()).all()) if a.is_sparse else bool((a == b).all())
    return type(a) is type(b) and not is_array(a) and not is_tensor(a) and bool(a == b)


def describe_source(source: ImageSource) -> str:
    """Name a source in a few words, without query strings, object addresses or the bytes themselves.

    Args:
        source: anything ``open_image`` takes.

    Returns:
        At most about 100 characters, for messages and logs.
    """
    if isinstance(source, Image.Image):
        return f"PIL image {source.width}x{source.height} {source.mode}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{memoryview(source).nbytes:,} bytes"
    if is_array(source) or is_tensor(source):
        kind, dtype = "numpy array" if is_array(source) else "tensor", str(source.dtype).removeprefix("torch.")[:40]
        try:
            return f"{kind} {list(source.shape)} {dtype}"
        except RuntimeError:  # a nested tensor has no shape
            return f"nested {kind} {dtype}"
    if isinstance(source, str) and source[:5].lower() == "data:":
        return f"data URI of {len(source):,} characters"
    if isinstance(source, str) and SCHEME.match(source):
        without_query = re.split(r"[?#]", source, maxsplit=1)[0]
        return _shorten(re.sub(r"//[^/@]*@", "//", without_query))
    if isinstance(source, (str, Path)):
        return f"'{_shorten(str(source))}'"
    file_name = getattr(source, "name", None)
    return f"file '{_shorten(file_name)}'" if isinstance(file_name, str) else "file object"


def _shorten(text: str) -> str:
    printable = "".join(c if c.isprintable() else "?" for c in text[:200])
    return printable if len(printable) <= 90 else f"{printable[:44]}…{printable[-44:]}"
