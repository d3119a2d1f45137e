"""Keys of a checkpoint in words: all of them, yet short enough to read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

_MOST_KEYS_LISTED = 20
_MOST_PATTERNS_LISTED = 60
_NUMBER = re.compile(r"\d{1,9}")


def short_key(text: str) -> str:
    """One key for a message: keys come from files and may be of any length and content."""
    shown = text if text.isascii() and text.isprintable() else ascii(text)
    return shown if len(shown) <= 120 else f"{shown[:117]}..."


def short_reason(error: BaseException) -> str:
    """Another library's error in one line: it may be of any length and quote what it was given."""
    text = " ".join(str(error).split()) or type(error).__name__
    shown = text if text.isprintable() else ascii(text)
    return shown if len(shown) <= 300 else f"{shown[:297]}..."


def key_count(keys: Collection[str]) -> str:
    """How many keys, as ``1 key`` or ``3 keys``."""
    return f"{len(keys)} key" if len(keys) == 1 else f"{len(keys)} keys"


def summarise_keys(keys: Iterable[str]) -> str:
    """List keys; where they are many, those that differ in numbers only stand together as ``blocks.{0-18}.weight (19)``."""
    listed = [short_key(key) for key in keys]
    if len(listed) <= _MOST_KEYS_LISTED:
        return ", ".join(listed)
    groups: dict[str, list[tuple[int, ...]]] = {}
    for key in listed:
        groups.setdefault(_NUMBER.sub("\0", key), []).append(tuple(int(n) for n in _NUMBER.findall(key)))
    shown = [_pattern(pattern, numbers) for pattern, numbers in list(groups.items())[:_MOST_PATTERNS_LISTED]]
    if len(groups) > _MOST_PATTERNS_LISTED:
        rest = sum(len(numbers) for numbers in list(groups.values())[_MOST_PATTERNS_LISTED:])
        shown.append(f"and {rest} more")
    return ", ".join(shown)


def _pattern(pattern: str, numbers: list[tuple[int, ...]]) -> str:
    parts = pattern.split("\0")
    text = parts[0]
    for position, part in enumerate(parts[1:]):
        text += _ranges(sorted({n[position] for n in numbers})) + part
    return text if len(numbers) == 1 else f"{text} ({len(numbers)})"


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:8]]
    return "{" + ",".join(shown) + (",..." if len(runs) > 8 else "") + "}"


def compare_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Say everything in which a set of tensors differs from what a model needs.

    Args:
        expected: shape of every key that the model has.
        found: shape of every key that the file has.

    Returns:
        One sentence each for missing, left-over and wrongly shaped keys; empty if there are none.
    """
    problems = []
    missing = [key for key in expected if key not in found]
    if missing:
        problems.append(f"{key_count(missing)} missing: {summarise_keys(missing)}")
    left_over = [key for key in found if key not in expected]
    if left_over:
        problems.append(f"{key_count(left_over)} left over: {summarise_keys(left_over)}")
    # Grouped by the two shapes, so that one wrong width is one sentence, not seven hundred.
    misshapen: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for key, shape in expected.items():
        if key in found and found[key] != shape:
            misshapen.setdefault((shape, found[key]), []).append(key)
    for (shape, actual), keys in misshapen.items():
        problems.append(f"{key_count(keys)} of shape {list(actual)}, expected {list(shape)}: {summarise_keys(keys)}")
    return problems


def bulleted(title: str, problems: Iterable[str]) -> str:
    """A title and one line for each problem, the form of every error that lists several."""
    return "\n".join([f"{title}:", *(f"  - {problem}" for problem in problems)])
