"""Alpha over rank, from wherever a LoRA file keeps it; damaged or foreign settings are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from narrow_model import NARROW

from uso_engine.errors import LoRAError
from uso_engine.weights.files.safetensors_file import write_safetensors
from uso_engine.weights.lora import LoRA, read_lora
from uso_engine.weights.recipe import draw

PARAMS = NARROW
C = PARAMS.hidden_size
Q, K = "transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_k"


def _two_layers(folder: Path, metadata: Mapping[str, str] | None = None, name: str = "l.safetensors") -> Path:
    tensors = {}
    for layer in (Q, K):
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = (
            draw(f"{layer}.a", (4, C)),
            draw(f"{layer}.b", (C, 4)),
        )
    write_safetensors(folder / name, tensors, metadata)
    return folder / name


def _scales(lora: LoRA) -> dict[int, float]:
    return {update.rows.start // C: update.scale for update in lora.updates["double_blocks.0.img_attn.qkv.weight"]}


def test_alphas_in_diffusers_metadata(tmp_path: Path) -> None:
    settings = {"lora_alpha": 8, "r": 4, "alpha_pattern": {"transformer_blocks.0.attn.to_k": 2}, "use_dora": False}
    for prefix in ("", "transformer."):
        metadata = {"lora_adapter_metadata": json.dumps({prefix + key: value for key, value in settings.items()})}
        assert _scales(read_lora(_two_layers(tmp_path, metadata), PARAMS)) == {0: 2.0, 1: 0.5}
    metadata = {"lora_adapter_metadata": json.dumps({"lora_alpha": 8, "use_rslora": True})}
    assert _scales(read_lora(_two_layers(tmp_path, metadata), PARAMS)) == {0: 8 / math.sqrt(4), 1: 8 / math.sqrt(4)}
    assert _scales(read_lora(_two_layers(tmp_path), PARAMS)) == {0: 1.0, 1: 1.0}


def test_peft_folders_keep_alpha_in_their_config(tmp_path: Path) -> None:
    _two_layers(tmp_path, name="adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 16, "r": 4, "bias": "none"}))
    assert _scales(read_lora(tmp_path, PARAMS)) == {0: 4.0, 1: 4.0}
    assert _scales(read_lora(tmp_path / "adapter_model.safetensors", PARAMS)) == {0: 4.0, 1: 4.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ('{"lora_alpha": "8"}', "lora_alpha is not a finite number"),
        ('{"lora_alpha": NaN}', "lora_alpha is not a finite number"),
        ('{"alpha_pattern": [1]}', "alpha_pattern is not an object"),
        ('{"alpha_pattern": {"(a+)+$": 1}}', "not a plain layer name"),
        ('{"use_dora": true}', "DoRA"),
        ('{"peft_type": "OFT"}', "type OFT, expected LORA, LOHA, LOKR"),
        ('{"peft_type": "LOKR", "r": 0}', "r is not positive"),
    ],
)
def test_damaged_or_foreign_adapter_settings(settings: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(LoRAError, match=message):
        read_lora(_two_layers(tmp_path, {"lora_adapter_metadata": settings}), PARAMS)
