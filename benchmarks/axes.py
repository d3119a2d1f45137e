"""Round numbers for the axes of plots."""

from __future__ import annotations

import math

_FACTORS = (1, 2, 5)
_MOST_STEPS = 5
# Of a step: what a quotient of two floats may miss a whole number by.
_SLACK = 1e-9
# Of the greater of two numbers: what is no difference.
_SAME = 1e-12
_LARGEST = 1e300


def ticks(low: float, high: float) -> list[float]:
    """Multiples of one, two or five times a power of ten that hold a range: the first and the last are the ends of its axis.

    Args:
        low: the least value to be shown, at least -1e300.
        high: the greatest, at most 1e300; may be the same.

    Returns:
        From two to six numbers, ascending, as close together as that allows.

    Raises:
        ValueError: they are further from 0 or no numbers, or the wrong way round.
    """
    if not -_LARGEST <= low <= high <= _LARGEST:
        raise ValueError(f"expected two numbers from {-_LARGEST:g} to {_LARGEST:g}, the lesser first, got {low:g} and {high:g}")
    size = max(abs(low), abs(high))
    # Floats that differ in their last digits alone have no round numbers between them.
    span = high - low if high - low > _SAME * size else size
    power = math.floor(math.log10((span if span > 1 / _LARGEST else 5.0) / _MOST_STEPS))
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
        low: the least value to be shown, at least 1e-300.
        high: the greatest, at most 1e300; may be the same.

    Returns:
        Two numbers or more, ascending.

    Raises:
        ValueError: they are lesser or greater or no numbers, or the wrong way round.
    """
    if not 1 / _LARGEST <= low <= high <= _LARGEST:
        told = f"expected two numbers from {1 / _LARGEST:g} to {_LARGEST:g}, the lesser first"
        raise ValueError(f"{told}, got {low:g} and {high:g}")
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
