"""The transformer of a configuration: in floating point, quantised on the way, or from a quantised file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch

from uso_engine.config import EMBEDDED_PREFIX, EngineConfig
from uso_engine.errors import BackendError, ConfigError, MissingFileError
from uso_engine.model.transformer import Transformer
from uso_engine.offload.budget import formats_of
from uso_engine.precision.tiers import QUANTIZED_TIERS, TIERS, TierName
from uso_engine.precision.transformer import DTYPES, check_tier
from uso_engine.process_state import clean_process_state
from uso_engine.weights.files.paths import resolve_path
from uso_engine.weights.files.quantized_file import is_quantized_file
from uso_engine.weights.files.recorded_file import RecordedFile
from uso_engine.weights.files.tensor_source import TensorSource
from uso_engine.weights.loaded import LoadedFloatTransformer, LoadedTransformer
from uso_engine.weights.loaded_quantized import LoadedQuantizedTransformer
from uso_engine.weights.loading import load_parameters
from uso_engine.weights.lora import LoRA, read_lora
from uso_engine.weights.quantized_checkpoint import Description, load_quantized, open_originals, save_quantized
from uso_engine.weights.quantizing import quantize
from uso_engine.weights.transformer_checkpoint import open_transformer_checkpoint
from uso_kernels.attention import available_backends

LoadProgress = Callable[[str, int, int], None]
"""Called with the part that is being loaded, the bytes read so far and the bytes to read in all (0 where unknown)."""


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
    tier: TierName,
    attention: str = "auto",
    on_host: bool = False,
    progress: LoadProgress | None = None,
) -> LoadedTransformer:
    """Load the transformer and merge the configured LoRAs.

    Args:
        config: what to load.
        device: where it is to run.
        tier: of its weights.
        attention: attention backend by name; "auto" chooses for every sequence.
        on_host: leave the weights on the host, for a placement to move.
        progress: told the bytes read and to be read.

    Raises:
        MissingFileError: a file is not there.
        CheckpointError: a file does not fit the model or, if it is quantised, the configuration.
        BackendError: a tier or an attention backend that cannot be computed here.
    """
    check_tier(tier, torch.device(device))
    check_attention(attention, device, DTYPES[TIERS[tier].dtype])
    path = resolve(config.transformer.checkpoint, "transformer checkpoint", config)
    report = None if progress is None else _of_transformer(progress)
    target = "cpu" if on_host else device
    if is_quantized_file(path):
        loaded: LoadedTransformer = _from_quantized_file(path, config, tier, target)
    else:
        loaded = _from_originals(path, config, tier, target, report)
    loaded.module.attention_backend = attention
    return loaded


@clean_process_state()
def save_quantized_transformer(
    config: EngineConfig, tier: TierName, path: Path, *, progress: LoadProgress | None = None
) -> None:
    """Quantise a configuration's transformer into a file, one layer at a time.

    Args:
        config: whose transformer and LoRAs.
        tier: of the file, one of `QUANTIZED_TIERS`.
        path: of the file.
        progress: told the bytes read and to be read.

    Raises:
        ValueError: a tier that quantises nothing.
        MissingFileError: a file is not there.
        CheckpointError, LoRAError: a file that does not fit or is not finite; nothing is left behind.
        OutputError: the file cannot be written; nothing is left behind.
    """
    if tier not in QUANTIZED_TIERS:
        raise ValueError(f"a quantised file is in {', '.join(QUANTIZED_TIERS[:-1])} or {QUANTIZED_TIERS[-1]}, got {tier!r}")
    params = config.transformer.params
    origin = resolve(config.transformer.checkpoint, "transformer checkpoint", config)
    source = open_originals_of(origin, config)
    try:
        loras = read_loras([(entry.path, entry.weight) for entry in config.loras], config)
        recorded = [RecordedFile.of(resolve(entry.path, "LoRA", config), entry.weight) for entry in config.loras]
        description = Description(
            tier=tier,
            params=params,
            formats=formats_of(config, tier),
            dtype=DTYPES[TIERS[tier].dtype],
            source=RecordedFile.of(origin),
            loras=tuple(recorded),
        )
        save_quantized(path, description, source, loras, progress=None if progress is None else _of_transformer(progress))
    finally:
        source.close()


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


def check_attention(attention: str, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
    """Check that an attention backend exists and can run on a device.

    Args:
        attention: its name, or "auto".
        device: where it is to run.
        dtype: of what it attends to; None where it is not known yet.

    Raises:
        BackendError: it does not or cannot; says which can.
    """
    if attention == "auto":
        return
    found = available_backends(device, dtype)
    if attention not in found or found[attention] is not None:
        reason = found.get(attention, "there is no such backend")
        runnable = ", ".join(name for name, missing in found.items() if missing is None)
        raise BackendError(f"attention backend {attention!r} cannot run on {device}: {reason}; these can: auto, {runnable}")


def _from_originals(
    path: Path, config: EngineConfig, tier: TierName, device: torch.device | str, progress: Callable[[int, int], None] | None
) -> LoadedTransformer:
    params = config.transformer.params
    source = open_originals_of(path, config)
    try:
        loras = read_loras([(entry.path, entry.weight) for entry in config.loras], config)
        if tier not in QUANTIZED_TIERS:
            with torch.device("meta"):
                module = Transformer(params)
            load_parameters(module, source, device=device, dtype=DTYPES[TIERS[tier].dtype], loras=loras, progress=progress)
            return LoadedFloatTransformer(module.eval(), tier, (source, loras))
        formats = formats_of(config, tier)
        dtype = DTYPES[TIERS[tier].dtype]
        module = quantize(params, source, formats, dtype=dtype, device=device, loras=loras, progress=progress)
        return LoadedQuantizedTransformer(module, tier, (source, loras), formats)
    except BaseException:
        source.close()
        raise


def open_originals_of(path: Path, config: EngineConfig) -> TensorSource:
    """Open the pristine weights of a configuration's transformer; errors as for `open_transformer_checkpoint`."""
    entry = config.transformer
    return open_transformer_checkpoint(path, entry.params, accept_kontext=entry.base == "kontext")


def _from_quantized_file(path: Path, config: EngineConfig, tier: TierName, device: torch.device | str) -> LoadedTransformer:
    if tier not in QUANTIZED_TIERS:
        raise ConfigError(f"{path} is a quantised transformer; set [precision] tier to its tier instead of {tier!r}")
    module, description = load_quantized(path, device=device, check_contents=config.precision.check_contents)
    description.require(
        params=config.transformer.params,
        tier=tier,
        loras=[(_perhaps_missing(entry.path, config), entry.weight) for entry in config.loras],
        formats=formats_of(config, tier),
        path=path,
    )
    hashes = tuple(recorded.sha256 for recorded in description.loras)
    opener = partial(open_originals, description)
    return LoadedQuantizedTransformer(module, tier, opener, description.formats, configured_hashes=hashes)


def _perhaps_missing(text: str, config: EngineConfig) -> Path:
    """Where a LoRA is, or its name where it is not: a quantised file is loaded without its originals."""
    try:
        return resolve(text, "LoRA", config)
    except MissingFileError:
        return Path(text.replace(":", "/"))


def _of_transformer(progress: LoadProgress) -> Callable[[int, int], None]:
    return lambda done, total: progress("transformer", done, total)
