"""Reading the command line's own little formats: sizes, LoRAs with weights, files of requests."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from uso_engine.errors import MissingFileError

_SIZE = re.compile(r"(\d+)[x×](\d+)", re.IGNORECASE)


def parse_size(text: str) -> str | dict[str, int]:
    """A preset's name as it is, or WIDTHxHEIGHT as the request's object."""
    match = _SIZE.fullmatch(text.strip())
    return text if match is None else {"width": int(match[1]), "height": int(match[2])}


def parse_images(names: Sequence[str]) -> list[str | None]:
    """Pictures in order; the word none in the first place stands for no content image.

    Raises:
        ValueError: a name that is empty, as an unset variable of the shell is.
    """
    if "" in names:
        raise ValueError("--image is empty; give a path or URL, or 'none' in the first place for style alone")
    return [None if place == 0 and name.lower() == "none" else name for place, name in enumerate(names)]


def parse_lora(text: str) -> tuple[str, float]:
    """``PATH`` or ``PATH=WEIGHT``.

    Raises:
        ValueError: the weight is not a number.
    """
    path, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise ValueError(f"--lora takes PATH or PATH=WEIGHT, got {text!r}: {weight!r} is not a number") from None


def merged_line(given: Mapping[str, object], line: Mapping[str, object]) -> dict[str, object]:
    """A line of a batch with what it leaves out taken from the command line's options.

    Args:
        given: fields that options gave, by the names that Python uses.
        line: fields of the line; what it says counts, also where it says the same thing by another field.
    """
    said = {*line, *({"images"} if "image_urls" in line else ()), *({"keep_size"} if "image_size" in line else ())}
    return {**{name: value for name, value in given.items() if name not in said}, **line}


def read_batch(path: Path) -> list[dict[str, object]]:
    """A file of requests, one JSON object per line; empty lines are passed over.

    A seed of -1 has one drawn, as `--seed -1` has: it is null in what is returned, which the option does not stand in for.

    Raises:
        MissingFileError: no such file.
        ValueError: a line that is not a JSON object, or gives a field twice; names the line.
    """
    from uso_engine.api.fields import asks_for_a_seed

    try:
        # Some editors put a byte order mark first. Only line feeds end a line: JSON's strings may hold other separators.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise MissingFileError(f"no file of requests at {path}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line, object_pairs_hook=_named_once)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # a number of 4,300 digits, lists within lists, a field given twice
            raise ValueError(f"{path}, line {number}: cannot be read: {error}") from None
        if not isinstance(request, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(request).__name__}")
        if asks_for_a_seed(request.get("seed")):
            request["seed"] = None
        requests.append(request)
    if not requests:
        raise ValueError(f"{path} holds no requests")
    return requests


def _named_once(fields: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object's fields; of one that is given twice, json would keep the last without a word."""
    named = dict(fields)
    if len(named) < len(fields):
        twice = sorted(name for name, count in Counter(name for name, _ in fields).items() if count > 1)
        raise ValueError(f"{', '.join(map(repr, twice))} is given more than once")
    return named
