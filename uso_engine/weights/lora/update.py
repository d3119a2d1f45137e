"""What a change of a weight is to the code that merges it, whatever kind of adapter it comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class WeightUpdate(Protocol):
    """A change that is added to a block of one weight; a vector is a matrix of one column."""

    @property
    def scale(self) -> float:
        """The file's own factor."""
        ...

    @property
    def rows(self) -> range:
        """Rows of the weight that change."""
        ...

    @property
    def columns(self) -> range:
        """Columns of the weight that change."""
        ...

    @property
    def needs_pristine(self) -> bool:
        """Whether the change depends on the weight itself."""
        ...

    @property
    def digest(self) -> bytes:
        """A hash of everything that the change depends on; equal for equal changes, whatever file they come from."""
        ...

    def add_to(self, weight: Tensor, strength: float, pristine: Tensor | None = None) -> None:
        """Add the change to a float32 weight in place, in float32, on the weight's device.

        Args:
            weight: [N, K], at least as large as the block.
            strength: the user's factor.
            pristine: the weight before any change, where the change depends on it.
        """
        ...


def content_digest(tensors: Iterable[Tensor], numbers: Sequence[object]) -> bytes:
    """Hash tensors by type, shape and bytes, together with some numbers.

    Args:
        tensors: on the CPU.
        numbers: whatever else decides; their text is hashed.
    """
    digest = hashlib.blake2b(repr(tuple(numbers)).encode(), digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def in_order_of_content(terms: Sequence[tuple[WeightUpdate, float, str]]) -> list[tuple[WeightUpdate, float, str]]:
    """Updates, strengths and names in an order that the changes themselves decide.

    Sums of floating-point numbers depend on their order. Ordered by content, the same changes give the same bits whatever the
    order in which their files were named. Nothing is hashed where no two of them share an element.
    """
    disjoint = all(
        not _overlap(a.rows, b.rows) or not _overlap(a.columns, b.columns)
        for index, (a, _, _) in enumerate(terms)
        for b, _, _ in terms[:index]
    )
    return list(terms) if disjoint else sorted(terms, key=lambda term: (term[0].digest, term[1]))


def _overlap(a: range, b: range) -> bool:
    return a.start < b.stop and b.start < a.stop
