"""Round numbers at axes: they hold what is shown, a step apart, and are few."""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.axes import logarithmic_ticks, ticks
from benchmarks.documents import SvgPlot
from benchmarks.report import PLOTS


def test_ticks_are_what_one_would_write_down() -> None:
    assert ticks(0, 722) == [0, 200, 400, 600, 800]
    assert ticks(0, 4.2) == [0, 1, 2, 3, 4, 5]
    assert ticks(0, 0.013) == [0, 0.005, 0.01, 0.015]
    assert ticks(0.5, 0.95) == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert ticks(93.6, 98.4) == [92, 94, 96, 98, 100]
    assert ticks(-3, 12) == [-5, 0, 5, 10, 15]
    assert ticks(0, 0) == [0, 1] and ticks(7, 7) == [7, 8]
    assert ticks(0.1, 0.3) == [0.1, 0.15, 0.2, 0.25, 0.3]
    assert ticks(0.6, 1.4) == [0.6, 0.8, 1.0, 1.2, 1.4]  # Of floats, 0.6 / 0.2 is less than 3.


@pytest.mark.parametrize("seed", range(50))
def test_ticks_hold_any_range_in_few_round_steps(seed: int) -> None:
    draw = random.Random(seed)
    size = 10 ** draw.uniform(-6, 9)
    low = draw.choice([0.0, draw.uniform(-size, size)])
    high = low + draw.choice([size, size / 1000])
    found = ticks(low, high)
    assert found[0] <= low + 1e-6 * size and found[-1] >= high - 1e-6 * size
    assert 2 <= len(found) <= 6
    step = found[1] - found[0]
    assert all(math.isclose(after - before, step, rel_tol=1e-6) for before, after in pairwise(found))
    assert f"{step:.3e}"[:5] in ("1.000", "2.000", "5.000")
    # No end is a whole step away from what it holds.
    assert low - found[0] < step and found[-1] - high < step


def test_logarithmic_ticks_begin_and_end_at_marks() -> None:
    assert logarithmic_ticks(5.5, 23.2) == [5, 10, 20, 50]
    assert logarithmic_ticks(1, 1) == [1, 2]
    assert logarithmic_ticks(0.003, 0.2) == [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]
    assert logarithmic_ticks(3e7, 4e7) == [2e7, 5e7]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1, math.nextafter(1, 2), [1, 1.1]),
        (1e16, 1e16 + 2, [1e16, 1.1e16]),
        (0, 5e-324, [0, 1]),
        (1e9, 1e9 + 1, [1e9, 1e9 + 0.2, 1e9 + 0.4, 1e9 + 0.6, 1e9 + 0.8, 1e9 + 1]),
        (-1e300, 1e300, [-1e300, -5e299, 0, 5e299, 1e300]),
    ],
)
def test_ticks_differ_however_near_or_far_the_numbers(low: float, high: float, expected: list[float]) -> None:
    """Between two floats that differ in their last digits there are no further ones."""
    assert ticks(low, high) == expected


@pytest.mark.parametrize("wrong", [(2, 1), (0, math.inf), (math.nan, 1), (1, 1.7e308), (-1e308, 1e308)])
def test_what_is_no_range_is_refused(wrong: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=re.escape("expected two numbers from -1e+300 to 1e+300, the lesser first, got ")):
        ticks(*wrong)
    with pytest.raises(ValueError, match="expected two numbers from 1e-300 to 1e\\+300, the lesser first, got "):
        logarithmic_ticks(*wrong)


@pytest.mark.parametrize("low", [-1, 0, 5e-324])
def test_logarithms_are_of_positive_numbers(low: float) -> None:
    with pytest.raises(ValueError, match=f"from 1e-300 .* got {low:g} and 1"):
        logarithmic_ticks(low, 1)


@pytest.mark.parametrize("plot", [plot for plot in PLOTS if isinstance(plot, SvgPlot)], ids=lambda plot: plot.path)
def test_plots_have_round_numbers_at_their_axes(plot: SvgPlot, repository: Path) -> None:
    """Two figures say each: steps are 1, 2 or 5 of a power of ten, and there are few."""
    texts = [text.text or "" for text in ElementTree.parse(repository / plot.path).iter("{http://www.w3.org/2000/svg}text")]
    numbers = [text for text in texts if re.fullmatch(r"-?[\d.]+", text)]
    assert len(numbers) >= 6
    assert [text for text in numbers if len(text.replace(".", "").strip("-0")) > 2] == []
