"""Building an engine's parts from its configuration: paths resolved, files read, weights in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from uso_kernels.attention import available_backends

from .conditioning.content import Autoencoder
from .conditioning.style import StyleEncoder
from .conditioning.text import TextEncoders
from .config import EMBEDDED_PREFIX, AutoencoderConfig, EngineConfig, Tier
from .errors import BackendError
from .model.projector import StyleProjector
from .model.transformer import Transformer
from .pipeline import MIB, CacheLimits, Pipeline
from .weights import autoencoder_checkpoint
from .weights.loaded_transformer import LoadedTransformer
from .weights.loading import load_parameters
from .weights.lora import read_lora
from .weights.low_rank import LoRA
from .weights.paths import resolve_path
from .weights.projector_checkpoint import open_projector_checkpoint
from .weights.transformer_checkpoint import open_transformer_checkpoint

if TYPE_CHECKING:
    from .safety import SafetyChecker

LoadProgress = Callable[[str, int, int], None]
"""Called with the part that is being loaded, the bytes read so far and the bytes to read in all (0 where unknown)."""

_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16}


def resolve(text: str, what: str, config: EngineConfig) -> Path:
    """Find a file or folder that a configuration names.

    Args:
        text: a path, relative to the configuration's folder; a hub id, looked up in the local cache; or ``embedded:`` and a
            path inside the package.
        what: what it is, for messages.
        config: which configuration says so.

    Raises:
        MissingFileError: it is not there.
    """
    if text.startswith(EMBEDDED_PREFIX):
        text = str(Path(str(files("uso_engine"))) / "embedded" / text.removeprefix(EMBEDDED_PREFIX))
    return resolve_path(text, what=what, base_dir=config.base_folder)


def load_transformer(
    config: EngineConfig,
    *,
    device: torch.device | str,
    tier: Tier,
    attention: str = "auto",
    progress: LoadProgress | None = None,
) -> LoadedTransformer:
    """Load the transformer and merge the configured LoRAs.

    Args:
        config: what to load.
        device: where to.
        tier: of its weights.
        attention: attention backend by name; "auto" chooses for every batch.
        progress: told the bytes read and to be read.

    Raises:
        MissingFileError: a file is not there.
        CheckpointError: a file does not fit the model.
        BackendError: a tier or an attention backend that cannot be computed here.
    """
    dtype = tier_dtype(tier)
    check_attention(attention, device)
    params = config.transformer.params
    source = open_transformer_checkpoint(resolve(config.transformer.checkpoint, "transformer checkpoint", config), params)
    try:
        loras = read_loras([(entry.path, entry.weight) for entry in config.loras], config)
        with torch.device("meta"):
            module = Transformer(params, attention_backend=attention)
        load_parameters(
            module, source, device=device, dtype=dtype, loras=loras, progress=_part_progress(progress, "transformer")
        )
    except BaseException:
        source.close()
        raise
    return LoadedTransformer(module.eval(), source, loras)


def read_loras(loras: Sequence[tuple[str, float]], config: EngineConfig) -> list[tuple[LoRA, float]]:
    """Read LoRA files for a configuration's transformer.

    Args:
        loras: paths or hub ids, and the weight of each.
        config: whose folder relative paths start in.

    Raises:
        MissingFileError: a file is not there.
        LoRAError: a file that does not fit.
    """
    params = config.transformer.params
    return [(read_lora(resolve(path, "LoRA", config), params), weight) for path, weight in loras]


def load_safety_checker(config: EngineConfig, *, device: torch.device | str) -> SafetyChecker | None:
    """Load the safety checker; None where the configuration has none."""
    if config.safety is None:
        return None
    from .safety import SafetyChecker

    folder = resolve(config.safety.folder, "safety checker", config)
    return SafetyChecker.from_folder(folder, threshold=config.safety.threshold, device=device)


def load_style_encoder(config: EngineConfig, *, device: torch.device | str, dtype: torch.dtype) -> StyleEncoder | None:
    """Load the vision encoder and the style projector; None where the configuration has none."""
    if config.projector is None or config.vision is None:
        return None
    section = config.projector
    hidden_size = config.transformer.params.hidden_size
    projector = StyleProjector(section.vision_tokens, section.vision_width, section.style_tokens, hidden_size, device="meta")
    source = open_projector_checkpoint(
        resolve(section.checkpoint, "style projector", config),
        vision_tokens=section.vision_tokens,
        vision_width=section.vision_width,
        style_tokens=section.style_tokens,
        hidden_size=hidden_size,
    )
    try:
        load_parameters(projector, source, device=device, dtype=dtype)
    finally:
        source.close()
    return StyleEncoder.from_folder(resolve(config.vision.folder, "vision encoder", config), projector, device=device)


def load_text_encoders(config: EngineConfig, *, device: torch.device | str, dtype: torch.dtype) -> TextEncoders | None:
    """Load T5 and CLIP; None where the configuration has none."""
    if config.t5 is None or config.clip is None:
        return None
    folders = {
        name: resolve(entry.folder, f"{name} text encoder", config)
        for name, entry in (("T5", config.t5), ("CLIP", config.clip))
    }
    tokenizers = {
        name: None if entry.tokenizer is None else resolve(entry.tokenizer, f"{name} tokenizer", config)
        for name, entry in (("T5", config.t5), ("CLIP", config.clip))
    }
    return TextEncoders.from_folders(
        folders["T5"],
        folders["CLIP"],
        t5_tokenizer=tokenizers["T5"],
        clip_tokenizer=tokenizers["CLIP"],
        t5_max_length=config.t5.max_length,
        clip_max_length=config.clip.max_length,
        device=device,
        dtype=dtype,
    )


def load_autoencoder(section: AutoencoderConfig, path: Path, *, device: torch.device | str) -> Autoencoder:
    """Load an autoencoder from a file or a diffusers folder; encoder and decoder in float32, as the authors run them."""
    sizes = section.params
    module = autoencoder_checkpoint.load_autoencoder(path, sizes, device=device, dtype=torch.float32)
    return Autoencoder(
        module,
        scale_factor=sizes.scale_factor,
        shift_factor=sizes.shift_factor,
        device=device,
        tile_side=section.tile_side,
    )


def load_pipeline(
    config: EngineConfig,
    *,
    device: torch.device | str,
    tier: Tier | None = None,
    attention: str = "auto",
    progress: LoadProgress | None = None,
) -> Pipeline:
    """Load every part that a configuration names.

    Args:
        config: what to load.
        device: where to.
        tier: of the transformer's weights, instead of the configuration's.
        attention: attention backend by name; "auto" chooses.
        progress: told what is being loaded.

    Raises:
        MissingFileError: a file is not there; says which.
        CheckpointError: a file does not fit.
        BackendError: this machine cannot run what was asked for.
    """
    check_device(device)
    tier = config.precision.tier if tier is None else tier
    report = progress if progress is not None else _no_progress
    loaded = load_transformer(config, device=device, tier=tier, attention=attention, progress=progress)
    dtype = loaded.module.img_in.weight.dtype
    report("style encoder", 0, 0)
    style = load_style_encoder(config, device=device, dtype=dtype)
    report("text encoders", 0, 0)
    text = load_text_encoders(config, device=device, dtype=dtype)
    autoencoder = None
    if config.autoencoder is not None:
        report("autoencoder", 0, 0)
        path = resolve(config.autoencoder.checkpoint, "autoencoder", config)
        autoencoder = load_autoencoder(config.autoencoder, path, device=device)
    limits = CacheLimits(
        *(int(size * MIB) for size in (config.cache.prompt_mib, config.cache.style_mib, config.cache.content_mib))
    )
    return Pipeline(loaded, text=text, style=style, autoencoder=autoencoder, limits=limits)


def tier_dtype(tier: Tier) -> torch.dtype:
    """The floating-point type of a tier.

    Raises:
        BackendError: a quantised tier, which needs a quantised loader.
    """
    if tier not in _DTYPES:
        raise BackendError(f"precision tier {tier!r} cannot be loaded by this build; available: {', '.join(_DTYPES)}")
    return _DTYPES[tier]


def check_device(device: torch.device | str) -> torch.device:
    """Check that a device exists.

    Raises:
        BackendError: there is no such device here.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise BackendError(f"{device!r} is not a device: expected 'cpu', 'cuda' or 'cuda:0'") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device {device!r} was asked for, but torch {torch.__version__} sees no CUDA GPU")
    if found.type == "cuda" and found.index is not None and found.index >= torch.cuda.device_count():
        raise BackendError(f"device {device!r} was asked for, but there are only {torch.cuda.device_count()} GPUs")
    return found


def check_attention(attention: str, device: torch.device | str) -> None:
    """Check that an attention backend exists and can run on a device.

    Raises:
        BackendError: it does not or cannot; says which can.
    """
    if attention == "auto":
        return
    found = available_backends(device)
    if attention not in found or found[attention] is not None:
        reason = found.get(attention, "there is no such backend")
        runnable = ", ".join(name for name, missing in found.items() if missing is None)
        raise BackendError(f"attention backend {attention!r} cannot run on {device}: {reason}; these can: auto, {runnable}")


def _part_progress(progress: LoadProgress | None, part: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(part, done, total)


def _no_progress(part: str, done: int, total: int) -> None:
    """Nobody is watching."""
