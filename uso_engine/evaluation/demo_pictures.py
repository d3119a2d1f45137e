"""Draw the demonstration's input pictures: ``python -m uso_engine.evaluation.demo_pictures FOLDER``."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from uso_engine.evaluation.drawings import draw_scene, render

SEED = 20260
SIDE = 128


def draw_demo_pictures(folder: Path) -> tuple[Path, Path]:
    """Draw a content picture (a mushroom in the neutral style) and a style picture (a boat in stained glass).

    Args:
        folder: made if it is not there.

    Returns:
        Paths of content.png and style.png.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    content, style = folder / "content.png", folder / "style.png"
    render(draw_scene(rng, kind="mushroom", place="plain", style=None), SIDE).save(content)
    render(draw_scene(rng, kind="boat", place="sea", style="stained glass"), SIDE).save(style)
    return content, style


def main() -> None:
    """Draw into the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where content.png and style.png go")
    for path in draw_demo_pictures(parser.parse_args().folder):
        print(path)  # noqa: T201


if __name__ == "__main__":
    main()
