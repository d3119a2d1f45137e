"""Files that hold one LoRA twice, under the key styles of two tools: it is taken once.

Two layers of different styles that act on the same rows of a weight hold the same LoRA if their changes are equal up to the
rounding of factors that were stored with another scale. If they are not, the file is refused: which of the two is meant is not
ours to guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from uso_engine.weights.files.tensor_source import TensorSource

from .adapters import updates_of
from .found import Findings, FoundLayer
from .scaling import PeftScaling
from .update import WeightUpdate

_CLOSE = 2.0**-7
"""Of the change's norm: bfloat16 factors that were multiplied by alpha / rank before they were stored differ by 2**-9."""


def drop_repeated(
    source: TensorSource, layers: Mapping[str, FoundLayer], scaling: PeftScaling, findings: Findings
) -> dict[str, FoundLayer]:
    """Leave out layers that another style in the same file gives too.

    Args:
        source: the file.
        layers: by name, all of them checked.
        scaling: what counts where a layer has no alpha.
        findings: told of what was left out, and of layers that overlap with other values.

    Returns:
        The layers that count, in their order.
    """
    overlaps = _overlaps(layers)
    dropped: set[str] = set()
    for name, others in overlaps.items():
        layer = layers[name]
        first = {other for other in others if _rank(layers[other]) < _rank(layer)}
        same_style = [other for other in others if _rank(layers[other]) == _rank(layer) and other < name]
        if not first and not same_style:
            continue
        if first and not same_style and _is_covered(source, name, layers, first, scaling):
            dropped.add(name)
            findings.repeated.extend(layer.keys.values())
            continue
        assert layer.target is not None  # only placed layers overlap
        by = next(iter(sorted(first) or same_style))
        findings.add(
            f"the same rows of {layer.target.parts[0].key} as {by}, in another key style and with other values", layer.a_key
        )
    return {name: layer for name, layer in layers.items() if name not in dropped}


def _rank(layer: FoundLayer) -> tuple[str, str]:
    """Which of two styles counts: any fixed order will do, since both hold the same."""
    return layer.style, layer.prefix


def _overlaps(layers: Mapping[str, FoundLayer]) -> dict[str, list[str]]:
    """For every layer that shares rows with others, those."""
    taken: dict[str, list[tuple[range, str]]] = {}
    found: dict[str, list[str]] = {}
    for name, layer in sorted(layers.items()):
        for part in layer.target.parts if layer.target else ():
            mine = range(part.row, part.row + part.rows)
            for other, by in taken.get(part.key, []):
                if by != name and mine.start < other.stop and other.start < mine.stop:
                    found.setdefault(name, []).append(by)
                    found.setdefault(by, []).append(name)
            taken.setdefault(part.key, []).append((mine, name))
    return found


def _is_covered(
    source: TensorSource, name: str, layers: Mapping[str, FoundLayer], others: Iterable[str], scaling: PeftScaling
) -> bool:
    """Whether the others change every row that a layer changes, by the same amounts."""
    unread = Findings()  # values that are no numbers are found when the kept layers are read
    mine = updates_of(source, name, layers[name], scaling, unread)
    theirs: dict[str, list[WeightUpdate]] = {}
    for other in sorted(set(others)):
        for key, update in updates_of(source, other, layers[other], scaling, unread):
            theirs.setdefault(key, []).append(update)
    return all(_agree(update, theirs.get(key, [])) for key, update in mine)


@torch.no_grad()
def _agree(update: WeightUpdate, others: list[WeightUpdate]) -> bool:
    covered = {row for other in others for row in other.rows}
    if update.needs_pristine or any(other.needs_pristine for other in others) or not covered.issuperset(update.rows):
        return False
    rows = max(update.rows.stop, *(other.rows.stop for other in others))
    change, same = (torch.zeros(rows, update.columns.stop) for _ in range(2))
    update.add_to(change, 1.0)
    for other in others:
        other.add_to(same, 1.0)
    return _is_close(change[update.rows.start : update.rows.stop], same[update.rows.start : update.rows.stop])


def _is_close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(a - b) <= _CLOSE * torch.linalg.vector_norm(a))
