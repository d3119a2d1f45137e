"""Load a transformers model from a local folder, completely or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import nn

from uso_engine.errors import CheckpointError, MissingFileError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    M = TypeVar("M", bound=PreTrainedModel)

# In the order transformers prefers them; an index names the shards beside it.
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SAMPLES_PER_TENSOR = 64


def load_pretrained(
    model_class: type[M], folder: Path, *, what: str, model_types: Sequence[str], dtype: torch.dtype, device: torch.device | str
) -> M:
    """Load every parameter of a model from a folder; nothing is downloaded.

    Args:
        model_class: a transformers class; the folder may hold a larger model around it, as CLIP's does around its text half.
        folder: config.json and the weights, in one file or sharded.
        what: what to call it in error messages, such as "T5 text encoder".
        model_types: values of ``model_type`` in config.json that fit the class.
        dtype: of the parameters.
        device: where they end up.

    Returns:
        The model, in evaluation mode, without gradients.

    Raises:
        MissingFileError: the folder, config.json or weights are not there; says which.
        CheckpointError: another kind of model, an unreadable file, or weights that are missing or of another shape.
    """
    _require_weights(folder, what)
    _require_type(folder, what, model_types)
    try:
        with _quiet_transformers():
            loaded: object = model_class.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                # So that wrong shapes come back in the report, all of them, beside what is missing.
                ignore_mismatched_sizes=True,
            )
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError) as error:
        raise CheckpointError(f"{what} in {folder} cannot be loaded: {error}") from error
    model, report = cast("tuple[M, dict[str, Any]]", loaded)
    # transformers fills what is missing or misshapen with random numbers and only logs it.
    problems = [f"{key} is missing" for key in sorted(report["missing_keys"])]
    problems += [
        f"{key} has shape {list(found)}, the model takes {list(wanted)}"
        for key, found, wanted in sorted(report["mismatched_keys"], key=lambda entry: str(entry[0]))
    ]
    problems += [str(message) for message in report["error_msgs"]]
    if problems:
        raise CheckpointError(f"{what} in {folder} does not fit: {'; '.join(problems)}")
    module: nn.Module = model
    module.eval().requires_grad_(False).to(device)
    return model


def require_files(folder: Path, what: str, choices: Sequence[Sequence[str]]) -> None:
    """Check that a folder holds at least one of several sets of files.

    Args:
        folder: where to look.
        what: what to call them in the message.
        choices: sets of file names; one complete set is enough.

    Raises:
        MissingFileError: no set is complete; names the folder and what is missing.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{what} not found: no folder {folder}")
    if not any(all((folder / name).is_file() for name in names) for names in choices):
        needed = " or ".join(" and ".join(names) for names in choices)
        raise MissingFileError(f"{what} in {folder} is incomplete: needs {needed}")


def fingerprint(modules: Sequence[nn.Module], *settings: str) -> str:
    """Identify what a set of modules computes, so that a cached or saved answer is only used with the weights that gave it.

    Hashes every parameter's name, shape and up to 64 evenly spaced values, rounded to bfloat16: the same weights loaded in
    another precision, sharding or place have the same fingerprint, and no gigabytes are read. Two models that differ only in a
    few values between the sampled ones are not told apart; fine-tuned or retrained ones are.

    Args:
        modules: in a fixed order.
        settings: whatever else the answer depends on.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps([len(modules), *settings]).encode())
    for module in modules:
        for name, parameter in module.named_parameters():
            flat = parameter.detach().reshape(-1)
            positions = torch.linspace(0, max(flat.numel() - 1, 0), min(flat.numel(), _SAMPLES_PER_TENSOR), dtype=torch.float64)
            sample = flat[positions.long().to(flat.device)].to(torch.bfloat16).cpu()
            digest.update(f"{name} {tuple(parameter.shape)}\0".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _require_weights(folder: Path, what: str) -> None:
    require_files(folder, f"{what} configuration", [["config.json"]])
    require_files(folder, f"{what} weights", [[name] for name in _WEIGHT_FILES])
    name = next(name for name in _WEIGHT_FILES if (folder / name).is_file())
    if not name.endswith(".index.json"):
        return
    index = _read_json(folder / name, what)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict):
        raise CheckpointError(f"{what}: {folder / name} has no weight_map")
    absent = sorted({str(shard) for shard in shards.values() if not (folder / str(shard)).is_file()})
    if absent:
        raise MissingFileError(f"{what} in {folder} is incomplete: missing {', '.join(absent)}")


def _require_type(folder: Path, what: str, model_types: Sequence[str]) -> None:
    config = _read_json(folder / "config.json", what)
    found = config.get("model_type") if isinstance(config, dict) else None
    if found not in model_types:
        expected = " or ".join(map(repr, model_types))
        raise CheckpointError(f"{what}: {folder} holds a model of type {found!r}, expected {expected}")


def _read_json(path: Path, what: str) -> object:
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{what}: {path} is not readable JSON: {error}") from error
    return content


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep progress bars and key tables off the caller's terminal; what they would say is in our errors."""
    from transformers.utils import logging

    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
