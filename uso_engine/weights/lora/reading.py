"""Reading LoRA files of every common key style and kind of adapter into updates of the engine's own weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from uso_engine.errors import CheckpointError, LoRAError, MissingFileError
from uso_engine.model.params import TransformerParams
from uso_engine.weights.files.key_report import key_count, summarise_keys
from uso_engine.weights.files.recorded_file import RecordedFile
from uso_engine.weights.files.safetensors_file import SafetensorsSource
from uso_engine.weights.files.tensor_source import TensorSource
from uso_engine.weights.model_shapes import transformer_shapes

from .adapters import check_layer, updates_of
from .control import refuse_control_lora
from .found import Findings, FoundLayer
from .key_styles import KEY_STYLES
from .keys import CHANGES_ALONE, Role, is_text_encoder_key, parse_key, refusal
from .layers import KeyStyle, LoRALayer
from .low_rank import FileName, LoRA
from .repeated import drop_repeated
from .scaling import PeftScaling, read_scaling
from .update import WeightUpdate

logger = logging.getLogger(__name__)

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
        lora = parse_lora(source, params, read_scaling(file, source.metadata))
        return replace(lora, name=FileName(lora.name, RecordedFile.of(file).sha256))
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


def parse_lora(source: TensorSource, params: TransformerParams, scaling: PeftScaling | None = None) -> LoRA:
    """Understand a LoRA's tensors.

    Args:
        source: its tensors.
        params: sizes of the transformer that it is for.
        scaling: what counts where a layer has no ``alpha`` tensor.

    Raises:
        LoRAError: see :func:`read_lora`.
    """
    findings = Findings()
    layers = _collect(source, params, findings)
    refuse_control_lora(source, layers)
    for _, layer in sorted(layers.items()):
        check_layer(source, layer, findings)
    findings.raise_if_any(source.describe())
    if not layers:
        raise LoRAError(_nothing_found(source, findings))
    scaling = scaling or PeftScaling()
    _check_presence(layers, params, scaling, findings)
    findings.raise_if_any(source.describe())
    layers = drop_repeated(source, layers, scaling, findings)
    updates: dict[str, list[WeightUpdate]] = {}
    # By name, so that nothing depends on the order of keys in the file.
    for name, layer in sorted(layers.items()):
        for key, update in updates_of(source, name, layer, scaling, findings):
            updates.setdefault(key, []).append(update)
    findings.raise_if_any(source.describe())
    _report(source, findings)
    style = " + ".join(sorted({layer.style for layer in layers.values()}))
    frozen = MappingProxyType({key: tuple(found) for key, found in updates.items()})
    return LoRA(source.describe(), style, frozen, len(findings.text_encoders))


def _check_presence(
    layers: Mapping[str, FoundLayer], params: TransformerParams, scaling: PeftScaling, findings: Findings
) -> None:
    """A layer may have no bias, and settings may speak of magnitudes that the file does not have."""
    known = transformer_shapes(params).keys()
    for layer in layers.values():
        for part in (Role.BIAS_DIFFERENCE, Role.UP_BIAS):
            if part in layer.keys and layer.target and layer.target.bias_key not in known:
                findings.add("a change of a bias that the layer does not have", layer.keys[part])
    if scaling.uses_dora and not any(Role.MAGNITUDE in layer.keys for layer in layers.values()):
        findings.add("the settings say DoRA (use_dora), but no layer has a magnitude; one of them", next(iter(layers)))


def _report(source: TensorSource, findings: Findings) -> None:
    name = source.describe()
    if findings.text_encoders:
        logger.warning(
            "%s: %d keys for text encoders are left out, only the transformer is changed: %s",
            name,
            len(findings.text_encoders),
            summarise_keys(findings.text_encoders),
        )
    if findings.repeated:
        keys = summarise_keys(findings.repeated)
        logger.info("%s: holds layers twice, in two key styles; taken once, without: %s", name, keys)
    if findings.zero:
        logger.info("%s: differences that are zero are left out: %s", name, summarise_keys(findings.zero))


def _collect(source: TensorSource, params: TransformerParams, findings: Findings) -> dict[str, FoundLayer]:
    """Sort the keys by layer; what cannot be used goes to the findings."""
    tables = [(style, style.layers(params)) for style in KEY_STYLES]
    known = {_numberless(name) for _, table in tables for name in table}
    known.update(_numberless(name) for style in KEY_STYLES for name in style.layers(_ONE_OF_EACH))
    layers: dict[str, FoundLayer] = {}
    refused: set[str] = set()
    every_key = frozenset(source.keys())
    for key in source.keys():  # noqa: SIM118 - a source is not a mapping
        if is_text_encoder_key(key):
            findings.text_encoders.append(key)
            continue
        parsed = parse_key(key, beside=every_key) if len(key) <= _LONGEST_KEY else None
        kind = refusal(key) if len(key) <= _LONGEST_KEY and parsed is None else None
        if kind is not None:
            refused.add(key.rsplit(".", 1)[0])
            findings.add(f"{kind}, which is not supported", key)
        elif parsed is None:
            findings.add("not a key of a LoRA", key)
        elif parsed.part in CHANGES_ALONE and not source.read(key).any():
            findings.zero.append(key)
        elif parsed.part in layers.setdefault(parsed.layer, FoundLayer()).keys:
            findings.add("the same part of a layer twice", key)
        else:
            layers[parsed.layer].keys[parsed.part] = key
    for name in [name for name, layer in layers.items() if name in refused and set(layer.keys) == {Role.ALPHA}]:
        del layers[name]  # the alpha of a refused adapter, whose other keys are in the findings
    for name, layer in layers.items():
        _locate(name, layer, tables, known, findings)
    return layers


_ONE_OF_EACH = TransformerParams(depth=1, depth_single_blocks=1)


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _locate(
    name: str, layer: FoundLayer, tables: list[tuple[KeyStyle, Mapping[str, LoRALayer]]], known: set[str], findings: Findings
) -> None:
    for style, table in tables:
        for prefix in style.prefixes:
            if name.startswith(prefix) and name[len(prefix) :] in table:
                layer.target, layer.style, layer.prefix = table[name[len(prefix) :]], style.name, prefix
                return
    stripped = (name.removeprefix(prefix) for style in KEY_STYLES for prefix in style.prefixes)
    reason = (
        "layers that this transformer does not have"
        if any(_numberless(n) in known for n in stripped)
        else f"layers that are not known (tried the key styles {', '.join(style.name for style in KEY_STYLES)})"
    )
    for key in layer.keys.values():
        findings.add(reason, key)


def _nothing_found(source: TensorSource, findings: Findings) -> str:
    name = source.describe()
    if findings.text_encoders:
        return (
            f"{name}: only layers of text encoders ({key_count(findings.text_encoders)}); a LoRA for the transformer is needed"
        )
    if findings.zero:
        return f"{name}: only differences that are zero ({key_count(findings.zero)}); it would change nothing"
    return f"{name}: the file holds no tensors; a LoRA for the transformer is needed"
