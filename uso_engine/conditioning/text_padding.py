"""T5's padding as few rows: rows that are nearly equal become one, which stands for all of them.

T5 answers at every position of a prompt's padding, and the transformer was trained to see all of it; without, pictures break.
Text rows have no position there, so n equal rows are one row that is attended to n times (`uso_engine.model.keys`): exact for
equal rows, and off by the square of how far they are apart otherwise. How far that is depends on the encoder and the prompt, so
it is measured for each, and rows that are far from all others stay apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uso_engine.model.keys import Merged

FARTHEST = 0.1
"""How far a row may be from the one that it is put to, in root mean squares of a padding row's norm.

With the embedded model's padding, spread artificially, the velocity's relative error was up to 0.15 times the square of the
spread, so 1.5e-3 within this; bfloat16 alone makes 7e-3 (benchmarks/LOG.md).
"""

LEAST_SAVED = 0.25
"""The share of a prompt's padding that has to go, or all of it stays: copying keys costs what 75 to 105 of 512 rows save.

Counted for FLUX.1-dev at 1024 x 1024 with a content and a style image: keys and values are read and written once more in every
block, 57 times 143 MB.
"""


@dataclass(frozen=True, eq=False)
class MergedText:
    """A prompt's tokens with its padding merged.

    Args:
        tokens: [L', W] in the prompt's dtype, L' at most L: the prompt's own rows, then what is left of its padding.
        merged: rows of `tokens` that stand for several.
        rows: L, of the prompt before.
        padding: how many of them were padding.
        spread: root mean square of the merged rows' distances to what stands for them, over that of padding rows' norms.
    """

    tokens: Tensor
    merged: Merged
    rows: int
    padding: int
    spread: float

    def record(self) -> dict[str, object]:
        """What became of the rows, plain JSON."""
        return {"rows": self.rows, "padding": self.padding, "kept": len(self.tokens), "spread": float(f"{self.spread:.3g}")}


Groups = tuple[tuple[int, ...], ...]
"""Padding rows by what becomes one row, as indices from the first padding row on."""


def merge_padding(tokens: Tensor, padding: int, groups: Groups) -> MergedText:
    """Merge a prompt's padding.

    Args:
        tokens: [L, W].
        padding: how many of them, at the end, are padding.
        groups: as `group_padding` found them.
    """
    own = len(tokens) - padding
    rows = tokens[own:].to("cpu", torch.float64)
    means = torch.stack([rows[list(group)].mean(0) for group in groups]) if groups else rows
    apart = sum(float((rows[list(group)] - mean).square().sum()) for group, mean in zip(groups, means, strict=True))
    size = float(rows.square().sum())
    return MergedText(
        torch.cat((tokens[:own], means.to(tokens))),
        tuple((own + i, len(group)) for i, group in enumerate(groups) if len(group) > 1),
        len(tokens),
        padding,
        (apart / size) ** 0.5 if size else 0.0,
    )


def check_padding(padding: int | None) -> int:
    """How many rows of a prompt embedding are padding, where it says so.

    Raises:
        ValueError: it does not.
    """
    if padding is None:
        raise ValueError(
            "text_padding='merge' has to know which rows of a prompt embedding are padding, and this one does not say: it was "
            "saved by an earlier version or made by hand; encode the prompt again, or give text_padding='keep'"
        )
    return padding


def group_padding(tokens: Tensor, padding: int, farthest: float = FARTHEST) -> Groups:
    """Which padding rows become one: again and again the row with the most free ones near it, and those.

    Args:
        tokens: [L, W].
        padding: how many of them, at the end, are padding.
        farthest: as `FARTHEST`.

    Returns:
        Groups in the order of their first rows, each row one of its own where too few would go; the same tokens always give
        the same ones.
    """
    rows = tokens[len(tokens) - padding :].to("cpu", torch.float64)
    squares = rows.square().sum(1)
    near = squares[:, None] + squares[None] - 2 * (rows @ rows.T) <= farthest**2 * squares.mean()
    near.fill_diagonal_(True)  # Whatever rounding says.
    free, groups = torch.ones(padding, dtype=torch.bool), []
    while bool(free.any()):
        counts = (near & free).sum(1) * free
        if int(counts.max()) == 1:
            groups += [(row,) for row in free.nonzero()[:, 0].tolist()]
            break
        members = near[int(counts.argmax())] & free
        groups.append(tuple(members.nonzero()[:, 0].tolist()))
        free &= ~members
    if len(groups) > (1 - LEAST_SAVED) * padding:
        return tuple((row,) for row in range(padding))
    return tuple(sorted(groups))
