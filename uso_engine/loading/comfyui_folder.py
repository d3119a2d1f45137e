"""What a folder of models holds of an engine's parts: ComfyUI's, by what is in its files, or a pipeline of diffusers.

Every file is asked what it is: headers are read, names decide nothing but which of several LoRAs is USO's. Of several files for
one part the one with most bytes is taken, which is the least quantised; the others are named.
Source: folder names in ComfyUI's folder_paths.py and its extra_model_paths.yaml.example.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from uso_engine.config import EMBEDDED_PREFIX, EngineConfig, TextEncoderConfig
from uso_engine.errors import CheckpointError, MissingFileError, USOError
from uso_engine.weights.files.key_report import short_reason
from uso_engine.weights.files.paths import local_path

from .download import ConfiguredFile, configured_files
from .examination import PartFacts, examine_part

FOLDERS = ("diffusion_models", "unet", "checkpoints", "text_encoders", "clip", "clip_vision", "vae", "loras", "model_patches")
_ENDINGS = (".safetensors", ".sft", ".gguf")
_MOST_FILES = 20_000
_MAX_YAML_BYTES = 1_000_000
# A part, and the folders that may hold it; an all-in-one checkpoint may hold most.
_PLACES: Mapping[str, tuple[str, ...]] = {
    "transformer checkpoint": ("diffusion_models", "unet", "checkpoints"),
    "LoRA": ("loras",),
    "style projector": ("model_patches",),
    "vision encoder": ("clip_vision",),
    "T5 text encoder": ("text_encoders", "clip", "checkpoints"),
    "CLIP text encoder": ("text_encoders", "clip", "checkpoints"),
    "autoencoder": ("vae", "checkpoints"),
}


@dataclass(frozen=True)
class Candidate:
    """A file that fits a part.

    Args:
        path: of the file or folder.
        facts: what it is.
    """

    path: Path
    facts: PartFacts


@dataclass
class FoundParts:
    """What was found.

    Args:
        chosen: for each part.
        others: further files for the same part.
        missing: parts for which there is none, and why files that lie where theirs would are none.
        loras: files of further LoRAs.
    """

    chosen: dict[str, Candidate] = field(default_factory=dict)
    others: dict[str, list[Path]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    loras: list[Path] = field(default_factory=list)


def find_in_comfyui(folder: Path, config: EngineConfig) -> FoundParts:
    """Look through a ComfyUI installation or its models folder.

    Args:
        folder: of the installation, or its ``models``; links are followed, and ``extra_model_paths.yaml``.
        config: whose parts are looked for, in their sizes.

    Raises:
        MissingFileError: no such folder, or none of ComfyUI's folders in it.
        CheckpointError: an ``extra_model_paths.yaml`` that cannot be read.
    """
    places = _places(folder)
    if not places:
        raise MissingFileError(f"{folder}: none of ComfyUI's folders is in it ({', '.join(FOLDERS)})")
    found = FoundParts()
    for what in dict.fromkeys(part.what for part in configured_files(config)):
        if what not in _PLACES:
            continue
        files = [file for name in _PLACES[what] for place in places.get(name, ()) for file in _files(place)]
        _choose(what, list(dict.fromkeys(files)), config, found)
    return found


def find_in_diffusers(folder: Path, config: EngineConfig) -> FoundParts:
    """Look through a pipeline of diffusers; arguments and errors as for `find_in_comfyui`."""
    if not (folder / "model_index.json").is_file() and not (folder / "transformer").is_dir():
        raise MissingFileError(f"{folder}: expected a pipeline of diffusers, with model_index.json and a folder transformer")
    found = FoundParts()
    for what, names in (
        ("transformer checkpoint", "transformer"),
        ("T5 text encoder", "text_encoder_2"),
        ("T5 tokenizer", "tokenizer_2"),
        ("CLIP text encoder", "text_encoder"),
        ("CLIP tokenizer", "tokenizer"),
        ("autoencoder", "vae"),
    ):
        _choose(what, [folder / names], _with_tokenizers(config, folder), found)
    return found


def configuration_from(found: FoundParts, config: EngineConfig) -> EngineConfig:
    """The configuration with what was found in the place of its own parts; what is missing stays as it was.

    Args:
        found: from `find_in_comfyui` or `find_in_diffusers`.
        config: the one that was looked for.
    """
    paths = {part.what: own for part in configured_files(config) if (own := _own_path(part, config)) is not None}
    paths |= {what: str(candidate.path) for what, candidate in found.chosen.items()}
    changes: dict[str, object] = {}
    for name, key, what in (
        ("transformer", "checkpoint", "transformer checkpoint"),
        ("projector", "checkpoint", "style projector"),
        ("vision", "folder", "vision encoder"),
        ("autoencoder", "checkpoint", "autoencoder"),
    ):
        section = getattr(config, name)
        if section is not None and what in paths:
            changes[name] = section.model_copy(update={key: paths[what]})
    for name, encoder in (("t5", "T5"), ("clip", "CLIP")):
        section = getattr(config, name)
        if section is not None and f"{encoder} text encoder" in paths:
            update = {"folder": paths[f"{encoder} text encoder"], "tokenizer": paths.get(f"{encoder} tokenizer")}
            changes[name] = section.model_copy(update=update)
    if "LoRA" in paths and config.loras:
        changes["loras"] = (config.loras[0].model_copy(update={"path": paths["LoRA"]}), *config.loras[1:])
    return config.model_copy(update=changes)


def _own_path(part: ConfiguredFile, config: EngineConfig) -> str | None:
    """Where a part of the configuration lies, if it is a file beside it: what is written elsewhere must still find it."""
    if part.text.startswith(EMBEDDED_PREFIX):
        return None
    path = local_path(part.text, what=part.what, base_dir=config.base_folder)
    return str(path) if path.exists() else None


def _with_tokenizers(config: EngineConfig, folder: Path) -> EngineConfig:
    """The configuration with the tokenizers' folders of a pipeline, so that encoders are not asked for their own."""

    def named(section: TextEncoderConfig | None, name: str) -> TextEncoderConfig | None:
        return None if section is None else section.model_copy(update={"tokenizer": str(folder / name)})

    return config.model_copy(update={"t5": named(config.t5, "tokenizer_2"), "clip": named(config.clip, "tokenizer")})


def _choose(what: str, files: list[Path], config: EngineConfig, found: FoundParts) -> None:
    """Take the largest file that fits a part."""
    fitting: list[Candidate] = []
    reasons: list[str] = []
    for file in files:
        try:
            fitting.append(Candidate(file, examine_part(what, file, config)))
        except USOError as error:
            reasons.append(str(error).splitlines()[0])
    if what == "LoRA":
        own = [candidate for candidate in fitting if "uso" in candidate.path.name.lower()]
        found.loras = [candidate.path for candidate in fitting if candidate not in own]
        fitting = own or [c for c in fitting if c.path.name == "dit_lora.safetensors"]
    if not fitting:
        found.missing[what] = reasons
        return
    fitting.sort(key=lambda candidate: (-_size(candidate.path), str(candidate.path)))
    found.chosen[what] = fitting[0]
    found.others[what] = [candidate.path for candidate in fitting[1:]]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _places(folder: Path) -> dict[str, list[Path]]:
    """ComfyUI's folders by name, those of ``extra_model_paths.yaml`` among them."""
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: there is no such folder")
    places: dict[str, list[Path]] = {}
    for root in (folder, folder / "models"):
        for name in FOLDERS:
            if (root / name).is_dir():
                places.setdefault(name, []).append(root / name)
    for root in (folder, folder.parent):
        extra = root / "extra_model_paths.yaml"
        if extra.is_file():
            for name, path in _extra_places(extra):
                if path.is_dir():
                    places.setdefault(name, []).append(path)
    return places


def _extra_places(file: Path) -> Iterator[tuple[str, Path]]:
    """Folders that ``extra_model_paths.yaml`` names: relative to its ``base_path``, or to where it lies."""
    try:
        if file.stat().st_size > _MAX_YAML_BYTES:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes are too many for a list of paths")
        content = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file}: cannot be read: {short_reason(error)}") from error
    for section in content.values() if isinstance(content, dict) else ():
        if not isinstance(section, dict):
            continue
        base = Path(os.path.expandvars(str(section.get("base_path") or "."))).expanduser()
        for name, text in section.items():
            if name in FOLDERS and isinstance(text, str):
                yield from ((name, file.parent / base / line.strip()) for line in text.splitlines() if line.strip())


def _files(folder: Path) -> list[Path]:
    """Files of weights under a folder, links followed, each folder once."""
    seen: set[Path] = set()
    files: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        if real in seen or len(files) > _MOST_FILES:
            folders.clear()
            continue
        seen.add(real)
        files += [Path(place) / name for name in names if name.lower().endswith(_ENDINGS) and not name.startswith(".")]
    return sorted(files)
