"""Build the files of uso-tiny: tokenizers, encoder configurations and, on request, random weights.

``python -m uso_engine.embedded.build`` writes tokenizers and configurations. With ``--random-weights`` it replaces every weight
file too, by numbers of the seeded recipe in the names and layout of the full-size files. Trained weights come from the training
program.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from uso_engine.config import EngineConfig, load_config
from uso_engine.embedded.corpus import captions
from uso_engine.embedded.tokenizer_training import write_clip_tokenizer, write_t5_tokenizer
from uso_engine.errors import ConfigError
from uso_engine.model.projector import StyleProjector
from uso_engine.weights.autoencoder_keys import autoencoder_shapes
from uso_engine.weights.files.safetensors_file import write_safetensors
from uso_engine.weights.files.tensor_source import shapes_of
from uso_engine.weights.lora.key_styles import uso_lora_shapes
from uso_engine.weights.model_shapes import Shapes, module_shapes, transformer_shapes
from uso_engine.weights.recipe import recipe_source

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "uso-tiny"
LORA_RANK = 8
SALT = "uso-tiny/"
STORED_DTYPE = torch.bfloat16
_CAPTIONS = 20_000
_VISION = {"image_size": 64, "patch_size": 8, "layers": 21, "heads": 4, "mlp_width": 128}
_T5 = {"layers": 2, "heads": 4, "head_width": 16, "mlp_width": 128}
_CLIP = {"layers": 2, "heads": 4, "mlp_width": 96}


def write_tokenizers(folder: Path) -> tuple[int, int]:
    """Write both tokenizers, the same on every run.

    Args:
        folder: gets ``t5`` and ``clip``.

    Returns:
        The sizes of their vocabularies, T5's first.
    """
    texts = list(captions(_CAPTIONS))
    t5 = write_t5_tokenizer(folder / "t5", texts, least_count=20, subwords=250)
    return t5, write_clip_tokenizer(folder / "clip", texts, merges=500)


def write_encoder_configs(folder: Path, config: EngineConfig, vocabularies: tuple[int, int]) -> None:
    """Write the encoders' config.json files and the image processor's.

    Args:
        folder: gets ``t5``, ``clip`` and ``vision``.
        config: says the widths that the transformer and the projector take.
        vocabularies: sizes of T5's and CLIP's vocabulary.

    Raises:
        ConfigError: a section is missing, or asks for what these encoders cannot be.
    """
    params, projector, clip = config.transformer.params, config.projector, config.clip
    if projector is None or clip is None:
        raise ConfigError("the embedded model needs [projector] and [clip]")
    patches = (_VISION["image_size"] // _VISION["patch_size"]) ** 2
    if patches != projector.vision_tokens:
        raise ConfigError(f"vision_tokens must be {patches}, got {projector.vision_tokens}")
    _write_json(folder / "t5" / "config.json", _t5_config(params.context_in_dim, vocabularies[0]))
    _write_json(folder / "clip" / "config.json", _clip_config(params.vec_in_dim, vocabularies[1], clip.max_length))
    _write_json(folder / "vision" / "config.json", _vision_config(projector.vision_width))
    _write_json(folder / "vision" / "preprocessor_config.json", _image_processor_config(_VISION["image_size"]))


def weight_files(folder: Path, config: EngineConfig) -> dict[Path, tuple[str, Shapes]]:
    """Every weight file of the model: what the recipe puts before its keys, and the keys' shapes.

    Args:
        folder: of the model, with the encoders' config.json files in it.
        config: of the model.

    Raises:
        ConfigError: a part of the model has no section in the configuration.
    """
    projector, autoencoder = config.projector, config.autoencoder
    if projector is None or autoencoder is None:
        raise ConfigError("the embedded model needs [projector] and [autoencoder]")
    params = config.transformer.params
    with torch.device("meta"):
        style = StyleProjector(projector.vision_tokens, projector.vision_width, projector.style_tokens, params.hidden_size)
    return {
        folder / "flux1-tiny.safetensors": ("", transformer_shapes(params)),
        folder / "dit_lora.safetensors": ("", uso_lora_shapes(params, LORA_RANK)),
        folder / "projector.safetensors": ("", _prefixed_shapes(style, "feature_embedder.")),
        folder / "ae.safetensors": ("ae.", autoencoder_shapes(autoencoder.params)),
        **{folder / name / "model.safetensors": (f"{name}.", shapes) for name, shapes in _encoder_shapes(folder).items()},
    }


def write_random_weights(folder: Path, config: EngineConfig) -> None:
    """Write every weight file from the seeded recipe, in bfloat16.

    Args:
        folder: of the model, with the encoders' config.json files in it.
        config: of the model.
    """
    for path, (prefix, shapes) in weight_files(folder, config).items():
        source = recipe_source(shapes, salt=SALT, dtype=STORED_DTYPE, draw_prefix=prefix)
        write_safetensors(path, source, {"format": "pt", "origin": f"random numbers by the recipe with salt {SALT!r}"})
        logger.info("%s: %d tensors, %d bytes", path, len(shapes_of(source)), path.stat().st_size)


def _t5_config(width: int, vocabulary: int) -> dict[str, object]:
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": _T5["head_width"],
        "d_ff": _T5["mlp_width"],
        "num_heads": _T5["heads"],
        "num_layers": _T5["layers"],
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def _clip_config(width: int, vocabulary: int, positions: int) -> dict[str, object]:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": _CLIP["mlp_width"],
        "num_attention_heads": _CLIP["heads"],
        "num_hidden_layers": _CLIP["layers"],
        "max_position_embeddings": positions,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def _vision_config(width: int) -> dict[str, object]:
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": _VISION["mlp_width"],
        "num_attention_heads": _VISION["heads"],
        "num_hidden_layers": _VISION["layers"],
        "num_channels": 3,
        "vision_use_head": False,
        "image_size": _VISION["image_size"],
        "patch_size": _VISION["patch_size"],
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }


def _image_processor_config(side: int) -> dict[str, object]:
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _encoder_shapes(folder: Path) -> dict[str, Shapes]:
    """Shapes of the three encoders' weights under the names that the full-size files have."""
    from transformers import CLIPTextConfig, CLIPTextModel, SiglipVisionConfig, SiglipVisionModel, T5Config, T5EncoderModel

    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config.from_pretrained(folder / "t5"))
        clip = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "clip"))
        vision = SiglipVisionModel(SiglipVisionConfig.from_pretrained(folder / "vision"))
    # The same table as shared.weight; the full-size file has it once too.
    t5_shapes = {key: shape for key, shape in module_shapes(t5).items() if key != "encoder.embed_tokens.weight"}
    return {
        "t5": t5_shapes,
        "clip": _prefixed_shapes(clip, "text_model."),
        "vision": _prefixed_shapes(vision, "vision_model."),
    }


def _prefixed_shapes(module: nn.Module, prefix: str) -> Shapes:
    """Shapes of a module's weights with one prefix, whether the module's own names have it or not."""
    return {prefix + key.removeprefix(prefix): shape for key, shape in module_shapes(module).items()}


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Build what the arguments ask for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files go (default: inside the package)")
    parser.add_argument("--random-weights", action="store_true", help="replace every weight file by random numbers")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_config("uso-tiny")
    vocabularies = write_tokenizers(arguments.folder)
    logger.info("tokenizers: %d pieces for T5, %d tokens for CLIP", *vocabularies)
    write_encoder_configs(arguments.folder, config, vocabularies)
    if arguments.random_weights:
        write_random_weights(arguments.folder, config)


if __name__ == "__main__":
    main()
