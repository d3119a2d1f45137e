"""Reference cases on disk: a safetensors file each, with the case's settings as JSON in its metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from uso_engine.errors import CheckpointError, MissingFileError
from uso_engine.model.rope import PositionOffset
from uso_engine.precision.tiers import FloatType
from uso_engine.weights.autoencoder_keys import AutoencoderParams
from uso_engine.weights.model_sizes import read_sizes


class CaseSettings(BaseModel):
    """Settings of a transformer case. Sizes are pixels, `refs` are latent heights and widths."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int
    height: int
    refs: tuple[tuple[int, int], ...]
    styles: int = Field(ge=0)
    steps: int = Field(ge=1)
    guidance: float
    seed: int
    guidance_embed: bool
    lora: bool
    pe: PositionOffset = "d"
    salt: str = ""
    dtype: FloatType = "float32"


class AutoencoderSettings(BaseModel):
    """Settings of an autoencoder case."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ae: Annotated[AutoencoderParams, BeforeValidator(partial(read_sizes, AutoencoderParams))]
    salt: str = ""


@dataclass(frozen=True)
class Case:
    """One reference case.

    Args:
        name: the file's name without its ending.
        settings: of a transformer or an autoencoder case.
        tensors: everything in the file.
    """

    name: str
    settings: CaseSettings | AutoencoderSettings
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Tables:
    """Size rules and schedules of a ``tables.json``."""

    preprocess_ref: dict[str, dict[str, object]]
    schedule: dict[str, list[float]]


def read_cases(folder: Path) -> tuple[list[Case], Tables | None]:
    """Read every case of a folder, and its tables where there are any.

    Raises:
        MissingFileError: no such folder, or nothing in it to check.
        CheckpointError: a file that is not a case.
    """
    if not folder.is_dir():
        raise MissingFileError(f"no folder {folder}")
    cases = [_read_case(path) for path in sorted(folder.glob("*.safetensors"))]
    path = folder / "tables.json"
    tables = _read_tables(path) if path.is_file() else None
    if not cases and tables is None:
        raise MissingFileError(f"{folder} holds no reference cases: expected *.safetensors files or tables.json")
    return cases, tables


def _read_case(path: Path) -> Case:
    try:
        with safe_open(path, "pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if "case" not in metadata:
        raise CheckpointError(f"{path} is not a reference case: its metadata has no 'case'")
    try:
        content = json.loads(metadata["case"])
        kind = AutoencoderSettings if isinstance(content, dict) and "ae" in content else CaseSettings
        settings = kind.model_validate(content)
    except (ValueError, ValidationError) as error:
        raise CheckpointError(f"{path}: the case's settings cannot be read: {error}") from error
    return Case(path.stem, settings, tensors)


def _read_tables(path: Path) -> Tables:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Tables(dict(content.get("preprocess_ref", {})), dict(content.get("schedule", {})))
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
