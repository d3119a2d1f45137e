"""Reads what `training.dataset` rendered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.dataset import PARTS
from uso_engine.evaluation.drawings import KINDS, PLACE_NAMES, STYLE_NAMES
from uso_engine.evaluation.styles import NEUTRAL, STYLES

HELD_OUT = 512
"""The last samples of a set are never trained on."""


@dataclass(frozen=True)
class Samples:
    """A rendered set.

    Args:
        pictures: "target", "content" and "style", each uint8 [n, h, w, 3], black where a mode has none.
        modes: mode of each sample.
        captions: caption of each.
        labels: int64 [n, 3]: kind, place and style of the target, the neutral style one past the last.
        palettes: float32 [n, 24], the colours of the target's style, 0..1.
    """

    pictures: dict[str, npt.NDArray[np.uint8]]
    modes: list[str]
    captions: list[str]
    labels: npt.NDArray[np.int64]
    palettes: npt.NDArray[np.float32]


def read_samples(folder: Path) -> Samples:
    """Opens a rendered set; the pictures stay on disk."""
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    labels, palettes = [], []
    for line in lines:
        style = line["style"] if line["style"] >= 0 else len(STYLE_NAMES)
        labels.append((KINDS.index(line["kind"]), PLACE_NAMES.index(line["place"]), style))
        make = NEUTRAL if style == len(STYLE_NAMES) else STYLES[STYLE_NAMES[style]]
        palettes.append(make(line["style_shape"]).plain.reshape(-1) / 255)
    return Samples(
        pictures={part: np.load(folder / f"{part}.npy", mmap_mode="r") for part in PARTS},
        modes=[line["mode"] for line in lines],
        captions=[line["caption"] for line in lines],
        labels=np.array(labels),
        palettes=np.array(palettes, dtype=np.float32),
    )


def shrink(pictures: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Resizes pictures [n, h, w, 3] to a square as the vision tower's processor does (bicubic)."""
    resized = (Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC) for picture in pictures)
    return np.stack([np.asarray(picture) for picture in resized])
