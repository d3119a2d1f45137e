"""How strongly a LoRA's layers count: alpha over rank, wherever the file keeps alpha.

kohya's files keep an ``alpha`` tensor for every layer. diffusers keeps PEFT's settings as JSON in the file's metadata
(``lora_adapter_metadata``), PEFT in ``adapter_config.json`` beside it. Without any of them the product counts as it is.
Source: PEFT's LoraConfig (lora_alpha, alpha_pattern, use_rslora), LoHaConfig and LoKrConfig (alpha, r), and its matching of
patterns to module names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from uso_engine.errors import LoRAError
from uso_engine.weights.files.key_report import short_key

# PEFT's types of adapters that are read, and what each calls its alpha.
_KINDS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
_METADATA_KEY = "lora_adapter_metadata"
_CONFIG_FILE = "adapter_config.json"
_MAX_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True)
class PeftScaling:
    """PEFT's settings that scale a layer.

    Args:
        alpha: of every layer that no pattern names; None where the file says nothing, which means alpha = rank.
        patterns: alphas of single layers, by the end of their path.
        rank_stabilised: divide by the root of the rank instead of the rank.
        uses_dora: layers have magnitudes; a file without any is not whole.
        rank: of PEFT's LoKr, which divides by it where a layer's factors show none.
    """

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    uses_dora: bool = False
    rank: float | None = None

    def scale(self, layer: str, rank: float) -> float:
        """The factor of one layer's product.

        Args:
            layer: its name in the file.
            rank: rows of its ``down`` matrix.
        """
        alpha = next((a for end, a in self.patterns.items() if layer == end or layer.endswith(f".{end}")), self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_scaling(path: Path, metadata: Mapping[str, str]) -> PeftScaling:
    """Find PEFT's settings for a LoRA file.

    Args:
        path: of the file; a neighbouring ``adapter_config.json`` belongs to it if it has PEFT's file name.
        metadata: of the file.

    Raises:
        LoRAError: the settings are damaged, or are for another kind of adapter.
    """
    if _METADATA_KEY in metadata:
        settings = _parsed(metadata[_METADATA_KEY], f"{path}: the metadata {_METADATA_KEY}")
        # Pipelines put the model's name before every setting, models do not.
        prefix = "transformer." if any(key.startswith("transformer.") for key in settings) else ""
        return _scaling({key.removeprefix(prefix): v for key, v in settings.items() if key.startswith(prefix)}, str(path))
    config = path.with_name(_CONFIG_FILE)
    if path.name == "adapter_model.safetensors" and config.is_file():
        try:
            if config.stat().st_size > _MAX_CONFIG_BYTES:
                raise LoRAError(f"{config}: {config.stat().st_size} bytes are too many for an adapter's settings")
            text = config.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LoRAError(f"{config}: cannot be read: {error}") from error
        return _scaling(_parsed(text, str(config)), str(config))
    return PeftScaling()


def _parsed(text: str, name: str) -> dict[str, object]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoRAError(f"{name} is not JSON: {short_key(str(error))}") from error
    if not isinstance(settings, dict):
        raise LoRAError(f"{name} is not a JSON object")
    return settings


def _scaling(settings: Mapping[str, object], name: str) -> PeftScaling:
    kind = str(settings.get("peft_type") or "LORA").rsplit(".", 1)[-1].upper()
    if kind not in _KINDS:
        raise LoRAError(f"{name}: the adapter is of type {short_key(kind)}, expected {', '.join(_KINDS)}")
    alpha = settings.get(_KINDS[kind])
    rank = settings.get("r") if kind == "LOKR" else None
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise LoRAError(f"{name}: alpha_pattern is not an object")
    odd = [key for key in patterns if not re.fullmatch(r"\^?[\w.-]{1,300}", key)]
    if odd:
        raise LoRAError(f"{name}: alpha_pattern is not a plain layer name: {', '.join(short_key(key) for key in odd[:10])}")
    return PeftScaling(
        None if alpha is None else _number(alpha, f"{name}: lora_alpha"),
        {key.removeprefix("^"): _number(value, f"{name}: alpha_pattern of {key}") for key, value in patterns.items()},
        settings.get("use_rslora") not in (None, False),
        settings.get("use_dora") not in (None, False),
        None if rank is None else _positive(rank, f"{name}: r"),
    )


def _positive(value: object, name: str) -> float:
    number = _number(value, name)
    if number <= 0:
        raise LoRAError(f"{name} is not positive: {number:g}")
    return number


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LoRAError(f"{name} is not a finite number: {short_key(repr(value))}")
    return float(value)
