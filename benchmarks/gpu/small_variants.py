"""The same variants on a small picture, where the host's time and the launches weigh more than the arithmetic."""

from __future__ import annotations

from .bench import Bench
from .variants import VARIANTS, compare


def run(bench: Bench) -> None:
    compare(bench, bench.small, VARIANTS)
