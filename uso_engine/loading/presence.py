"""Whether everything that a configuration names is on this machine, asked before minutes go into loading the first of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from uso_engine.conditioning.docstrings import require_docstrings
from uso_engine.conditioning.model_folder import require_files, require_model_files
from uso_engine.conditioning.tokenizer_folders import CLIP_FILES, T5_FILES, find_tokenizer
from uso_engine.config import EngineConfig, list_configs
from uso_engine.errors import MissingFileError
from uso_engine.weights.files.checkpoint_files import open_checkpoint
from uso_engine.weights.files.key_report import bulleted
from uso_engine.weights.files.quantized_file import is_quantized_file

from .download import ConfiguredFile, configured_files
from .transformer import resolve

_SUBFOLDERS = {"transformer checkpoint": "transformer", "autoencoder": "vae"}
_WITH_PROCESSOR = ("vision encoder", "safety checker")


QUANTIZED_FROM = ("transformer checkpoint", "LoRA")
"""What is needed to quantise a transformer."""


def require_parts(*configs: EngineConfig, only: Collection[str] | None = None) -> None:
    """Check that every file and folder is there and that no folder lacks a file.

    LoRAs are not needed where the transformer comes from a quantised file, which has them merged.

    Args:
        configs: one configuration, or several that will be loaded one after the other.
        only: which parts, by what they are; all if not given.

    Raises:
        MissingFileError: parts that are not there or not complete; all are named, with what brings them here.
        CheckpointError: a checkpoint's header or an index that is damaged.
        BackendError: what reads the parts cannot be imported under this Python's options.
    """
    if only is None:
        check_interpreter(*configs)
    complaints = []
    for config in configs:
        missing = _missing(config, only)
        if missing:
            name = config.name if config.name in list_configs() else "CONFIG"
            how = (
                f"`uso-engine download {name}` gets what is on the hub (nothing is downloaded by itself); "
                "for anything else, correct the path in the configuration"
            )
            complaints.append(bulleted(f"{config.name}: not on this machine; {how}", missing))
    if complaints:
        raise MissingFileError("\n".join(dict.fromkeys(complaints)))


def check_interpreter(*configs: EngineConfig) -> None:
    """Check that this Python's options leave transformers what it needs, for configurations that it has parts of.

    Raises:
        BackendError: they do not.
    """
    if any(part for config in configs for part in (config.t5, config.clip, config.projector, config.safety)):
        require_docstrings()


def _missing(config: EngineConfig, only: Collection[str] | None) -> list[str]:
    """What a configuration names and is not here."""
    missing: list[str] = []
    needs_loras = True
    for part in configured_files(config):
        if only is not None and part.what not in only:
            continue
        try:
            path = resolve(part.text, part.what, config)
        except MissingFileError as error:
            if part.what != "LoRA" or needs_loras:
                is_on_hub = part.hub_id is not None and error.__cause__ is None
                missing.append(f"{part.what}: {part.text}" if is_on_hub else str(error))
            continue
        if part.what == "transformer checkpoint":
            needs_loras = not is_quantized_file(path)
        missing += _lacking(part, path, config)
    return missing


def _lacking(part: ConfiguredFile, path: Path, config: EngineConfig) -> list[str]:
    """The files that a part which is there still lacks."""
    lacking: list[str] = []

    def check(require: Callable[..., object], *arguments: object) -> None:
        try:
            require(path, *arguments)
        except MissingFileError as error:
            lacking.append(str(error))

    if path.is_file() and (part.what == "vision encoder" or part.what.endswith("text encoder")):
        for name, section in (("T5", config.t5), ("CLIP", config.clip)):
            if part.what == f"{name} text encoder" and section is not None and section.tokenizer is None:
                check(lambda file, name=name: find_tokenizer(name, file))
        return lacking
    if part.what in _SUBFOLDERS:
        check(_require_shards, _SUBFOLDERS[part.what])
    if part.what in _WITH_PROCESSOR:
        check(require_files, f"{part.what}'s image processor", [["preprocessor_config.json"]])
    if part.what in _WITH_PROCESSOR or part.what.endswith("text encoder"):
        check(require_model_files, part.what)
    for name, section, files in (("T5", config.t5, T5_FILES), ("CLIP", config.clip, CLIP_FILES)):
        has_own = section is not None and section.tokenizer is not None
        if part.what == (f"{name} tokenizer" if has_own else f"{name} text encoder"):
            check(require_files, f"{name} tokenizer", files)
    return lacking


def _require_shards(path: Path, subfolder: str) -> None:
    open_checkpoint(path, subfolder=subfolder).close()
