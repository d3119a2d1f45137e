"""An encoder or the autoencoder as a memory plan sees it: a part that may be kept on the host and brought to the GPU to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import nn


@dataclass
class OffloadablePart:
    """A part that may be kept on the host. `running` is entered around every run.

    Args:
        name: as plans show it.
        modules: everything that has weights.
        layers: those of them that are called in this order, once per run, and may come one by one.
        working_bytes: activations of one run, without those that grow with the image.
        running: entered around every run; a placement replaces it by what brings the weights.
    """

    name: str
    modules: Sequence[nn.Module]
    layers: Sequence[nn.Module] = ()
    working_bytes: int = 0
    running: Callable[[], AbstractContextManager[None]] = field(default=nullcontext, repr=False)


def attention_working_bytes(tokens: int, heads: int, width: int, inner: int, itemsize: int) -> int:
    """Activations alive at once in a layer of a text or vision encoder, in bytes.

    Args:
        tokens: L of the sequence, all of a batch.
        heads: of the attention.
        width: C.
        inner: width inside the MLP.
        itemsize: bytes of a value.

    Returns:
        Scores [heads, L, L] before and after their float32 softmax with a position bias, and four rows of either width.
    """
    return (12 + 2 * itemsize) * heads * tokens**2 + 4 * itemsize * tokens * (width + inner)
