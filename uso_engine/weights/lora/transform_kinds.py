"""IA3, OFT and GLoRA as files hold them: which tensors a layer of each has, of which shapes, and the transform they make."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from uso_engine.weights.files.tensor_source import TensorSource

from .found import Findings, FoundLayer
from .keys import Role
from .layers import LoRALayer
from .transforms import GeneralLowRank, RotatedWeight, ScaledWeight, WeightTransform

GLORA_PARTS = (Role.GLORA_A1, Role.GLORA_A2, Role.GLORA_B1, Role.GLORA_B2)
KINDS: dict[str, tuple[Role, ...]] = {
    "IA3": (Role.FACTORS,),
    "IA3 of PEFT": (Role.PEFT_FACTORS,),
    "OFT": (Role.ROTATIONS,),
    "GLoRA": GLORA_PARTS,
}
"""Names of the kinds and what each needs."""


def check_transform(source: TensorSource, layer: FoundLayer, kind: str, target: LoRALayer, findings: Findings) -> None:
    """Note shapes that do not fit one layer. Reads no values but IA3's direction."""
    keys, rows, columns = layer.keys, target.rows, target.columns
    if kind == "IA3":
        on_input = keys.get(Role.ON_INPUT)
        if on_input is None or source.read(on_input).numel() != 1:
            findings.add("IA3's on_input is missing or not a single number, beside", keys[Role.FACTORS])
            return
        length = columns if bool(source.read(on_input).reshape(()).item()) else rows
        _expect(source, keys[Role.FACTORS], [(length,), (1, length)], findings)
    elif kind == "IA3 of PEFT":
        _expect(source, keys[Role.PEFT_FACTORS], [(rows, 1), (1, columns)], findings)
    elif kind == "OFT":
        shape = source.shape(keys[Role.ROTATIONS])
        if len(shape) == 4:
            findings.add("BOFT (butterfly rotations), which is not supported", layer.a_key)
        elif len(shape) != 3 or shape[1] != shape[2] or shape[1] < 2 or shape[0] * shape[1] != rows:
            findings.add(f"shape {list(shape)}, expected [blocks, n, n] with blocks * n = {rows}", keys[Role.ROTATIONS])
        if Role.RESCALE in keys:
            _expect(source, keys[Role.RESCALE], [(rows, 1), (rows,)], findings)
    else:
        _check_glora(source, layer, target, findings)


def transform_of(
    source: TensorSource, layer: FoundLayer, target: LoRALayer, tensors: Mapping[Role, Tensor], alpha: float | None
) -> WeightTransform | None:
    """The transform of one checked layer; None where it is of another kind.

    Args:
        source: the file.
        layer: its keys.
        target: its place.
        tensors: its values.
        alpha: GLoRA's, or OFT's bound per row.
    """
    if Role.FACTORS in tensors:
        factors = tensors[Role.FACTORS].reshape(-1)
        by_column = bool(source.read(layer.keys[Role.ON_INPUT]).reshape(()).item())
        return ScaledWeight(factors.reshape(1, -1) if by_column else factors.reshape(-1, 1), 0.0)
    if Role.PEFT_FACTORS in tensors:
        return ScaledWeight(tensors[Role.PEFT_FACTORS], 1.0)
    if Role.ROTATIONS in tensors:
        rescale = tensors.get(Role.RESCALE)
        return RotatedWeight(
            tensors[Role.ROTATIONS], (alpha or 0.0) * target.rows, None if rescale is None else rescale.reshape(-1, 1)
        )
    if Role.GLORA_A1 in tensors:
        a1, a2, b1, b2 = (tensors[part] for part in GLORA_PARTS)
        if a1.shape[0] != target.columns:  # before LyCORIS 2, up and down had each other's names
            a1, a2, b1, b2 = a2, a1, b2, b1
        rank = a2.shape[0]
        return GeneralLowRank(a1, a2, b1, b2, (alpha or rank) / rank)
    return None


def _check_glora(source: TensorSource, layer: FoundLayer, target: LoRALayer, findings: Findings) -> None:
    """Up and down by their shapes; which of the names is which changed between versions."""
    a1, a2, b1, b2 = (source.shape(layer.keys[part]) for part in GLORA_PARTS)
    rank = min(a1) if len(a1) == 2 else 0
    ups = {"a": (target.columns, rank), "b": (target.rows, rank)}
    down = (rank, target.columns)
    new, old = (ups["a"], down, ups["b"], down), (down, ups["a"], down, ups["b"])
    if rank in (0, target.columns) or (a1, a2, b1, b2) not in (new, old):
        shown = ", ".join(str(list(shape)) for shape in (a1, a2, b1, b2))
        findings.add(
            f"GLoRA's a1, a2, b1, b2 of shapes {shown}, expected [{target.columns}, r], [r, {target.columns}], "
            f"[{target.rows}, r], [r, {target.columns}]",
            layer.a_key,
        )


def _expect(source: TensorSource, key: str, expected: list[tuple[int, ...]], findings: Findings) -> None:
    shape = source.shape(key)
    if shape not in expected:
        findings.add(f"shape {list(shape)}, expected {' or '.join(str(list(one)) for one in expected)}", key)
