"""What the parts of a configuration are and whether they fit, by headers and settings alone: no weights are read.

A part that passes can still hold values that are no numbers; that is seen when it is loaded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from uso_engine.conditioning.model_folder import require_files, require_model_files
from uso_engine.conditioning.pretrained import check_pretrained
from uso_engine.conditioning.single_file import CLIP, SIGLIP, T5, EncoderKind, check_encoder_file
from uso_engine.conditioning.text_models import tokenizer_folder
from uso_engine.conditioning.tokenizer_folders import CLIP_FILES, T5_FILES
from uso_engine.config import EngineConfig
from uso_engine.errors import CheckpointError, MissingFileError, USOError
from uso_engine.model.projector import StyleProjector
from uso_engine.weights.autoencoder_checkpoint import check_autoencoder
from uso_engine.weights.files.checkpoint_files import open_checkpoint
from uso_engine.weights.files.quantized_file import is_quantized_file
from uso_engine.weights.files.tensor_source import TensorSource
from uso_engine.weights.lora import read_lora
from uso_engine.weights.projector_checkpoint import open_projector_checkpoint
from uso_engine.weights.quantized_checkpoint import read_description

from .download import ConfiguredFile, configured_files
from .presence import check_interpreter
from .transformer import open_originals_of, resolve


@dataclass(frozen=True)
class PartFacts:
    """One part that fits.

    Args:
        form: types that its weights are stored in, the one of most weights first.
        loaded_bytes: what it takes in memory: the transformer and T5 in bfloat16, what runs in float32 in that.
    """

    form: str
    loaded_bytes: int


@dataclass(frozen=True)
class Examined:
    """One part of a configuration and what was found.

    Args:
        part: as the configuration names it.
        facts: None where it is missing or does not fit.
        problem: what is wrong, or "".
    """

    part: ConfiguredFile
    facts: PartFacts | None
    problem: str = ""


def examine(config: EngineConfig) -> Iterator[Examined]:
    """Look at every part of a configuration, in loading order; what is wrong with one does not end the others.

    Yields:
        Each part as it was found.

    Raises:
        BackendError: transformers cannot be imported under this Python's options.
    """
    check_interpreter(config)
    is_merged = False
    for part in configured_files(config):
        try:
            path = resolve(part.text, part.what, config)
            is_merged = is_merged or (part.what == "transformer checkpoint" and is_quantized_file(path))
            facts = examine_part(part.what, path, config)
        except MissingFileError as error:
            # A quantised file has its LoRAs in it: they are needed only to change them.
            if not (is_merged and part.what == "LoRA"):
                yield Examined(part, None, str(error))
        except USOError as error:
            yield Examined(part, None, str(error))
        else:
            yield Examined(part, facts)


def examine_part(what: str, path: Path, config: EngineConfig) -> PartFacts:
    """Check one part by its headers.

    Args:
        what: as `uso_engine.loading.download.configured_files` calls it.
        path: where it lies.
        config: whose sizes it must have.

    Raises:
        MissingFileError: a file of it is missing.
        CheckpointError, LoRAError: it is another thing, or of other sizes.
        BackendError: a GGUF file, and the gguf library is not installed.
    """
    checks: dict[str, Callable[[Path, EngineConfig], PartFacts]] = {
        "transformer checkpoint": _transformer,
        "LoRA": _lora,
        "style projector": _projector,
        "vision encoder": _vision,
        "T5 text encoder": _t5,
        "CLIP text encoder": _clip,
        "T5 tokenizer": _tokenizer(T5_FILES),
        "CLIP tokenizer": _tokenizer(CLIP_FILES),
        "autoencoder": _autoencoder,
        "safety checker": _safety,
        "safety checker's ONNX file": _safety_file,
    }
    return checks[what](path, config)


def _transformer(path: Path, config: EngineConfig) -> PartFacts:
    if is_quantized_file(path):
        description = read_description(path)
        return PartFacts(f"quantised to {description.tier}", path.stat().st_size)
    source = open_originals_of(path, config)
    try:
        return _facts(source, 2)
    finally:
        source.close()


def _lora(path: Path, config: EngineConfig) -> PartFacts:
    # Read, for two layers may overlap and only their values tell whether they are the same; it takes a second.
    lora = read_lora(path, config.transformer.params)
    return PartFacts(f"{lora.style}, {len(lora.updates)} weights", 0)  # It is merged.


def _projector(path: Path, config: EngineConfig) -> PartFacts:
    section = config.projector
    assert section is not None
    hidden_size = config.transformer.params.hidden_size
    projector = StyleProjector(section.vision_tokens, section.vision_width, section.style_tokens, hidden_size, device="meta")
    source = open_projector_checkpoint(path, projector)
    try:
        return _facts(source, 2)
    finally:
        source.close()


def _vision(path: Path, config: EngineConfig) -> PartFacts:
    if not path.is_file():
        require_files(path, "vision encoder's image processor", [["preprocessor_config.json"]])
    width = None if config.projector is None else ("hidden_size", config.projector.vision_width)
    return _encoder(SIGLIP, path, ("siglip_vision_model", "siglip"), 4, width=width)


def _t5(path: Path, config: EngineConfig) -> PartFacts:
    _find_tokenizer("T5", path, config)
    return _encoder(T5, path, ("t5",), 2, width=("d_model", config.transformer.params.context_in_dim))


def _clip(path: Path, config: EngineConfig) -> PartFacts:
    _find_tokenizer("CLIP", path, config)
    width = ("hidden_size", config.transformer.params.vec_in_dim)
    return _encoder(CLIP, path, ("clip_text_model", "clip"), 2, width=width)


def _find_tokenizer(encoder: str, path: Path, config: EngineConfig) -> None:
    section, files = (config.t5, T5_FILES) if encoder == "T5" else (config.clip, CLIP_FILES)
    if section is None or section.tokenizer is None:
        require_files(tokenizer_folder(encoder, path, None), f"{encoder} tokenizer", files)


def _encoder(
    kind: EncoderKind, path: Path, model_types: tuple[str, ...], itemsize: int, *, width: tuple[str, int] | None = None
) -> PartFacts:
    import transformers

    if path.is_file():
        model = check_encoder_file(kind, path)
        source = open_checkpoint(path)
        form = _types(source)
        source.close()
    else:
        model = check_pretrained(getattr(transformers, kind.class_name), path, what=kind.what, model_types=model_types)
        form = "a folder of transformers"
    if width is not None and getattr(model.config, width[0]) != width[1]:
        given = getattr(model.config, width[0])
        raise CheckpointError(f"{kind.what}: {path} gives width {given}, the configuration's other parts take {width[1]}")
    count = sum(parameter.numel() for parameter in model.parameters())
    return PartFacts(form, itemsize * count)


def _tokenizer(files: tuple[list[str], ...]) -> Callable[[Path, EngineConfig], PartFacts]:
    def check(path: Path, config: EngineConfig) -> PartFacts:
        require_files(path, "tokenizer", files)
        return PartFacts("a tokenizer's folder", 0)

    return check


def _autoencoder(path: Path, config: EngineConfig) -> PartFacts:
    assert config.autoencoder is not None
    check_autoencoder(path, config.autoencoder.params)
    source = open_checkpoint(path, subfolder="vae")
    try:
        keys = [key for key in source.keys() if "coder." in key and not key.startswith(("model.", "text_enc"))]  # noqa: SIM118
        return PartFacts(_types(source), 4 * sum(math.prod(source.shape(key)) for key in keys))
    finally:
        source.close()


def _safety(path: Path, config: EngineConfig) -> PartFacts:
    require_files(path, "safety checker's image processor", [["preprocessor_config.json"]])
    files = require_model_files(path, "safety checker")
    return PartFacts("a folder of transformers", sum(file.stat().st_size for file in files))


def _safety_file(path: Path, config: EngineConfig) -> PartFacts:
    return PartFacts("for ONNX Runtime", path.stat().st_size)


def _facts(source: TensorSource, itemsize: int) -> PartFacts:
    count = sum(math.prod(source.shape(key)) for key in source.keys())  # noqa: SIM118 - a source is not a mapping
    return PartFacts(_types(source), itemsize * count)


def _types(source: TensorSource) -> str:
    counts: Counter[str] = Counter()
    for key in source.keys():  # noqa: SIM118 - a source is not a mapping
        counts[str(source.dtype(key)).removeprefix("torch.")] += math.prod(source.shape(key))
    return " and ".join(name for name, _ in counts.most_common(2)) or "nothing"
