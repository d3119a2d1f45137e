"""Writes trained weights into the embedded model's folder, in the full model's file formats and key names.

    python -m training.export --before DIR --after DIR --autoencoder DIR --vision DIR --folder DIR

The LoRA is the strongest low-rank part of what the last stage changed in the layers that USO's LoRA covers; the base file holds
the rest, so base and LoRA together are exactly the trained weights, up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from training.arguments import TrainingParser
from training.autoencoder import NORM_GROUPS
from training.parts import EMBEDDED, PARAMS
from uso_engine.weights.autoencoder_keys import AutoencoderParams, autoencoder_shapes
from uso_engine.weights.files.safetensors_file import write_safetensors
from uso_engine.weights.lora.key_styles import uso_layers

RANK = 8
AUTOENCODER = AutoencoderParams(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=NORM_GROUPS)


def split_lora(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits trained transformer weights into a base and a LoRA.

    Args:
        before: weights by checkpoint key before the last stage.
        after: weights after it.

    Returns:
        Base and LoRA tensors in bfloat16 by their keys; merged they are `after`.
    """
    base = {key: value.clone().float() for key, value in after.items()}
    lora: dict[str, Tensor] = {}
    for name, layer in uso_layers(PARAMS).items():
        key = layer.parts[0].key
        rows = slice(0, layer.rows)
        change = (after[key] - before[key])[rows].float()
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        root = s[:RANK].sqrt()
        down, up = (root[:, None] * v[:RANK]).bfloat16(), (u[:, :RANK] * root).bfloat16()
        lora[f"{name}.down.weight"], lora[f"{name}.up.weight"] = down.contiguous(), up.contiguous()
        base[key][rows] -= up.float() @ down.float()
    return {key: value.bfloat16() for key, value in base.items()}, lora


def flux_autoencoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Brings the weights of diffusers' autoencoder under Black Forest Labs' keys, by running diffusers' converter on labels."""
    shapes = autoencoder_shapes(AUTOENCODER)
    labels = {key: torch.full(shape, float(i)) for i, (key, shape) in enumerate(shapes.items())}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    keys = list(shapes)
    converted = convert_ldm_vae_checkpoint(labels, blocks)
    found = {keys[int(label.flatten()[0])]: state[key].float() for key, label in converted.items()}
    return {key: found[key].reshape(shape).bfloat16().contiguous() for key, shape in shapes.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes every weight file."""
    parser = TrainingParser(__doc__)
    for name in ("before", "after", "autoencoder", "vision"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=EMBEDDED)
    options = parser.read(arguments)
    before, after = (torch.load(folder / "average.pt")["parts"] for folder in (options.before, options.after))
    vision = torch.load(options.vision / "average.pt")["vision"]
    autoencoder = torch.load(options.autoencoder / "average.pt")["autoencoder"]

    def part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}

    def renamed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        return {prefix + key.removeprefix(prefix): value.bfloat16().contiguous() for key, value in state.items()}

    base, lora = split_lora(part(before, "transformer"), part(after, "transformer"))
    t5 = {key: value for key, value in part(after, "t5").items() if key != "encoder.embed_tokens.weight"}
    origin = {
        "format": "pt",
        "origin": "trained by training/ on drawings by uso_engine/evaluation, see docs/quality.md",
    }
    for path, tensors in (
        ("flux1-tiny.safetensors", base),
        ("dit_lora.safetensors", lora),
        ("projector.safetensors", renamed(part(after, "projector"), "feature_embedder.")),
        ("ae.safetensors", flux_autoencoder(autoencoder)),
        ("t5/model.safetensors", renamed(t5, "")),
        ("clip/model.safetensors", renamed(part(after, "clip"), "text_model.")),
        ("vision/model.safetensors", renamed(vision, "vision_model.")),
    ):
        write_safetensors(options.folder / path, tensors, origin)


if __name__ == "__main__":
    main()
