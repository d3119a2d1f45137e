"""How good pictures are, and how far from the reference's: numbers of each picture, and their means with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from uso_engine.comparison.image_metrics import coloured_otherwise, psnr, ssim
from uso_engine.evaluation.classifiers import Classifiers, read_picture
from uso_engine.evaluation.drawings import Triplet

if TYPE_CHECKING:
    from PIL.Image import Image

VISIBLE_SHARE = 0.01
"""A picture differs visibly where more than this share of its pixels has another colour."""
BEST_PSNR_DB = 99.0
"""What the same picture counts as, whose PSNR is infinite."""
RESAMPLES = 2000
ASPECTS = ("content", "style", "prompt")


@dataclass(frozen=True)
class Judgement:
    """One picture.

    Args:
        content: whether the classifier sees the triplet's object.
        style: its style.
        prompt: its place.
        psnr_db: to the reference's picture of the same case and seed.
        ssim: likewise.
        visible: whether it differs visibly from that.
        psnr_to_exact_db: to the picture at the end of the flow itself.
    """

    content: float
    style: float
    prompt: float
    psnr_db: float
    ssim: float
    visible: float
    psnr_to_exact_db: float


def judge(classifiers: Classifiers, picture: Image, triplet: Triplet, reference: Image, exact: Image) -> Judgement:
    """Judge a picture."""
    reading = read_picture(classifiers, picture)
    return Judgement(
        content=float(reading.kind == triplet.target.kind),
        style=float(reading.style == triplet.target.style),
        prompt=float(reading.place == triplet.target.place),
        psnr_db=min(BEST_PSNR_DB, psnr(picture, reference)),
        ssim=ssim(picture, reference),
        visible=float(coloured_otherwise(picture, reference) > VISIBLE_SHARE),
        psnr_to_exact_db=min(BEST_PSNR_DB, psnr(picture, exact)),
    )


def means(judged: Mapping[int, Sequence[Judgement]], reference: Mapping[int, Sequence[Judgement]]) -> dict[str, list[float]]:
    """The mean of every number with its interval, and the mean of the accuracies' differences to the reference.

    Args:
        judged: of a setting, the pictures of each triplet.
        reference: of the reference, the same triplets with the same seeds.

    Returns:
        By name: mean, lower and upper end of the 95 % interval. Triplets are drawn with replacement, each with all its seeds,
        since pictures of one triplet are not independent.

    Raises:
        ValueError: other triplets than the reference's.
    """
    if {key: len(value) for key, value in judged.items()} != {key: len(value) for key, value in reference.items()}:
        raise ValueError("expected the reference's triplets with as many seeds each")
    triplets = sorted(judged)
    columns = {name: [[asdict(one)[name] for one in judged[key]] for key in triplets] for name in Judgement.__annotations__}
    for name in ASPECTS:
        base = [[asdict(one)[name] for one in reference[key]] for key in triplets]
        columns[f"{name}_change"] = [
            [a - b for a, b in zip(mine, theirs, strict=True)] for mine, theirs in zip(columns[name], base, strict=True)
        ]
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(triplets), size=(RESAMPLES, len(triplets)))
    counts = np.array([len(judged[key]) for key in triplets], dtype=np.float64)
    found = {}
    for name, values in columns.items():
        sums = np.array([sum(row) for row in values], dtype=np.float64)
        resampled = sums[drawn].sum(1) / counts[drawn].sum(1)
        low, high = np.percentile(resampled, (2.5, 97.5))
        found[name] = [round(float(number), 5) for number in (sums.sum() / counts.sum(), low, high)]
    return found
