"""The kinds of adapters: which tensors a layer of each has, of which shapes, how strongly it counts, and its updates.

- low-rank (LoRA): up @ down * alpha / rank;
- LoKr: kron(w1, w2) * alpha / rank, the rank that of a factor kept as two matrices; if neither is, alpha does not count;
- LoHa: (w1_a @ w1_b) * (w2_a @ w2_b) * alpha / rank;
- difference (``diff``, ``w_norm``): the change itself, alpha does not count;
- DoRA: any of the first three with a magnitude, see :mod:`uso_engine.weights.lora.layer_update`;
- IA3, OFT and GLoRA: made of the weight itself, see :mod:`uso_engine.weights.lora.transforms`;
- of biases: ``diff_b``, ``b_norm`` as they are, and ``lora_B.bias`` * alpha / rank.

Source: LyCORIS, lycoris/modules/{lokr,loha,full,norms}.py; PEFT, tuners/lora/layer.py; ComfyUI, comfy/weight_adapter/.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from uso_engine.precision.finite import is_finite
from uso_engine.weights.files.tensor_source import TensorSource

from .found import Findings, FoundLayer
from .keys import Role
from .layer_update import LayerUpdate
from .layers import LayerRows, LoRALayer
from .low_rank import LowRankUpdate
from .products import Difference, HadamardProduct, KroneckerProduct, LowRankProduct, Product
from .scaling import PeftScaling
from .transform_kinds import KINDS as TRANSFORM_KINDS
from .transform_kinds import check_transform, transform_of
from .transforms import TransformUpdate
from .update import WeightUpdate

_LOW_RANK = (Role.DOWN, Role.UP)
_HADAMARD = (Role.HADAMARD_1A, Role.HADAMARD_1B, Role.HADAMARD_2A, Role.HADAMARD_2B)
_KRONECKER = (
    (Role.KRONECKER_1, Role.KRONECKER_1A, Role.KRONECKER_1B),
    (Role.KRONECKER_2, Role.KRONECKER_2A, Role.KRONECKER_2B),
)
_KINDS = {
    "low-rank": _LOW_RANK,
    "LoKr": (*_KRONECKER[0], *_KRONECKER[1]),
    "LoHa": _HADAMARD,
    "difference": (Role.DIFFERENCE,),
    **TRANSFORM_KINDS,
}


def check_layer(source: TensorSource, layer: FoundLayer, findings: Findings) -> None:
    """Note what is wrong with one layer: parts that are missing or too many, shapes and types. Reads no values."""
    keys = layer.keys
    if Role.ALPHA in keys and math.prod(source.shape(keys[Role.ALPHA])) != 1:
        findings.add("alpha is not a single number", keys[Role.ALPHA])
    for part, key in keys.items():
        if part not in (Role.ALPHA, Role.ON_INPUT) and not source.dtype(key).is_floating_point:
            findings.add("not floating-point numbers", key)
    kinds = [kind for kind, parts in _KINDS.items() if any(part in keys for part in parts)]
    if len(kinds) > 1:
        findings.add(f"{' and '.join(kinds)} for one layer", layer.a_key)
        return
    if not kinds and not any(part in keys for part in (Role.BIAS_DIFFERENCE, Role.UP_BIAS)):
        kinds = ["low-rank"]  # an alpha or a magnitude alone
    kind = kinds[0] if kinds else ""
    _check_magnitude(source, layer, kind, findings)
    _check_biases(source, layer, findings)
    missing = _missing(keys, kind)
    for part in missing:
        findings.add(f"the {part.value} matrix is missing beside", layer.a_key)
    if layer.target is None or missing or not kind:
        return
    if kind == "difference":
        _check_difference(source, keys[Role.DIFFERENCE], layer.target, findings)
    elif not layer.target.columns:
        findings.add(f"{kind} for a norm, which is a vector", layer.a_key)
    elif kind in TRANSFORM_KINDS:
        check_transform(source, layer, kind, layer.target, findings)
    elif kind == "low-rank":
        _check_low_rank(source, keys[Role.DOWN], keys[Role.UP], layer.target, findings)
    elif kind == "LoHa":
        _check_hadamard(source, layer, layer.target, findings)
    else:
        _check_kronecker(source, layer, layer.target, findings)


def updates_of(
    source: TensorSource, name: str, layer: FoundLayer, scaling: PeftScaling, findings: Findings
) -> list[tuple[str, WeightUpdate]]:
    """Read one checked layer.

    Args:
        source: the file.
        name: the layer's name in it.
        layer: its keys and place.
        scaling: what counts where the layer has no alpha.
        findings: told of values that are no numbers.

    Returns:
        Canonical keys and what is added to them.
    """
    target = layer.target
    if target is None:
        return []
    tensors: dict[Role, Tensor] = {
        part: _read(source, key, findings) for part, key in layer.keys.items() if part not in (Role.ALPHA, Role.ON_INPUT)
    }
    alpha = _alpha(source, layer, findings)
    found: list[tuple[str, WeightUpdate]] = []
    transform = transform_of(source, layer, target, tensors, alpha)
    if transform is not None:
        key, row, order = _rows_of(target)
        found.append((key, TransformUpdate(transform, (target.rows, target.columns), row, order)))
    product, rank = _product(tensors)
    scale = 1.0
    if rank is not None:
        scale = scaling.scale(name, rank) if alpha is None else alpha / rank
    elif isinstance(product, KroneckerProduct) and alpha is None and scaling.rank is not None:
        scale = scaling.scale(name, scaling.rank)
    if isinstance(product, LowRankProduct) and Role.MAGNITUDE not in tensors:
        found += [
            (part.key, LowRankUpdate(product.down, _rows(product.up, part), scale, row_start=part.row)) for part in target.parts
        ]
    elif product is not None:
        found.append(_whole(target, product, scale, _magnitude(tensors.get(Role.MAGNITUDE), target)))
    for part, factor in ((Role.BIAS_DIFFERENCE, 1.0), (Role.UP_BIAS, scale)):
        if part in tensors:
            values = Difference(tensors[part].reshape(-1, 1))
            found.append((target.bias_key, _whole(target, values, factor, None)[1]))
    return found


def _product(tensors: dict[Role, Tensor]) -> tuple[Product | None, int | None]:
    """The layer's change and its rank; no rank where alpha does not count."""
    if Role.UP in tensors:
        down, up = tensors[Role.DOWN], tensors[Role.UP]
        return LowRankProduct(down, up), down.shape[0]
    if Role.DIFFERENCE in tensors:
        values = tensors[Role.DIFFERENCE]
        return Difference(values.reshape(values.shape[0], -1)), None
    if Role.HADAMARD_1A in tensors:
        a, b, c, d = (tensors[part] for part in _HADAMARD)
        return HadamardProduct((a, b), (c, d)), b.shape[0]
    if any(part in tensors for part in _KINDS["LoKr"]):
        first, second = (tuple(tensors[part] for part in parts if part in tensors) for parts in _KRONECKER)
        # If both factors are products, trainers give them one rank.
        ranks = [factor[1].shape[0] for factor in (first, second) if len(factor) == 2]
        return KroneckerProduct(first, second), ranks[-1] if ranks else None
    return None, None


def _rows(tensor: Tensor, part: LayerRows) -> Tensor:
    return tensor[part.source_row : part.source_row + part.rows]


def _whole(target: LoRALayer, product: Product, scale: float, magnitude: Tensor | None) -> tuple[str, LayerUpdate]:
    """One update of all of a layer's rows."""
    key, row, order = _rows_of(target)
    return key, LayerUpdate(product, scale, row, order, magnitude)


def _rows_of(target: LoRALayer) -> tuple[str, int, tuple[range, ...]]:
    """The weight, the first row and, if it is another one, the order of a layer's rows, which are consecutive in one weight."""
    parts = sorted(target.parts, key=lambda part: part.row)
    order = tuple(range(part.source_row, part.source_row + part.rows) for part in parts)
    return parts[0].key, parts[0].row, order if len(order) > 1 else ()


def _magnitude(values: Tensor | None, target: LoRALayer) -> Tensor | None:
    """As [rows, 1] or [1, columns]; PEFT stores a vector of one number per row."""
    if values is None or values.shape == (1, target.columns):
        return values
    return values.reshape(-1, 1)


def _alpha(source: TensorSource, layer: FoundLayer, findings: Findings) -> float | None:
    if Role.ALPHA not in layer.keys:
        return None
    alpha = source.read(layer.keys[Role.ALPHA]).double().item()
    if not math.isfinite(alpha):
        findings.add("alpha is not a finite number", layer.keys[Role.ALPHA])
    return alpha


def _read(source: TensorSource, key: str, findings: Findings) -> Tensor:
    tensor = source.read(key)
    if not is_finite(tensor):
        findings.add("values that are infinite or not a number", key)
    shape = matrix_shape(tuple(tensor.shape))
    return tensor.reshape(shape)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the trailing ones that a 1x1 convolution's kernel has."""
    return shape[:2] if len(shape) > 2 and math.prod(shape[2:]) == 1 else shape


def _missing(keys: dict[Role, str], kind: str) -> list[Role]:
    if kind != "LoKr":
        return [part for part in _KINDS.get(kind, ()) if part not in keys]
    missing = []
    for whole, a, b in _KRONECKER:
        if whole not in keys:
            missing += [part for part in (a, b) if part not in keys] if a in keys or b in keys else [whole]
    return missing


def _check_low_rank(source: TensorSource, down_key: str, up_key: str, target: LoRALayer, findings: Findings) -> None:
    down, up = (matrix_shape(source.shape(key)) for key in (down_key, up_key))
    if len(down) != 2 or down[0] < 1 or down[1] != target.columns:
        findings.add(f"shape {list(down)}, expected [rank, {target.columns}]", down_key)
    elif up != (target.rows, down[0]):
        findings.add(f"shape {list(up)}, expected [{target.rows}, {down[0]}]", up_key)


def _check_hadamard(source: TensorSource, layer: FoundLayer, target: LoRALayer, findings: Findings) -> None:
    for a, b in (_HADAMARD[:2], _HADAMARD[2:]):
        _check_low_rank(source, layer.keys[b], layer.keys[a], target, findings)


def _check_kronecker(source: TensorSource, layer: FoundLayer, target: LoRALayer, findings: Findings) -> None:
    factors: list[tuple[int, ...]] = []
    for whole, a, b in _KRONECKER:
        present = [layer.keys[part] for part in ((whole,) if whole in layer.keys else (a, b))]
        if len([part for part in (whole, a, b) if part in layer.keys]) > len(present):
            findings.add(f"{whole.value} both whole and as a product", layer.keys[whole])
            return
        shapes = [matrix_shape(source.shape(key)) for key in present]
        flat = next((i for i, shape in enumerate(shapes) if len(shape) != 2 or min(shape) < 1), None)
        if flat is not None:
            findings.add(f"shape {list(shapes[flat])}, expected a matrix", present[flat])
            return
        if len(shapes) == 2 and shapes[0][1] != shapes[1][0]:
            findings.add(f"shape {list(shapes[1])}, expected [{shapes[0][1]}, columns]", present[1])
            return
        factors.append((shapes[0][0], shapes[-1][1]))
    rows, columns = factors[0][0] * factors[1][0], factors[0][1] * factors[1][1]
    if (rows, columns) != (target.rows, target.columns):
        findings.add(
            f"factors of shape {list(factors[0])} and {list(factors[1])} make [{rows}, {columns}], "
            f"expected [{target.rows}, {target.columns}]",
            layer.a_key,
        )


def _check_difference(source: TensorSource, key: str, target: LoRALayer, findings: Findings) -> None:
    expected = (target.rows, target.columns) if target.columns else (target.rows,)
    _expect(matrix_shape(source.shape(key)), [expected], key, findings)


def _check_magnitude(source: TensorSource, layer: FoundLayer, kind: str, findings: Findings) -> None:
    key = layer.keys.get(Role.MAGNITUDE)
    if key is None or layer.target is None:
        return
    if kind == "difference" or kind in TRANSFORM_KINDS:
        findings.add(f"a DoRA magnitude beside {'a difference' if kind == 'difference' else kind}", key)
    rows, columns = layer.target.rows, layer.target.columns
    _expect(matrix_shape(source.shape(key)), [(rows, 1), (rows,), (1, columns)], key, findings)


def _check_biases(source: TensorSource, layer: FoundLayer, findings: Findings) -> None:
    for part in (Role.BIAS_DIFFERENCE, Role.UP_BIAS):
        if part not in layer.keys or layer.target is None:
            continue
        if part is Role.UP_BIAS and Role.UP not in layer.keys:
            findings.add("a bias of an up matrix that is missing", layer.keys[part])
        if not layer.target.columns:
            findings.add("a change of the bias of a norm, which has none", layer.keys[part])
        _expect(source.shape(layer.keys[part]), [(layer.target.rows,)], layer.keys[part], findings)


def _expect(shape: tuple[int, ...], expected: Iterable[tuple[int, ...]], key: str, findings: Findings) -> None:
    allowed = list(expected)
    if shape not in allowed:
        findings.add(f"shape {list(shape)}, expected {' or '.join(str(list(one)) for one in allowed)}", key)
