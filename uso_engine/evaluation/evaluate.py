"""Evaluation: the share of pictures in which the object is kept, the style applied and the place the one that was asked for.

Held-out triplets are generated and read by classifiers that only ever saw drawings. Every row says what was changed: references
dropped or exchanged for another triplet's, fewer steps, another precision tier. A lossy option is judged against fewer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image

from uso_engine.evaluation.captions import PLACE_WORDS, STYLE_WORDS
from uso_engine.evaluation.classifiers import Classifiers, load_classifiers, read_picture
from uso_engine.evaluation.drawings import KINDS, PLACE_NAMES, STYLE_NAMES, Triplet, draw_triplet, render
from uso_engine.evaluation.report_table import ASPECTS, report_table
from uso_engine.imaging.pixels import from_pixels, to_pixels

if TYPE_CHECKING:
    from uso_engine.engine import USOEngine

Item = TypeVar("Item")

GIVEN, DROPPED, SWAPPED = "given", "dropped", "swapped"
CHANCE = {"content": 1 / len(KINDS), "style": 1 / len(STYLE_NAMES), "prompt": 1 / len(PLACE_NAMES)}
STEPS = 28
FEWER_STEPS = (14, 7, 4)

Progress = Callable[[str, int, int], None]
"""Called with a row's name, the picture just made and how many the row has."""


@dataclass(frozen=True)
class Variation:
    """One row of the report.

    Args:
        name: what it is called.
        steps: denoising steps.
        content: GIVEN, DROPPED or SWAPPED (the next triplet's content image).
        style: the same for the style image.
        prompt: the same for the place in the prompt.
        words: whether the prompt also names the object and the style.
        negative: whether the style, in words, is the negative prompt.
        guidance: guidance scale; None for the configuration's.
    """

    name: str
    steps: int = STEPS
    content: str = GIVEN
    style: str = GIVEN
    prompt: str = GIVEN
    words: bool = False
    negative: bool = False
    guidance: float | None = None


@dataclass(frozen=True)
class Row:
    """What came of a variation.

    Args:
        variation: what was run.
        tier: precision tier of the engine.
        accuracy: share of pictures in which the classifier sees the triplet's object, style and place, by aspect.
        psnr_db: mean PSNR to the first row's pictures, the same seeds; None for the first row.
        pictures: the generated pictures.
    """

    variation: Variation
    tier: str
    accuracy: dict[str, float]
    psnr_db: float | None
    pictures: tuple[Image.Image, ...] = field(repr=False)


@dataclass(frozen=True)
class Report:
    """Accuracy of every row on the same triplets.

    Args:
        triplets: the held-out triplets.
        drawings: content, style and true target picture of each.
        drawn: accuracy of the classifiers on the true targets: what a perfect model would get.
        rows: the variations.
        autoencoder_psnr_db: what is left of content and target drawings after encoding and decoding; empty if not measured.
    """

    triplets: tuple[Triplet, ...]
    drawings: tuple[tuple[Image.Image, Image.Image, Image.Image], ...] = field(repr=False)
    drawn: dict[str, float]
    rows: tuple[Row, ...]
    autoencoder_psnr_db: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Plain data, without the pictures."""
        rows = [
            {
                "name": row.variation.name,
                "tier": row.tier,
                "steps": row.variation.steps,
                **{aspect: round(row.accuracy[aspect], 4) for aspect in ASPECTS},
                "psnr_db": None if row.psnr_db is None else round(row.psnr_db, 4),
            }
            for row in self.rows
        ]
        chance = {aspect: round(share, 4) for aspect, share in CHANCE.items()}
        autoencoder = {name: round(value, 4) for name, value in self.autoencoder_psnr_db.items()}
        head = {"triplets": len(self.triplets), "chance": chance, "true_drawings": self.drawn}
        return {**head, "autoencoder_psnr_db": autoencoder, "rows": rows}

    def to_table(self) -> str:
        """A Markdown table."""
        return report_table(self.to_json())

    def to_grid(self, columns: int = 10) -> Image.Image:
        """Content, style and target drawings over every row's pictures, one triplet a column."""
        count = min(columns, len(self.triplets))
        lines = [[drawing[i] for drawing in self.drawings[:count]] for i in range(3)]
        lines += [list(row.pictures[:count]) for row in self.rows]
        side = self.drawings[0][0].width
        gap = 4
        grid = Image.new("RGB", (count * (side + gap) - gap, len(lines) * (side + gap) + gap), "white")
        for y, line in enumerate(lines):
            for x, picture in enumerate(line):
                fitted = picture if picture.width == side else picture.resize((side, side))
                grid.paste(fitted, (x * (side + gap), y * (side + gap) + (2 * gap if y >= 3 else 0) - (gap if y >= 3 else 0)))
        return grid


def standard_variations(*, changes: bool = True, fewer: Sequence[int] = FEWER_STEPS) -> tuple[Variation, ...]:
    """Everything given; where `changes` is true each input dropped and exchanged, and other dials turned; plain fewer steps."""
    changed = [Variation(f"{aspect} {change}", **{aspect: change}) for aspect in ASPECTS for change in (DROPPED, SWAPPED)]  # type: ignore[arg-type]
    changed += [
        Variation("words only", content=DROPPED, style=DROPPED, words=True),
        Variation("style as negative prompt", negative=True),
        Variation("guidance 1", guidance=1.0),
        Variation("guidance 8", guidance=8.0),
    ]
    return (Variation("everything given"), *(changed if changes else ()), *(Variation("fewer steps", n) for n in fewer))


def draw_held_out(count: int, seed: int = 0) -> tuple[Triplet, ...]:
    """Triplets that training never saw: its seeds begin at a million.

    Raises:
        ValueError: seeds that reach into the training set's.
    """
    if not 0 <= seed <= seed + count <= 1_000_000 or count < 2:
        raise ValueError(f"held-out triplets are at least 2 with seeds from 0 to 999999, got {count} from seed {seed}")
    return tuple(draw_triplet(np.random.default_rng(seed + i)) for i in range(count))


def evaluate(
    engines: Sequence[tuple[str, USOEngine]],
    *,
    count: int = 48,
    seed: int = 0,
    variations: Sequence[Variation] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Evaluates engines on held-out triplets.

    Args:
        engines: name of the precision tier and the engine; the first one runs every variation, the others "everything given"
            and fewer steps. Each generates at its configuration's default size and guidance.
        count: triplets, at least 2.
        seed: of the first triplet.
        variations: rows to run, the standard ones by default; the first is what the others' PSNR is taken against.
        progress: told after each picture.

    Returns:
        The report; the same engines give the same one.

    Raises:
        ValueError: no engine, or too few triplets.
    """
    if not engines:
        raise ValueError("nothing to evaluate: expected at least one engine, got none")
    triplets = draw_held_out(count, seed)
    drawings = tuple((render(t.content), render(t.style), render(t.target)) for t in triplets)
    classifiers = load_classifiers()
    wanted = tuple(variations) if variations is not None else standard_variations()
    rows: list[Row] = []
    for i, (tier, engine) in enumerate(engines):
        for variation in wanted:
            plain = replace(variation, name="", steps=STEPS) == Variation("")
            if i == 0 or plain:
                pictures = _generate(engine, variation, triplets, drawings, progress)
                base = rows[0].pictures if rows else None
                accuracy = _accuracy(classifiers, pictures, triplets)
                rows.append(Row(variation, tier, accuracy, _mean_psnr(pictures, base), pictures))
    drawn = _accuracy(classifiers, tuple(target for _, _, target in drawings), triplets)
    return Report(triplets, drawings, drawn, tuple(rows))


def measure_autoencoder(
    engine: USOEngine, drawings: Sequence[tuple[Image.Image, Image.Image, Image.Image]]
) -> dict[str, float]:
    """Mean PSNR in dB of content and target drawings after encoding and decoding."""
    pipeline = engine.pipeline
    found = {}
    for name, place in (("content", 0), ("target", 2)):
        originals = [drawing[place] for drawing in drawings]
        decoded = [
            from_pixels(pipeline.decode(pipeline.autoencoder.encode(to_pixels(original))[None]))[0] for original in originals
        ]
        found[name] = sum(_psnr(a, b) for a, b in zip(decoded, originals, strict=True)) / len(originals)
    return found


def _generate(
    engine: USOEngine,
    variation: Variation,
    triplets: Sequence[Triplet],
    drawings: Sequence[tuple[Image.Image, Image.Image, Image.Image]],
    progress: Progress | None,
) -> tuple[Image.Image, ...]:
    pictures = []
    for i in range(len(triplets)):
        content = _choose(variation.content, i, [drawing[0] for drawing in drawings], [t.content.kind for t in triplets])
        style = _choose(variation.style, i, [drawing[1] for drawing in drawings], [str(t.style.style) for t in triplets])
        place = _choose(variation.prompt, i, [t.target.place for t in triplets], [t.target.place for t in triplets])
        manner = STYLE_WORDS[triplets[i].style.style][0]
        words = [f"the {triplets[i].target.kind}" if variation.words else "the object"]
        words += [] if place is None else [PLACE_WORDS[place][0]]
        words += [manner] if variation.words else []
        turned: dict[str, Any] = {"negative_prompt": f"the object {manner}"} if variation.negative else {}
        turned |= {} if variation.guidance is None else {"guidance_scale": variation.guidance}
        result = engine.generate(
            prompt=" ".join(words),
            images=[content] if style is None else [content, style],
            seed=i + 1,
            num_inference_steps=variation.steps,
            enable_safety_checker=False,
            **turned,
        )
        pictures.append(result.images[0])
        if progress is not None:
            progress(variation.name, i + 1, len(triplets))
    return tuple(pictures)


def _choose(change: str, index: int, items: Sequence[Item], labels: Sequence[str]) -> Item | None:
    """The triplet's own item, none, or that of the next triplet with another label."""
    if change == DROPPED:
        return None
    if change == GIVEN:
        return items[index]
    others = [j % len(items) for j in range(index + 1, index + len(items)) if labels[j % len(items)] != labels[index]]
    if not others:
        raise ValueError(f"nothing to exchange: all {len(items)} triplets have {labels[index]}; evaluate more of them")
    return items[others[0]]


def _accuracy(classifiers: Classifiers, pictures: Sequence[Image.Image], triplets: Sequence[Triplet]) -> dict[str, float]:
    right = dict.fromkeys(ASPECTS, 0)
    for picture, triplet in zip(pictures, triplets, strict=True):
        reading = read_picture(classifiers, picture)
        right["content"] += reading.kind == triplet.target.kind
        right["style"] += reading.style == triplet.target.style
        right["prompt"] += reading.place == triplet.target.place
    return {aspect: count / len(triplets) for aspect, count in right.items()}


def _mean_psnr(pictures: Sequence[Image.Image], base: Sequence[Image.Image] | None) -> float | None:
    if base is None:
        return None
    return sum(_psnr(picture, other) for picture, other in zip(pictures, base, strict=True)) / len(pictures)


def _psnr(picture: Image.Image, other: Image.Image) -> float:
    a, b = (torch.from_numpy(np.array(image)).float() for image in (picture, other))
    return float(10 * torch.log10(255**2 / (a - b).square().mean().clamp_min(1e-3)))
