"""Goes on training the autoencoder's decoder on latents that are fixed already, while the transformer learns them.

python -m benchmarks.training.decoder --data DIR --autoencoder DIR --out DIR --seconds 4000
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.training.autoencoder import build_autoencoder, colour_error, psnr, to_pixels
from benchmarks.training.conditions import has_content
from benchmarks.training.muon import Muon
from benchmarks.training.samples import HELD_OUT, read_samples
from benchmarks.training.schedule import Run

NOISE = 0.03
"""Added to latents of spread one: what comes from the transformer is not exact either."""


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "autoencoder", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=4000)
    parser.add_argument("--peak", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Trains on crops of 8x8 latents, for the last part on whole pictures."""
    options = read_options()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    rng = np.random.default_rng(options.seed)
    samples = read_samples(options.data)
    latents = {part: np.load(options.data / f"{part}_latents.npy", mmap_mode="r") for part in ("target", "content")}
    model = build_autoencoder()
    model.load_state_dict(torch.load(options.autoencoder / "average.pt")["autoencoder"])
    model.encoder.requires_grad_(False)
    named = list(model.decoder.named_parameters())
    ends = [parameter for name, parameter in named if "conv_in" in name or "conv_out" in name]
    middle = [parameter for name, parameter in named if "conv_in" not in name and "conv_out" not in name]
    optimizer = Muon([{"params": middle}, {"params": ends, "adam": True}], options.peak, weight_decay=0.0)
    run = Run(options.out, options.seconds, options.peak, {"autoencoder": model}, optimizer)
    held_out = to_pixels(samples.pictures["target"][-64:])
    about = json.loads((options.data / "latents.json").read_text())
    count = about["count"]

    def draw(batch: int, cells: int) -> tuple[Tensor, Tensor]:
        pictures, codes = [], []
        for _ in range(batch):
            row = int(rng.integers(min(count, len(samples.modes) - HELD_OUT)))
            part = "content" if has_content(samples.modes[row]) and rng.random() < 0.3 else "target"
            y, x = rng.integers(0, 17 - cells, 2)
            codes.append(latents[part][row, :, y : y + cells, x : x + cells])
            pictures.append(samples.pictures[part][row, 8 * y : 8 * (y + cells), 8 * x : 8 * (x + cells)])
        code = torch.from_numpy(np.stack(codes)).float()
        code = (code + NOISE * torch.randn_like(code)) / about["scale_factor"] + about["shift_factor"]
        return code, to_pixels(np.stack(pictures))

    for step in run.steps():
        late = run.progress > 0.85
        code, pixels = draw(2 if late else 4, 16 if late else 8)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = model.decode(code).sample.float()
        mse = F.mse_loss(decoded, pixels)
        loss = mse + 0.2 * F.l1_loss(decoded, pixels) + 0.3 * colour_error(decoded - pixels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            run.log(loss=loss.item(), mse=mse.item())
            count = json.loads((options.data / "latents.json").read_text())["count"]
        if step % 500 == 499:
            averaged = build_autoencoder()
            averaged.load_state_dict(run.average["autoencoder"])
            run.log(held_out_psnr_db=psnr(averaged.eval(), held_out))


if __name__ == "__main__":
    main()
