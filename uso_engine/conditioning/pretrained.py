"""Load a transformers model from a local folder, completely or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from uso_engine.conditioning.model_folder import check_config, check_weights, require_model_files
from uso_engine.errors import CheckpointError, USOError
from uso_engine.precision.finite import is_finite
from uso_engine.weights.files.key_report import key_count, short_reason, summarise_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    M = TypeVar("M", bound=PreTrainedModel)

# While transformers loads a model it replaces functions and settings of the whole process. Two loads at once give each other's
# back: weights are then reported as missing that are there.
_loading = threading.Lock()
_SAMPLES_PER_TENSOR = 64
_MOST_NAMED = 20


def load_pretrained(
    model_class: type[M],
    folder: Path,
    *,
    what: str,
    model_types: Sequence[str],
    harmless: Sequence[str] = (),
    dtype: torch.dtype,
    device: torch.device | str,
) -> M:
    """Load every parameter of a model from a folder; nothing is downloaded.

    Args:
        model_class: a transformers class; the folder may hold a larger model around it, as CLIP's does around its text half.
        folder: config.json and the weights, in one file or sharded.
        what: what to call it in error messages, such as "T5 text encoder".
        model_types: values of ``model_type`` in config.json that fit the class.
        harmless: keys, and prefixes that end in a dot, which public files of this kind hold besides the model's own. Any other
            left-over key is an error: it may be what the weights have to be multiplied with.
        dtype: of the parameters.
        device: where they end up.

    Returns:
        The model, in evaluation mode, without gradients.

    Raises:
        MissingFileError: the folder, config.json or weights are not there; says which.
        CheckpointError: another kind of model, an unreadable or quantised file, or weights that are missing, left over, of
            another shape or not numbers.
    """
    files = require_model_files(folder, what)
    check_config(folder, what, model_types)
    try:
        with _loading, _quiet_transformers():
            check_weights(files, what, _parameter_count(model_class, folder))
            loaded: object = model_class.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                # So that wrong shapes come back in the report, all of them, beside what is missing.
                ignore_mismatched_sizes=True,
            )
    except USOError:
        raise
    except Exception as error:  # of any type: transformers reads a foreign folder and lets through what that raises
        raise CheckpointError(f"{what} in {folder} cannot be loaded: {short_reason(error)}") from error
    model, report = cast("tuple[M, dict[str, Any]]", loaded)
    problems = _problems(report, harmless)
    if not problems:
        broken = [name for name, value in model.named_parameters() if not is_finite(value)]
        problems += [f"infinite or not a number in {summarise_keys(broken)}"] if broken else []
    if problems:
        raise CheckpointError(f"{what} in {folder} does not fit: {'; '.join(problems)}")
    module: nn.Module = model
    module.eval().requires_grad_(False).to(device)
    return model


def check_pretrained(model_class: type[M], folder: Path, *, what: str, model_types: Sequence[str]) -> M:
    """Check what can be checked of a folder without loading its weights: files, settings, types and amounts.

    Args:
        model_class: see `load_pretrained`.
        folder: see `load_pretrained`.
        what: see `load_pretrained`.
        model_types: see `load_pretrained`.

    Returns:
        The model on the meta device.

    Raises:
        MissingFileError, CheckpointError: as for `load_pretrained`, as far as it shows without the weights.
    """
    files = require_model_files(folder, what)
    check_config(folder, what, model_types)
    try:
        with _quiet_transformers():
            model = _on_meta(model_class, folder)
            check_weights(files, what, sum(parameter.numel() for parameter in model.parameters()))
    except USOError:
        raise
    except Exception as error:  # of any type, as in load_pretrained
        raise CheckpointError(f"{what} in {folder} cannot be loaded: {short_reason(error)}") from error
    return model


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


def _parameter_count(model_class: type[PreTrainedModel], folder: Path) -> int:
    """Parameters of the model that config.json describes; nothing is allocated for it."""
    return sum(parameter.numel() for parameter in _on_meta(model_class, folder).parameters())


def _on_meta(model_class: type[M], folder: Path) -> M:
    config_class = model_class.config_class
    assert config_class is not None
    config = config_class.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return model_class(config)


def _problems(report: Mapping[str, Any], harmless: Sequence[str]) -> list[str]:
    """What transformers only logs: missing and misshapen weights, which it fills at random, and left-over ones."""
    missing = sorted(report["missing_keys"])
    problems = [f"{key} is missing" for key in missing]
    if len(missing) > _MOST_NAMED:
        problems = [f"{key_count(missing)} missing: {summarise_keys(missing)}"]
    problems += [
        f"{key} has shape {list(found)}, the model takes {list(wanted)}"
        for key, found, wanted in sorted(report["mismatched_keys"], key=lambda entry: str(entry[0]))
    ]
    prefixes = tuple(entry for entry in harmless if entry.endswith("."))
    left_over = sorted(key for key in report["unexpected_keys"] if key not in harmless and not key.startswith(prefixes))
    if left_over:
        problems.append(f"{key_count(left_over)} left over: {summarise_keys(left_over)}")
    return problems + [str(message) for message in report["error_msgs"]]


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
