"""Trains the vision tower of uso-tiny to read style: a SigLIP tower of 21 layers, supervised at the three levels USO reads.

python -m training.vision --data DIR --out DIR --seconds 480
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from training.arguments import TrainingParser
from training.autoencoder import to_pixels
from training.samples import HELD_OUT, read_samples, shrink
from training.schedule import Run
from uso_engine.evaluation.drawings import STYLE_NAMES

IMAGE_SIZE = 64
LEVELS = (-2, -11, -20)
"""Hidden states that the style projector reads."""


def build_vision() -> SiglipVisionModel:
    """Builds the tower: 64x64 pixels in patches of 8, width 64, 21 layers."""
    config = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=21,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        vision_use_head=False,
    )
    return SiglipVisionModel(config)


def read_levels(model: SiglipVisionModel, pixels: Tensor) -> list[Tensor]:
    """The three levels of hidden states, each [n, patches, width], of pixels [n, 3, 64, 64] in -1..1."""
    states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    return [states[level] for level in LEVELS]


class StyleReader(nn.Module):
    """Reads style and palette from each level; thrown away after training."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 96), nn.SiLU()) for _ in LEVELS)
        self.heads = nn.ModuleList(nn.Linear(96, len(STYLE_NAMES) + 1 + 24) for _ in LEVELS)

    def forward(self, levels: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        answers = [head(token(x).mean(1)) for token, head, x in zip(self.tokens, self.heads, levels, strict=True)]
        return [(answer[:, :-24], answer[:, -24:]) for answer in answers]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains on the targets and style pictures of the set."""
    parser = TrainingParser(__doc__, "data", "out", "seconds", "peak", "seed", seconds="480", peak="1.5e-3")
    options = parser.read(arguments)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    samples = read_samples(options.data)
    small = options.data / "target64.npy"
    if not small.exists():
        np.save(small, shrink(samples.pictures["target"], IMAGE_SIZE))
    pictures = np.load(small, mmap_mode="r")
    styles, palettes = torch.from_numpy(samples.labels[:, 2]), torch.from_numpy(samples.palettes)
    tower, reader = build_vision(), StyleReader()
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *reader.parameters()], options.peak, betas=(0.9, 0.98), weight_decay=0.01
    )
    run = Run(options.out, options.seconds, options.peak, {"vision": tower, "reader": reader}, optimizer, decay=100)
    for step in run.steps():
        rows = np.sort(rng.integers(0, len(pictures) - HELD_OUT, 32))
        answers = reader(read_levels(tower, to_pixels(pictures[rows])))
        loss = sum(
            (F.cross_entropy(style, styles[rows]) + 10 * F.mse_loss(palette, palettes[rows]) for style, palette in answers),
            start=torch.zeros(()),
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            run.log(loss=loss.item())
        if step % 200 == 199:
            with torch.no_grad():
                answers = reader(read_levels(tower, to_pixels(pictures[-HELD_OUT:])))
            values = {}
            for level, (style, palette) in zip(LEVELS, answers, strict=True):
                values[f"accuracy{level}"] = float((style.argmax(1) == styles[-HELD_OUT:]).float().mean())
                values[f"palette{level}"] = float(F.mse_loss(palette, palettes[-HELD_OUT:]).sqrt())
            run.log(**values)


if __name__ == "__main__":
    main()
