"""Reading the command line's own little formats: sizes, LoRAs with weights, files of requests."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from uso_engine.errors import MissingFileError, OutputError

_SIZE = re.compile(r"(\d+)[x×](\d+)", re.IGNORECASE)


def parse_size(text: str) -> str | dict[str, int]:
    """A preset's name as it is, or WIDTHxHEIGHT as the request's object."""
    match = _SIZE.fullmatch(text.strip())
    return text if match is None else {"width": int(match[1]), "height": int(match[2])}


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


def read_batch(path: Path) -> list[dict[str, object]]:
    """A file of requests, one JSON object per line; empty lines are passed over.

    Raises:
        MissingFileError: no such file.
        ValueError: a line that is not a JSON object; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise MissingFileError(f"no file of requests at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(request, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(request).__name__}")
        requests.append(request)
    if not requests:
        raise ValueError(f"{path} holds no requests")
    return requests


def check_output(*paths: Path | None) -> None:
    """Find out before minutes of work whether results can be written.

    Raises:
        ValueError: an ending other than .png, .jpg, .jpeg.
        OutputError: a folder that is not there or not writable.
    """
    for path in paths:
        if path is None:
            continue
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise ValueError(f"{path}: expected a name that ends in .png, .jpg or .jpeg")
        folder = path.parent
        if not folder.is_dir():
            raise OutputError(f"cannot write {path}: there is no folder {folder}")
        if path.is_dir() or not os.access(folder, os.W_OK):
            raise OutputError(f"cannot write {path}: {'it is a folder' if path.is_dir() else f'{folder} is not writable'}")
