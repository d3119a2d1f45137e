"""Building an engine's parts from its configuration: paths resolved, files read, weights in place."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from uso_engine.conditioning.cache import MIB, CacheLimits
from uso_engine.conditioning.content import Autoencoder
from uso_engine.conditioning.offloadable_part import OffloadablePart
from uso_engine.conditioning.style import StyleEncoder
from uso_engine.conditioning.text import TextEncoders
from uso_engine.config import AutoencoderConfig, EngineConfig, ProjectorConfig
from uso_engine.errors import CheckpointError, ConfigError, MemoryBudgetError
from uso_engine.model.projector import StyleProjector
from uso_engine.offload.budget import BUDGET_OF_SEVERAL, MemoryBudget
from uso_engine.offload.placement import carry_out
from uso_engine.parallel.leader import Leader
from uso_engine.pipeline import Pipeline
from uso_engine.precision.text_encoder import quantize_text_encoder
from uso_engine.precision.tiers import TIERS, TierName
from uso_engine.precision.transformer import DTYPES
from uso_engine.sampling.family import FAMILIES
from uso_engine.weights import autoencoder_checkpoint
from uso_engine.weights.loaded import LoadedTransformer
from uso_engine.weights.loading import load_parameters
from uso_engine.weights.lora.low_rank import FileName
from uso_engine.weights.projector_checkpoint import open_projector_checkpoint

from .device import check_device, let_go, out_of_memory
from .follower_processes import FollowerProcesses
from .presence import require_parts
from .torchrun import TorchrunProcesses, torchrun_launch
from .transformer import LoadProgress, load_transformer, resolve

if TYPE_CHECKING:
    from uso_engine.safety.checker import SafetyChecker


_ADVICE = (
    "end what else holds it, take a tier of fewer bits ([precision] tier, `uso-engine info CONFIG`), or set memory_budget_gib, "
    "so that parts of the model wait on the host"
)


def load_parts(
    config: EngineConfig,
    *,
    device: torch.device,
    tier: TierName | None,
    attention: str,
    budget: MemoryBudget | None,
    progress: LoadProgress | None,
) -> tuple[Pipeline, SafetyChecker | None]:
    """Load everything that an engine of this configuration has; arguments and errors as for `load_pipeline`.

    Raises:
        DeviceMemoryError: memory runs out; says who holds how much.
    """
    require_parts(config)
    safety: SafetyChecker | None = None
    try:
        safety = load_safety_checker(config, device=device if budget is None else "cpu")
        others = () if safety is None or safety.part is None else (safety.part,)
        pipeline = load_pipeline(
            config, device=device, tier=tier, attention=attention, budget=budget, other_parts=others, progress=progress
        )
    except BaseException as error:
        safety, others = None, ()  # A notebook keeps the last error, and with it what was loaded before.
        let_go(error)
        if isinstance(error, torch.OutOfMemoryError):
            raise out_of_memory(error, f"loading {config.name}", device, _ADVICE) from error
        raise
    return pipeline, safety


def load_safety_checker(config: EngineConfig, *, device: torch.device | str) -> SafetyChecker | None:
    """Load the safety checker; None where the configuration has none."""
    if config.safety is None:
        return None
    from uso_engine.safety.checker import SafetyChecker

    section = config.safety
    folder = resolve(section.folder, "safety checker", config)
    if section.runtime == "torch":
        return SafetyChecker.from_folder(folder, threshold=section.threshold, device=device)
    assert section.onnx_file is not None
    file = resolve(section.onnx_file, "safety checker's ONNX file", config)
    gpu = torch.device(device).index or 0
    return SafetyChecker.from_onnx(file, folder, threshold=section.threshold, provider=section.provider or "cpu", gpu=gpu)


def load_style_encoder(config: EngineConfig, *, device: torch.device | str, dtype: torch.dtype) -> StyleEncoder | None:
    """Load the vision encoder and the style projector; None where the configuration has none."""
    if config.projector is None or config.vision is None:
        return None
    projector = load_projector(config, config.projector, device=device, dtype=dtype)
    return StyleEncoder.from_folder(resolve(config.vision.folder, "vision encoder", config), projector, device=device)


def load_projector(
    config: EngineConfig, section: ProjectorConfig, *, device: torch.device | str, dtype: torch.dtype
) -> StyleProjector:
    """Load a configuration's style projector."""
    hidden_size = config.transformer.params.hidden_size
    projector = StyleProjector(section.vision_tokens, section.vision_width, section.style_tokens, hidden_size, device="meta")
    source = open_projector_checkpoint(resolve(section.checkpoint, "style projector", config), projector)
    try:
        load_parameters(projector, source, device=device, dtype=dtype)
    finally:
        source.close()
    return projector


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
    try:
        encoders = TextEncoders.from_folders(
            folders["T5"],
            folders["CLIP"],
            t5_tokenizer=tokenizers["T5"],
            clip_tokenizer=tokenizers["CLIP"],
            t5_max_length=config.t5.max_length,
            clip_max_length=config.clip.max_length,
            device=device,
            dtype=dtype,
        )
    except ValueError as error:  # how long a prompt CLIP takes is known when its folder was read
        raise ConfigError(f"{config.name}: [t5] or [clip] max_length: {error}") from error
    if TIERS[config.precision.text_encoder].text_encoder != "float":
        quantize_text_encoder(encoders.t5, config.precision.text_encoder)
    return encoders


def load_autoencoder(section: AutoencoderConfig, path: Path, *, device: torch.device | str) -> Autoencoder:
    """Load an autoencoder from a file or a diffusers folder; the encoder in float32, as the authors run it."""
    sizes = section.params
    module = autoencoder_checkpoint.load_autoencoder(path, sizes, device=device, dtype=torch.float32)
    return Autoencoder(
        module,
        scale_factor=sizes.scale_factor,
        shift_factor=sizes.shift_factor,
        device=device,
        decode_dtype=DTYPES[TIERS[section.decode_dtype].dtype],
        tile_side=section.tile_side,
    )


def load_pipeline(
    config: EngineConfig,
    *,
    device: torch.device | str,
    tier: TierName | None = None,
    attention: str = "auto",
    budget: MemoryBudget | None = None,
    other_parts: Sequence[OffloadablePart] = (),
    progress: LoadProgress | None = None,
) -> Pipeline:
    """Load every part that a configuration names.

    Args:
        config: what to load.
        device: where it is to run.
        tier: of the transformer's weights, instead of the configuration's.
        attention: attention backend by name; "auto" chooses.
        budget: load to the host and keep there what finds no room within this budget; None loads everything to the device.
        other_parts: loaded already, to the host where there is a budget: they are placed together with the pipeline's.
        progress: told what is being loaded.

    Raises:
        MissingFileError: a file is not there; says which.
        CheckpointError: a file does not fit.
        BackendError: this machine cannot run what was asked for.
        MemoryBudgetError: there is no plan within the budget, or other processes compute too, each with the whole transformer.
        ParallelError: these did not come.
    """
    runs_on = check_device(device)
    require_parts(config)
    tier = config.precision.tier if tier is None else tier
    report = progress if progress is not None else _no_progress
    on_host = budget is not None
    with ExitStack() as undo:
        followers = _begin_followers(config, runs_on, tier, attention, budget, undo)
        loaded = load_transformer(config, device=device, tier=tier, attention=attention, on_host=on_host, progress=progress)
        undo.callback(loaded.close)
        device = "cpu" if on_host else device
        dtype = loaded.module.img_in.weight.dtype
        report("style encoder", 0, 0)
        style = load_style_encoder(config, device=device, dtype=dtype)
        report("text encoders", 0, 0)
        text = load_text_encoders(config, device=device, dtype=dtype)
        if text is not None:
            check_text_widths(text, config)
        autoencoder = None
        if config.autoencoder is not None:
            report("autoencoder", 0, 0)
            path = resolve(config.autoencoder.checkpoint, "autoencoder", config)
            autoencoder = load_autoencoder(config.autoencoder, path, device=device)
        placement = None
        if budget is not None:
            parts = [*other_parts, *(part for owner in (text, style, autoencoder) if owner is not None for part in owner.parts)]
            placement = carry_out(
                config, tier, budget, transformer=loaded.module, parts=parts, autoencoder=autoencoder, device=runs_on
            )
        others = _joined(followers, loaded, undo)
        undo.pop_all()
    limits = CacheLimits(
        *(int(size * MIB) for size in (config.cache.prompt_mib, config.cache.style_mib, config.cache.content_mib))
    )
    names = [
        entry.path if sha256 is None else FileName(entry.path, sha256)
        for entry, sha256 in zip(config.loras, loaded.configured_hashes, strict=True)
    ]
    loras = [(name, entry.weight) for name, entry in zip(names, config.loras, strict=True)]
    family = FAMILIES[config.transformer.family]
    return Pipeline(
        loaded,
        text=text,
        style=style,
        autoencoder=autoencoder,
        limits=limits,
        loras=loras,
        placement=placement,
        family=family,
        others=others,
    )


def _begin_followers(
    config: EngineConfig,
    device: torch.device,
    tier: TierName,
    attention: str,
    budget: MemoryBudget | None,
    undo: ExitStack,
) -> FollowerProcesses | TorchrunProcesses | None:
    """Start the other processes, where there are to be any and torchrun has not; they load while this one does.

    Raises:
        MemoryBudgetError: there is a budget.
        BackendError: there are not as many GPUs.
        ParallelError: torchrun has started another number of processes, or this is not the first of them.
    """
    if config.parallel.ulysses == 1:
        return None
    if budget is not None:
        raise MemoryBudgetError(BUDGET_OF_SEVERAL)
    launch = torchrun_launch()
    followers = (
        FollowerProcesses(config, device=device, tier=tier, attention=attention)
        if launch is None
        else TorchrunProcesses(launch, config, device)
    )
    undo.callback(followers.end)
    return followers


def _joined(
    followers: FollowerProcesses | TorchrunProcesses | None, loaded: LoadedTransformer, undo: ExitStack
) -> Leader | None:
    """Let the other processes, which have loaded by now, have a share of every step."""
    if followers is None:
        return None
    others = followers.join()
    undo.callback(others.close)
    others.check_same(loaded.module)
    loaded.module.together = others
    return others


def check_text_widths(text: TextEncoders, config: EngineConfig) -> None:
    """Check that the text encoders belong to the transformer, before a request finds out.

    Raises:
        CheckpointError: they give another width than the transformer takes.
    """
    params = config.transformer.params
    widths = (("T5", text.token_width, params.context_in_dim), ("CLIP", text.pooled_width, params.vec_in_dim))
    wrong = [f"{name} gives width {given}, the transformer takes {taken}" for name, given, taken in widths if given != taken]
    if wrong:
        raise CheckpointError(f"{config.name}: the text encoders do not fit the transformer: {'; '.join(wrong)}")


def _no_progress(part: str, done: int, total: int) -> None:
    """Report nothing: the default where a caller gave no `progress`."""
