"""The small model of the reference cases, written to files in the true formats so that the engine's own loaders read it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from uso_engine.conditioning.docstrings import require_docstrings
from uso_engine.config import AutoencoderConfig, EngineConfig, parse_config
from uso_engine.model.params import TransformerParams
from uso_engine.model.projector import StyleProjector
from uso_engine.weights.autoencoder_keys import AutoencoderParams, autoencoder_shapes
from uso_engine.weights.files.safetensors_file import write_safetensors
from uso_engine.weights.lora.key_styles import uso_lora_shapes
from uso_engine.weights.model_shapes import module_shapes, transformer_shapes
from uso_engine.weights.recipe import draw

from .case import CaseSettings

_LORA_RANK = 8
_VISION_TOKENS, _VISION_WIDTH, _STYLE_TOKENS = 16, 48, 8
_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": _VISION_WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 21,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
_PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "do_resize": True,
    "size": {"height": 56, "width": 56},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def small_params(guidance_embed: bool) -> TransformerParams:
    """Sizes of the reference cases' transformer."""
    return TransformerParams(
        vec_in_dim=96,
        context_in_dim=128,
        hidden_size=256,
        num_heads=2,
        depth=2,
        depth_single_blocks=3,
        guidance_embed=guidance_embed,
    )


def write_small_model(settings: CaseSettings, folder: Path) -> EngineConfig:
    """Write transformer, LoRA, projector and vision encoder for a case.

    Args:
        settings: of the case; its salt, dtype, LoRA and guidance embedding decide the files.
        folder: an existing, empty folder.

    Returns:
        A configuration that names the files.
    """
    params = small_params(settings.guidance_embed)
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32

    def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {key: draw(key, shape, settings.salt, dtype) for key, shape in shapes.items()}

    write_safetensors(folder / "flux1-dev.safetensors", drawn(transformer_shapes(params)))
    write_safetensors(folder / "dit_lora.safetensors", drawn(uso_lora_shapes(params, _LORA_RANK)))
    shapes = module_shapes(StyleProjector(_VISION_TOKENS, _VISION_WIDTH, _STYLE_TOKENS, params.hidden_size, device="meta"))
    write_safetensors(folder / "projector.safetensors", drawn({f"feature_embedder.{key}": s for key, s in shapes.items()}))
    _write_vision_encoder(folder / "vision", settings.salt)
    return parse_config(
        {
            "name": "reference-case",
            "transformer": {"checkpoint": "flux1-dev.safetensors", "params": params},
            "loras": [{"path": "dit_lora.safetensors", "weight": 1.0}] if settings.lora else [],
            "projector": {
                "checkpoint": "projector.safetensors",
                "vision_tokens": _VISION_TOKENS,
                "vision_width": _VISION_WIDTH,
                "style_tokens": _STYLE_TOKENS,
            },
            "vision": {"folder": "vision"},
            "base_folder": folder,
        }
    )


def write_small_autoencoder(params: AutoencoderParams, salt: str, folder: Path) -> tuple[AutoencoderConfig, Path]:
    """Write an autoencoder drawn by the recipe.

    Returns:
        Its configuration and the file.
    """
    path = folder / "ae.safetensors"
    shapes = autoencoder_shapes(params)
    write_safetensors(path, {key: draw(f"ae.{key}", shape, salt) for key, shape in shapes.items()})
    return AutoencoderConfig(checkpoint=path.name, params=params), path


def _write_vision_encoder(folder: Path, salt: str) -> None:
    """A SiglipVisionModel folder; the vision encoder stays in float32 in every case."""
    require_docstrings()
    from transformers import SiglipVisionConfig, SiglipVisionModel

    folder.mkdir()
    with torch.device("meta"):
        module = SiglipVisionModel(SiglipVisionConfig.from_dict(dict(_VISION)))
    tensors = {}
    for key, value in module.state_dict().items():
        name = key.removeprefix("vision_model.")
        tensors[f"vision_model.{name}"] = draw(f"vision.{name}", tuple(value.shape), salt)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**_VISION, "architectures": ["SiglipVisionModel"]}), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR), encoding="utf-8")
