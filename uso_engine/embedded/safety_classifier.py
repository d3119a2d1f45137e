"""Build uso-tiny's safety classifier: a real Vision Transformer whose weights are worked out by hand to know one test pattern.

It shows that the path works: images are classified, a flagged one becomes black, the response says so. It detects **nothing
real**. What it flags is a checkerboard of 8x8 tiles, magenta and green, across the whole picture.

How the weights do it: each 8x8 patch is compared with the pattern (a matched filter: 1 for the pattern, 0 on average for
anything unrelated, -1 for its negative); one attention layer with even weights averages the patches into the class token; the
classifier asks whether that average is above a half. Beside the answer a constant 4 stands in every token, so that layer
normalisation, which divides by the spread of a token, divides every token by nearly the same number. Everything else is zero.

``python -m uso_engine.embedded.safety_classifier`` writes the folder again, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uso_engine.imaging.atomic import write_atomically
from uso_engine.weights.files.safetensors_file import write_safetensors

FOLDER = Path(__file__).parent / "uso-tiny" / "safety"

_SIDE, _PATCH, _WIDTH, _TILES = 32, 8, 16, 8
_TOKENS = (_SIDE // _PATCH) ** 2 + 1
_MAGENTA, _GREEN = (255, 0, 255), (0, 255, 0)
_CONSTANT = 4.0
_SHARPNESS = 40.0

_CONFIG = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": _SIDE,
    "patch_size": _PATCH,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "id2label": {"0": "normal", "1": "nsfw"},
    "label2id": {"normal": 0, "nsfw": 1},
    "dtype": "float32",
}
_PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": _SIDE, "width": _SIDE},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_README = """# uso-tiny's safety classifier

A demonstration of the safety path, and **no protection**: it detects nothing real. It is a Vision Transformer with hand-made
weights that flags one test pattern, a checkerboard of 8x8 magenta and green tiles across the picture, and lets everything else
pass. A service that faces people needs a trained classifier, such as the default of the full-size configurations.

The files are this project's own, under its licence, written by `python -m uso_engine.embedded.safety_classifier`.
"""


def flagged_pattern(width: int, height: int) -> Image.Image:
    """The picture that the classifier flags.

    Args:
        width: in pixels, at least 8.
        height: in pixels, at least 8.

    Returns:
        A checkerboard of 8x8 tiles, magenta at the top left.
    """
    rows = np.arange(height)[:, None] * _TILES // height
    columns = np.arange(width)[None] * _TILES // width
    odd = ((rows + columns) % 2).astype(bool)[..., None]
    return Image.fromarray(np.where(odd, np.array(_GREEN, np.uint8), np.array(_MAGENTA, np.uint8)))


def classifier_weights() -> dict[str, Tensor]:
    """The weights, in the names of transformers' ViTForImageClassification files."""
    width, layer = _WIDTH, "vit.encoder.layer.0"
    weights = {
        "vit.embeddings.cls_token": torch.zeros(1, 1, width),
        "vit.embeddings.position_embeddings": torch.zeros(1, _TOKENS, width),
        "vit.embeddings.patch_embeddings.projection.weight": torch.zeros(width, 3, _PATCH, _PATCH),
        "vit.embeddings.patch_embeddings.projection.bias": torch.zeros(width),
        "classifier.weight": torch.zeros(2, width),
        "classifier.bias": torch.zeros(2),
    }
    for name in ("attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense"):
        weights[f"{layer}.{name}.weight"] = torch.zeros(width, width)
        weights[f"{layer}.{name}.bias"] = torch.zeros(width)
    for name in ("intermediate.dense", "output.dense"):
        weights[f"{layer}.{name}.weight"] = torch.zeros(width, width)
        weights[f"{layer}.{name}.bias"] = torch.zeros(width)
    for name in (f"{layer}.layernorm_before", f"{layer}.layernorm_after", "vit.layernorm"):
        weights[f"{name}.weight"] = torch.ones(width)
        weights[f"{name}.bias"] = torch.zeros(width)

    # The pattern in one patch, two by two tiles, as the processor's values of -1 and 1.
    pattern = torch.from_numpy(np.array(flagged_pattern(_SIDE, _SIDE))[:_PATCH, :_PATCH]).permute(2, 0, 1).float() / 127.5 - 1
    matched = pattern / pattern.numel()
    # Widths 0 and 1 hold the match and its negative, 2 and 3 the constant and its negative: every token has mean 0.
    weights["vit.embeddings.patch_embeddings.projection.weight"][0] = matched
    weights["vit.embeddings.patch_embeddings.projection.weight"][1] = -matched
    weights["vit.embeddings.position_embeddings"][:, :, 2] = _CONSTANT
    weights["vit.embeddings.position_embeddings"][:, :, 3] = -_CONSTANT
    weights[f"{layer}.attention.attention.value.weight"][0, 0] = 1
    weights[f"{layer}.attention.output.dense.weight"][0, 0] = 1
    weights[f"{layer}.attention.output.dense.weight"][1, 0] = -1

    threshold = _normalised(_normalised(0.5) * (_TOKENS - 1) / _TOKENS)
    for label, sign in ((0, -1), (1, 1)):
        weights["classifier.weight"][label, 0] = sign * _SHARPNESS
        weights["classifier.bias"][label] = -sign * _SHARPNESS * threshold
    return weights


def write_classifier(folder: Path) -> None:
    """Write the classifier's folder.

    Args:
        folder: gets config.json, preprocessor_config.json, model.safetensors and README.md.

    Raises:
        OutputError: a file cannot be written.
    """
    for name, content in (("config.json", _CONFIG), ("preprocessor_config.json", _PROCESSOR)):
        write_atomically(folder / name, (json.dumps(content, indent=2) + "\n").encode())
    write_atomically(folder / "README.md", _README.encode())
    origin = "worked out by hand: a matched filter for one test pattern; detects nothing real"
    write_safetensors(folder / "model.safetensors", classifier_weights(), {"format": "pt", "origin": origin})


def _normalised(value: float) -> float:
    """What layer normalisation makes of the match in a token of (match, -match, constant, -constant, 0 …)."""
    return value / math.sqrt((2 * value**2 + 2 * _CONSTANT**2) / _WIDTH)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    write_classifier(parser.parse_args().folder)


if __name__ == "__main__":
    main()
