"""Renders the training set of uso-tiny to disk: pictures as uint8 arrays, captions and labels as JSON lines.

python -m training.dataset --out DIR --count 24000
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.arguments import whole_number
from training.arguments import TrainingParser
from uso_engine.evaluation.captions import write_caption
from uso_engine.evaluation.drawings import STYLE_NAMES, Scene, Triplet, draw_triplet, render

SIZE = 128
TRAINING_SEED = 1_000_000
"""Sample i is drawn from seed TRAINING_SEED + i; evaluation draws from seeds below 1_000_000."""

MODES = ("full", "content", "style", "text", "none")
MODE_SHARES = (0.56, 0.12, 0.14, 0.10, 0.08)
PARTS = ("target", "content", "style")


def draw_sample(seed: int) -> tuple[str, Triplet, str]:
    """Draws what one training sample shows and which of its conditions the model gets.

    Args:
        seed: seed of the sample.

    Returns:
        Mode ("full" both references, "content" or "style" only that one, "text" none, "none" not even a caption), the
        scenes, and the caption. The target is what a faithful model would answer to exactly these conditions.
    """
    rng = np.random.default_rng(seed)
    mode = str(rng.choice(MODES, p=MODE_SHARES))
    triplet = draw_triplet(rng)
    content, target = triplet.content, triplet.target
    name_place = bool(rng.random() < 0.88)
    if mode == "full":
        caption = write_caption(
            rng, target, name_object=bool(rng.random() < 0.4), name_place=name_place, name_style=bool(rng.random() < 0.2)
        )
    elif mode == "content":
        if rng.random() < 0.4:
            target = replace(target, style=None, style_shape=content.style_shape)
        caption = write_caption(
            rng, target, name_object=bool(rng.random() < 0.4), name_place=name_place, name_style=target.style is not None
        )
    elif mode == "style":
        caption = write_caption(rng, target, name_place=name_place, name_style=bool(rng.random() < 0.2))
    elif mode == "text":
        caption = write_caption(rng, target, name_place=name_place, name_style=bool(rng.random() < 0.8))
    else:
        caption = ""
    if mode in ("full", "content") and not name_place:
        target = replace(target, place=content.place, place_shape=content.place_shape)
    return mode, Triplet(content, triplet.style, target), caption


def _pixels(scene: Scene) -> npt.NDArray[np.uint8]:
    return np.asarray(render(scene, SIZE))


def _render_range(job: tuple[Path, int, int]) -> list[str]:
    folder, start, stop = job
    arrays = {part: np.load(folder / f"{part}.npy", mmap_mode="r+") for part in PARTS}
    lines = []
    for i in range(start, stop):
        mode, triplet, caption = draw_sample(TRAINING_SEED + i)
        arrays["target"][i] = _pixels(triplet.target)
        if mode in ("full", "content"):
            arrays["content"][i] = _pixels(triplet.content)
        if mode in ("full", "style"):
            arrays["style"][i] = _pixels(triplet.style)
        labels = {
            "mode": mode,
            "caption": caption,
            "kind": triplet.target.kind,
            "place": triplet.target.place,
            "style": -1 if triplet.target.style is None else STYLE_NAMES.index(triplet.target.style),
            "style_shape": triplet.target.style_shape,
        }
        lines.append(json.dumps(labels))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Renders the set with one process per core."""
    parser = TrainingParser(__doc__, "out")
    parser.add_argument("--count", type=whole_number, default=24_000, help="triplets that are drawn")
    parser.add_argument("--processes", type=whole_number, default=2)
    options = parser.read(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        np.lib.format.open_memmap(options.out / f"{part}.npy", mode="w+", dtype=np.uint8, shape=(options.count, SIZE, SIZE, 3))
    step = 500
    jobs = [(options.out, start, min(start + step, options.count)) for start in range(0, options.count, step)]
    with multiprocessing.Pool(options.processes) as pool, (options.out / "samples.jsonl").open("w") as lines:
        for done in pool.imap(_render_range, jobs):
            lines.write("\n".join(done) + "\n")


if __name__ == "__main__":
    main()
