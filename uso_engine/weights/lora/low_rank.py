"""A LoRA once its file has been understood: changes, mostly low-rank products, to be added to rows of the model's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .update import WeightUpdate, content_digest


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """scale * up @ down, added to a block of one weight.

    Args:
        down: [r, columns], as stored.
        up: [rows, r], as stored.
        scale: alpha / rank, or what the file says in its place.
        row_start: first row of the weight that it is added to.
        column_start: first column of the weight that it is added to.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    row_start: int = 0
    column_start: int = 0

    @property
    def rows(self) -> range:
        """Rows of the weight that change."""
        return range(self.row_start, self.row_start + self.up.shape[0])

    @property
    def columns(self) -> range:
        """Columns of the weight that change."""
        return range(self.column_start, self.column_start + self.down.shape[1])

    @property
    def needs_pristine(self) -> bool:
        return False

    @cached_property
    def digest(self) -> bytes:
        return content_digest((self.down, self.up), (self.scale, self.row_start, self.column_start))

    def add_to(self, weight: Tensor, strength: float, pristine: Tensor | None = None) -> None:
        block = weight[self.rows.start : self.rows.stop, self.columns.start : self.columns.stop]
        up = self.up.to(weight.device, torch.float32)
        down = self.down.to(weight.device, torch.float32)
        block.addmm_(up, down, alpha=strength * self.scale)


class FileName(str):
    """A file's path as messages show it, with the hash of what was read from it.

    Args:
        path: of the file.
        sha256: of its contents, 64 hexadecimal digits.
    """

    __slots__ = ("sha256",)
    sha256: str

    def __new__(cls, path: str, sha256: str) -> FileName:
        name = super().__new__(cls, path)
        name.sha256 = sha256
        return name

    def __reduce__(self) -> tuple[type[FileName], tuple[str, str]]:
        return FileName, (str(self), self.sha256)


@dataclass(frozen=True, eq=False)
class LoRA:
    """One LoRA file.

    Args:
        name: what messages call it, usually its path; a `FileName` where it was read from a file.
        style: the key style that it was written in.
        updates: by canonical weight key.
        skipped_keys: how many keys of text encoders were left out.
    """

    name: str
    style: str
    updates: Mapping[str, tuple[WeightUpdate, ...]]
    skipped_keys: int = 0

    def __reduce__(self) -> tuple[type[LoRA], tuple[object, ...]]:
        # For processes that merge it as well; a mapping that nobody can change has no form of its own there.
        return LoRA, (self.name, self.style, dict(self.updates), self.skipped_keys)


LoRASet = Sequence[tuple[LoRA, float]]
"""LoRAs with the user's factors; they are added in float32, in an order of their content's, and only the sum is rounded."""
