"""Round numbers for the axes of plots."""

from __future__ import annotations

import math

_FACTORS = (1, 2, 5)
_MOST_STEPS = 5
# Of a step: what a quotient of two floats may miss a whole number by.
_SLACK = 1e-9


def ticks(low: float, high: float) -> list[float]:
    """Multiples of one, two or five times a power of ten that hold a range: the first and the last are the ends of its axis.

    Args:
        low: the least value to be shown.
        high: the greatest; may be the same.

    Returns:
        From two to six numbers, ascending, as close together as that allows.

    Raises:
        ValueError: they are not finite, or the wrong way round.
    """
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"expected two finite numbers, the lesser first, got {low:g} and {high:g}")
    power = math.floor(math.log10((high - low or abs(high) or 5.0) / _MOST_STEPS))
    while True:
        for factor in _FACTORS:
            first = math.floor(_steps(low, factor, power) + _SLACK)
            last = math.ceil(_steps(high, factor, power) - _SLACK)
            if last - first <= _MOST_STEPS:
                return [_multiple(number * factor, power) for number in range(first, max(last, first + 1) + 1)]
        power += 1


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """One, two and five times powers of ten that hold a range: the first and the last are the ends of its axis.

    Args:
        low: the least value to be shown, above 0.
        high: the greatest; may be the same.

    Returns:
        Two numbers or more, ascending.

    Raises:
        ValueError: they are not positive and finite, or the wrong way round.
    """
    if not 0 < low <= high < math.inf:
        raise ValueError(f"expected two positive numbers, the lesser first, got {low:g} and {high:g}")
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    marks = [_multiple(factor, power) for power in powers for factor in _FACTORS]
    below = max(mark for mark in marks if mark <= low)
    above = min(mark for mark in marks if mark >= high and mark > below)
    return [mark for mark in marks if below <= mark <= above]


def _steps(value: float, factor: int, power: int) -> float:
    return value / _multiple(factor, power)


def _multiple(number: int, power: int) -> float:
    """`number` times ten to the `power`, as it would be written down."""
    return float(f"{number}e{power}")
