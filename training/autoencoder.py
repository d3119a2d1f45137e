"""Trains the autoencoder of uso-tiny: 8x smaller, 16 channels, diffusers' class at FLUX's layout.

python -m training.autoencoder --data DIR --out DIR --seconds 1200
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.arguments import whole_number
from training.arguments import TrainingParser
from training.muon import Muon
from training.schedule import Run

KL_WEIGHT = 1e-4
CHANNELS = (32, 32, 64, 64)
NORM_GROUPS = 8
"""FLUX's 32 would be one channel per group here, and a normalisation per channel cannot carry a flat colour."""


def build_autoencoder() -> AutoencoderKL:
    """Builds it: ch 32, ch_mult 1 1 2 2, one residual block, 16 latent channels; residual branches start at zero."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=NORM_GROUPS,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for name, parameter in model.named_parameters():
        if name.endswith(("conv2.weight", "to_out.0.weight")):
            nn.init.zeros_(parameter)
    return model


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """Loads the averaged weights of a run."""
    model = build_autoencoder()
    model.load_state_dict(torch.load(folder / "average.pt")["autoencoder"])
    return model.eval()


def to_pixels(pictures: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 [n, h, w, 3] to float [n, 3, h, w] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def colour_error(error: Tensor) -> Tensor:
    """Extra weight for the two colour differences of an error [n, 3, h, w], close up and from afar.

    Without it the red-green axis was missing from the latent after a thousand steps: brightness explains most of the error. For
    the same reason the first three latent channels are held to twice the mean colour of their 8x8 pixels.
    """
    red, green, blue = error.unbind(1)
    differences = torch.stack((red - green, blue - (red + green) / 2), dim=1)
    return differences.square().mean() + 2 * F.avg_pool2d(differences, 8).square().mean()


def psnr(model: AutoencoderKL, pixels: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio of decode(mean of encode), in dB, after rounding to 8 bits."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoded = model.decode(model.encode(pixels).latent_dist.mode()).sample
    error = ((decoded.float().clamp(-1, 1) * 127.5).round() - pixels * 127.5).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(255**2 / error.clamp_min(1e-3))).mean())


def _crops(rng: np.random.Generator, arrays: list[npt.NDArray[np.uint8]], batch: int, size: int) -> Tensor:
    pieces = []
    for _ in range(batch):
        array = arrays[int(rng.integers(len(arrays)))]
        picture = array[int(rng.integers(len(array)))]
        while not picture.any():
            picture = array[int(rng.integers(len(array)))]
        y, x = rng.integers(0, picture.shape[0] - size + 1, 2)
        pieces.append(picture[y : y + size, x : x + size])
    return to_pixels(np.stack(pieces))


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains on crops of 64 pixels, for the last part on whole pictures."""
    parser = TrainingParser(__doc__, "data", "out", "seconds", "peak", "seed", seconds="1200", peak="3e-3")
    crops = "crops a step; whole pictures, at the end, are half as many"
    parser.add_argument("--batch", type=whole_number, default=8, help=crops)
    options = parser.read(arguments)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    arrays = [np.load(options.data / f"{part}.npy", mmap_mode="r") for part in ("target", "content")]
    held_out, arrays = arrays[0][-64:], [array[:-512] for array in arrays]
    model = build_autoencoder()
    ends = [p for name, p in model.named_parameters() if "conv_in" in name or "conv_out" in name]
    middle = [p for name, p in model.named_parameters() if "conv_in" not in name and "conv_out" not in name]
    optimizer = Muon([{"params": middle}, {"params": ends, "adam": True}], options.peak, weight_decay=0.0)
    run = Run(options.out, options.seconds, options.peak, {"autoencoder": model}, optimizer)
    for step in run.steps():
        late = run.progress > 0.85
        pixels = _crops(
            rng, [arrays[0], arrays[0], arrays[1]], options.batch // 2 if late else options.batch, 128 if late else 64
        )
        with torch.autocast("cpu", torch.bfloat16):
            latent = model.encode(pixels).latent_dist
            decoded = model.decode(latent.sample()).sample.float()
        mse = F.mse_loss(decoded, pixels)
        rate = latent.kl().mean() / math.prod(latent.mean.shape[1:])
        loss = mse + 0.2 * F.l1_loss(decoded, pixels) + colour_error(decoded - pixels) + KL_WEIGHT * rate
        loss = loss + F.mse_loss(latent.mean[:, :3].float(), 2 * F.avg_pool2d(pixels, 8))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            run.log(loss=loss.item(), mse=mse.item(), rate=rate.item())
        if step % 1000 == 999:
            averaged = build_autoencoder()
            averaged.load_state_dict(run.average["autoencoder"])
            run.log(held_out_psnr_db=psnr(averaged.eval(), to_pixels(held_out)))


if __name__ == "__main__":
    main()
