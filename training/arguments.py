"""Options that training scripts share, each declared once.

parser = TrainingParser(__doc__, "data", "out", "seconds", "peak", "seed", seconds="480", peak="1.5e-3")
options = parser.read(arguments)
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.arguments import Option, SharedParser, amount, count, whole_number

SHARED = {
    "data": Option(Path, None, "folder that training.dataset wrote", "FOLDER", is_required=True),
    "out": Option(Path, None, "folder of the log, the curve and the average of the weights", "FOLDER", is_required=True),
    "seconds": Option(amount, None, "how long it trains", "S", is_required=True),
    "peak": Option(amount, None, "largest learning rate", "RATE", is_required=True),
    "batch": Option(whole_number, "24", "images per process and step", "N"),
    "ranks": Option(whole_number, "2", "processes that train together", "N"),
    "seed": Option(count, "0", "of the draws of data and weights", "N"),
}


class TrainingParser(SharedParser):
    """A parser with shared options of training scripts.

    Args:
        description: the module's docstring.
        shared: names of shared options.
        defaults: of shared options, as they would be typed.
    """

    def __init__(self, description: str | None, *shared: str, **defaults: str) -> None:
        super().__init__(description, SHARED, shared, defaults)
