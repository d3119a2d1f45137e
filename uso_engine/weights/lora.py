"""Reading LoRA files of every common key style into low-rank updates of the engine's own weights."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from uso_engine.errors import CheckpointError, LoRAError, MissingFileError
from uso_engine.model.params import TransformerParams
from uso_engine.weights import lora_keys_bfl, lora_keys_diffusers, lora_keys_kohya, lora_keys_uso
from uso_engine.weights.finite import is_finite
from uso_engine.weights.key_report import bulleted, key_count, summarise_keys
from uso_engine.weights.lora_layers import KeyStyle, LoRALayer
from uso_engine.weights.lora_parts import Part, is_text_encoder_key, parse_key, refusal
from uso_engine.weights.lora_scaling import PeftScaling, read_scaling
from uso_engine.weights.low_rank import LoRA, LoRASet, LowRankUpdate
from uso_engine.weights.safetensors_file import SafetensorsSource
from uso_engine.weights.tensor_source import TensorSource

__all__ = ["KEY_STYLES", "LoRA", "LoRASet", "LowRankUpdate", "parse_lora", "read_lora"]

logger = logging.getLogger(__name__)

KEY_STYLES: tuple[KeyStyle, ...] = (
    lora_keys_uso.STYLE,
    lora_keys_bfl.STYLE,
    lora_keys_diffusers.STYLE,
    lora_keys_kohya.STYLE,
)

_LONGEST_KEY = 300
_USUAL_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


def read_lora(path: Path, params: TransformerParams) -> LoRA:
    """Read a LoRA file.

    Args:
        path: a safetensors file, or a folder with one (PEFT's with its ``adapter_config.json``).
        params: sizes of the transformer that it is for.

    Raises:
        MissingFileError: it is not there.
        LoRAError: it is damaged, of another kind, for other layers or sizes, or holds values that are not numbers; the message
            lists every key at fault.
    """
    file = _lora_file(path)
    try:
        source = SafetensorsSource(file)
    except MissingFileError:
        raise
    except CheckpointError as error:
        raise LoRAError(str(error)) from error
    try:
        return parse_lora(source, params, read_scaling(file, source.metadata))
    except LoRAError:
        raise
    except CheckpointError as error:
        raise LoRAError(str(error)) from error
    finally:
        source.close()


def _lora_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.safetensors"))
    usual = [file for file in files if file.name in _USUAL_NAMES]
    if len(usual) == 1 or len(files) == 1:
        return (usual or files)[0]
    if not files:
        raise MissingFileError(f"{path}: there is no .safetensors file in this folder")
    raise LoRAError(
        f"{path}: several files lie in this folder, name the one you want: {', '.join(file.name for file in files)}"
    )


@dataclass
class _Layer:
    """The keys of one layer as they are found, and where it lies in the model."""

    keys: dict[Part, str] = field(default_factory=dict)
    target: LoRALayer | None = None
    style: str = ""


@dataclass
class _Findings:
    """What is wrong with a file, by what is wrong, and what was left out."""

    problems: dict[str, list[str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def add(self, problem: str, key: str) -> None:
        self.problems.setdefault(problem, []).append(key)

    def raise_if_any(self, name: str) -> None:
        if self.problems:
            lines = [f"{problem}: {summarise_keys(keys)}" for problem, keys in self.problems.items()]
            raise LoRAError(bulleted(f"{name} cannot be used as a LoRA for this transformer", lines))


def parse_lora(source: TensorSource, params: TransformerParams, scaling: PeftScaling | None = None) -> LoRA:
    """Understand a LoRA's tensors.

    Args:
        source: its tensors.
        params: sizes of the transformer that it is for.
        scaling: what counts where a layer has no ``alpha`` tensor.

    Raises:
        LoRAError: see :func:`read_lora`.
    """
    findings = _Findings()
    layers = _collect(source, params, findings)
    _check_shapes(source, layers, findings)
    findings.raise_if_any(source.describe())
    if not layers:
        raise LoRAError(_nothing_found(source, findings))
    updates: dict[str, list[LowRankUpdate]] = {}
    # By name, so that the order of the sums does not depend on the order of keys in the file.
    for name, layer in sorted(layers.items()):
        for key, update in _updates(source, name, layer, scaling or PeftScaling(), findings):
            updates.setdefault(key, []).append(update)
    findings.raise_if_any(source.describe())
    if findings.skipped:
        logger.warning(
            "%s: %d keys for text encoders are left out, only the transformer is changed: %s",
            source.describe(),
            len(findings.skipped),
            summarise_keys(findings.skipped),
        )
    style = " + ".join(sorted({layer.style for layer in layers.values()}))
    frozen = MappingProxyType({key: tuple(found) for key, found in updates.items()})
    return LoRA(source.describe(), style, frozen, len(findings.skipped))


def _collect(source: TensorSource, params: TransformerParams, findings: _Findings) -> dict[str, _Layer]:
    """Sort the keys by layer; what cannot be used goes to the findings."""
    tables = [(style, style.layers(params)) for style in KEY_STYLES]
    known = {_numberless(name) for _, table in tables for name in table}
    known.update(_numberless(name) for style in KEY_STYLES for name in style.layers(_ONE_OF_EACH))
    layers: dict[str, _Layer] = {}
    refused: set[str] = set()
    for key in source.keys():  # noqa: SIM118 - a source is not a mapping
        if is_text_encoder_key(key):
            findings.skipped.append(key)
            continue
        parsed = parse_key(key) if len(key) <= _LONGEST_KEY else None
        kind = refusal(key) if len(key) <= _LONGEST_KEY and parsed is None else None
        if kind is not None:
            refused.add(key.rsplit(".", 1)[0])
            findings.add(f"{kind}, which is not supported", key)
        elif parsed is None:
            findings.add("not a key of a LoRA", key)
        elif parsed.part in layers.setdefault(parsed.layer, _Layer()).keys:
            findings.add("the same part of a layer twice", key)
        else:
            layers[parsed.layer].keys[parsed.part] = key
    for name in [name for name, layer in layers.items() if name in refused and set(layer.keys) == {Part.ALPHA}]:
        del layers[name]  # the alpha of a refused adapter, whose other keys are in the findings
    for name, layer in layers.items():
        _locate(name, layer, tables, known, findings)
    return layers


_ONE_OF_EACH = TransformerParams(depth=1, depth_single_blocks=1)


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _locate(
    name: str, layer: _Layer, tables: list[tuple[KeyStyle, Mapping[str, LoRALayer]]], known: set[str], findings: _Findings
) -> None:
    for style, table in tables:
        for prefix in style.prefixes:
            if name.startswith(prefix) and name[len(prefix) :] in table:
                layer.target, layer.style = table[name[len(prefix) :]], style.name
                return
    stripped = (name.removeprefix(prefix) for style in KEY_STYLES for prefix in style.prefixes)
    reason = (
        "layers that this transformer does not have"
        if any(_numberless(n) in known for n in stripped)
        else "layers that are not known"
    )
    for key in layer.keys.values():
        findings.add(reason, key)


def _check_shapes(source: TensorSource, layers: Mapping[str, _Layer], findings: _Findings) -> None:
    taken: dict[str, list[tuple[range, str]]] = {}
    for name, layer in sorted(layers.items()):
        _check_layer(source, layer, findings)
        for rows in layer.target.parts if layer.target else ():
            mine = range(rows.row, rows.row + rows.rows)
            for other, by in taken.get(rows.key, []):
                if mine.start < other.stop and other.start < mine.stop:
                    findings.add(f"the same rows of {rows.key} as {by}, in another key style", next(iter(layer.keys.values())))
            taken.setdefault(rows.key, []).append((mine, name))


def _check_layer(source: TensorSource, layer: _Layer, findings: _Findings) -> None:
    keys = layer.keys
    if Part.ALPHA in keys and math.prod(source.shape(keys[Part.ALPHA])) != 1:
        findings.add("alpha is not a single number", keys[Part.ALPHA])
    for part in (Part.DOWN, Part.UP):
        if part not in keys:
            findings.add(f"the {part.value} matrix is missing beside", next(iter(keys.values())))
        elif not source.dtype(keys[part]).is_floating_point:
            findings.add("not floating-point numbers", keys[part])
    if layer.target is None or Part.DOWN not in keys or Part.UP not in keys:
        return
    down, up = (_matrix_shape(source.shape(keys[part])) for part in (Part.DOWN, Part.UP))
    if len(down) != 2 or down[0] < 1 or down[1] != layer.target.columns:
        findings.add(f"shape {list(down)}, expected [rank, {layer.target.columns}]", keys[Part.DOWN])
    elif up != (layer.target.rows, down[0]):
        findings.add(f"shape {list(up)}, expected [{layer.target.rows}, {down[0]}]", keys[Part.UP])


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the trailing ones that a 1x1 convolution's kernel has."""
    return shape[:2] if len(shape) > 2 and math.prod(shape[2:]) == 1 else shape


def _updates(
    source: TensorSource, name: str, layer: _Layer, scaling: PeftScaling, findings: _Findings
) -> list[tuple[str, LowRankUpdate]]:
    """The updates of one layer; values that are not numbers go to the findings."""
    if layer.target is None:
        return []
    down, up = (_read_matrix(source, layer.keys[part], findings) for part in (Part.DOWN, Part.UP))
    scale = scaling.scale(name, down.shape[0])
    if Part.ALPHA in layer.keys:
        alpha = source.read(layer.keys[Part.ALPHA]).double().item()
        if not math.isfinite(alpha):
            findings.add("alpha is not a finite number", layer.keys[Part.ALPHA])
        scale = alpha / down.shape[0]
    return [
        (part.key, LowRankUpdate(down, up[part.source_row : part.source_row + part.rows], scale, row_start=part.row))
        for part in layer.target.parts
    ]


def _read_matrix(source: TensorSource, key: str, findings: _Findings) -> Tensor:
    tensor = source.read(key)
    if not is_finite(tensor):
        findings.add("values that are infinite or not a number", key)
    return tensor.reshape(tensor.shape[0], -1)


def _nothing_found(source: TensorSource, findings: _Findings) -> str:
    name = source.describe()
    if findings.skipped:
        return f"{name}: only layers of text encoders ({key_count(findings.skipped)}); a LoRA for the transformer is needed"
    return f"{name}: the file holds no tensors; a LoRA for the transformer is needed"
