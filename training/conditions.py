"""Computes once what the frozen parts say about the training set: latents, vision levels, token ids.

python -m training.conditions --data DIR --vision DIR --part levels
python -m training.conditions --data DIR --autoencoder DIR --part latents
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.arguments import whole_number
from training.arguments import TrainingParser
from training.autoencoder import load_autoencoder, to_pixels
from training.samples import read_samples, shrink
from training.vision import IMAGE_SIZE, build_vision, read_levels

SOURCES = {"levels": "vision", "latents": "autoencoder"}
"""What is computed, and the stage of training whose weights compute it."""

CHUNK = 64
STRIDE = 250


def has_content(mode: str) -> bool:
    """Whether samples of a mode have a content image."""
    return mode in ("full", "content")


def has_style(mode: str) -> bool:
    """Whether samples of a mode have a style image."""
    return mode in ("full", "style")


def write_levels(data: Path, vision: Path) -> None:
    """Writes ``levels.npy``, float16 [n, 3, patches, width], of the style pictures."""
    samples = read_samples(data)
    tower = build_vision()
    tower.load_state_dict(torch.load(vision / "average.pt")["vision"])
    tower.train(False).requires_grad_(False)
    levels = np.lib.format.open_memmap(
        data / "levels.npy", mode="w+", dtype=np.float16, shape=(len(samples.modes), 3, (IMAGE_SIZE // 8) ** 2, 64)
    )
    wanted = np.array([i for i, mode in enumerate(samples.modes) if has_style(mode)])
    for rows in np.array_split(wanted, len(wanted) // CHUNK):
        small = to_pixels(shrink(samples.pictures["style"][rows], IMAGE_SIZE))
        levels[rows] = torch.stack(read_levels(tower, small), dim=1).half().numpy()


def _encode(pictures: npt.NDArray[np.uint8], model: torch.nn.Module) -> npt.NDArray[np.float32]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        means = [model.encode(to_pixels(chunk)).latent_dist.mean for chunk in np.array_split(pictures, len(pictures) // 32 + 1)]  # type: ignore[operator]
    return np.asarray(torch.cat(means).float())


def write_latents(data: Path, autoencoder: Path, count: int | None = None) -> None:
    """Writes scaled and shifted latents of targets and contents, float16 [n, 16, 16, 16], and ``latents.json``.

    Training may begin once ``latents.json`` is there: it says how many samples are done.
    """
    samples = read_samples(data)
    count = len(samples.modes) if count is None else count
    model = load_autoencoder(autoencoder)
    shape = (len(samples.modes), 16, 16, 16)
    latents = {
        part: np.lib.format.open_memmap(data / f"{part}_latents.npy", mode="w+", dtype=np.float16, shape=shape)
        for part in ("target", "content")
    }
    first = _encode(samples.pictures["target"][:500], model)
    shift, scale = float(first.mean()), float(1 / first.std())
    for start in range(0, count, STRIDE):
        rows = np.arange(start, min(start + STRIDE, count))
        for part, wanted in (("target", rows), ("content", np.array([i for i in rows if has_content(samples.modes[i])]))):
            latents[part][wanted] = (_encode(samples.pictures[part][wanted], model) - shift) * scale
        text = json.dumps({"shift_factor": shift, "scale_factor": scale, "count": int(rows[-1]) + 1})
        (data / "latents.json.partial").write_text(text)
        (data / "latents.json.partial").rename(data / "latents.json")


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the parts asked for."""
    parser = TrainingParser(__doc__, "data")
    parser.add_argument("--part", choices=tuple(SOURCES), required=True, help="what is computed")
    for source in SOURCES.values():
        parser.add_argument(f"--{source}", type=Path, help=f"folder that training.{source} wrote")
    parser.add_argument("--count", type=whole_number, help="samples whose latents are written; by default all")
    options = parser.read(arguments)
    source = SOURCES[options.part]
    if getattr(options, source) is None:
        parser.error(f"--part {options.part} is computed by a trained part: expected --{source}")
    if options.part == "levels":
        write_levels(options.data, options.vision)
    else:
        write_latents(options.data, options.autoencoder, options.count)


if __name__ == "__main__":
    main()
