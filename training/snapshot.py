"""Looks at a run while it trains: samples held-out triplets, lets the evaluation's classifiers read them, saves a picture grid.

python -m training.snapshot --data DIR --run DIR --autoencoder DIR --vision DIR --classifiers FILE --grid FILE
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.arguments import amount, whole_number
from training.arguments import TrainingParser
from training.autoencoder import load_autoencoder, to_pixels
from training.parts import GRID, Batch, Parts, tokenize, velocity
from training.samples import shrink
from training.vision import IMAGE_SIZE, build_vision, read_levels
from uso_engine.evaluation.captions import PLACE_WORDS
from uso_engine.evaluation.classifiers import load_classifiers
from uso_engine.evaluation.drawings import KINDS, PLACE_NAMES, STYLE_NAMES, draw_triplet, render
from uso_engine.sampling.latents import pack_latent, unpack_latent
from uso_engine.sampling.schedule import schedule


def sample(parts: Parts, batch: Batch, noise: Tensor, guidance: float, steps: int = 28) -> Tensor:
    """Denoises packed noise [B, 64, 64] by the engine's schedule."""
    sigmas = schedule(steps, 128, 128)
    x = noise
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for sigma, following in itertools.pairwise(sigmas):
            times = torch.full((len(x),), sigma)
            x = x + (following - sigma) * velocity(parts, batch, x, times, torch.full((len(x),), guidance)).float()
    return x


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the shares of right answers."""
    parser = TrainingParser(__doc__, "data")
    for name in ("run", "autoencoder", "vision", "classifiers", "grid"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--count", type=whole_number, default=24, help="triplets")
    parser.add_argument("--steps", type=whole_number, default=28)
    parser.add_argument("--guidance", type=amount, default=4)
    options = parser.read(arguments)
    torch.set_num_threads(1)
    parts = Parts()
    parts.load_state_dict(torch.load(options.run / "average.pt")["parts"])
    latents = json.loads((options.data / "latents.json").read_text())
    model, tower = load_autoencoder(options.autoencoder), build_vision()
    tower.load_state_dict(torch.load(options.vision / "average.pt")["vision"])
    triplets = [draw_triplet(np.random.default_rng(seed)) for seed in range(options.count)]
    drawn = [
        np.stack([np.asarray(render(scene)) for scene in row])
        for row in zip(*((t.content, t.style, t.target) for t in triplets), strict=True)
    ]
    with torch.no_grad():
        content = model.encode(to_pixels(drawn[0])).latent_dist.mean
        levels = torch.stack(read_levels(tower.train(False), to_pixels(shrink(drawn[1], IMAGE_SIZE))), dim=1)
    packed = pack_latent((content - latents["shift_factor"]) * latents["scale_factor"])
    t5_ids, clip_ids = tokenize([f"the object {PLACE_WORDS[t.target.place][0]}" for t in triplets])
    noise = torch.randn(len(triplets), 64, 64, generator=torch.Generator().manual_seed(0))
    made = sample(parts.eval(), Batch(t5_ids, clip_ids, packed, levels), noise, options.guidance, options.steps)
    with torch.no_grad():
        z = unpack_latent(made, GRID) / latents["scale_factor"] + latents["shift_factor"]
        pictures = model.decode(z).sample.clamp(-1, 1)
        answers = load_classifiers(options.classifiers)(pictures)
    for name, logits, known, wanted in zip(
        ("content", "place", "style"),
        answers,
        (KINDS, PLACE_NAMES, STYLE_NAMES),
        zip(*((t.target.kind, t.target.place, t.target.style) for t in triplets), strict=True),
        strict=True,
    ):
        right = [known.index(str(want)) == int(got) for want, got in zip(wanted, logits.argmax(1), strict=True)]
        print(name, round(sum(right) / len(right), 3))
    rows = [
        np.concatenate(list(row[:12]), axis=1) for row in (*drawn, ((pictures + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy())
    ]
    Image.fromarray(np.concatenate(rows)).save(options.grid)


if __name__ == "__main__":
    main()
