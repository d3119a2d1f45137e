"""Fetching what a configuration names from the Hugging Face hub into its local cache; the only place that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from uso_engine.conditioning.tokenizer_folders import TOKENIZER_PATTERNS, TOKENIZERS
from uso_engine.config import EMBEDDED_PREFIX, EngineConfig
from uso_engine.errors import FetchError, MissingFileError
from uso_engine.weights.files.paths import HubId, local_path, resolve_path, split_hub_id

# What the loaders read; repositories also hold the same weights in other formats, which nobody needs twice.
_WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model")
_UNWANTED = ("flax_model*", "tf_model*", "*.onnx", "onnx/*", "*.msgpack", "*.h5", "*.bin", "openvino*")


@dataclass(frozen=True)
class ConfiguredFile:
    """One file or folder that a configuration names.

    Args:
        what: what it is, for messages.
        text: as the configuration has it.
        is_file: whether it is a single file.
    """

    what: str
    text: str
    is_file: bool

    @property
    def hub_id(self) -> HubId | None:
        """Repository, revision and path inside, if it is a hub id rather than a path."""
        return None if self.text.startswith(EMBEDDED_PREFIX) else split_hub_id(self.text)


def configured_files(config: EngineConfig) -> Iterator[ConfiguredFile]:
    """Every file and folder of a configuration, in loading order."""
    yield ConfiguredFile("transformer checkpoint", config.transformer.checkpoint, _is_file(config.transformer.checkpoint))
    for lora in config.loras:
        yield ConfiguredFile("LoRA", lora.path, True)
    if config.projector is not None:
        yield ConfiguredFile("style projector", config.projector.checkpoint, True)
    if config.vision is not None:
        yield ConfiguredFile("vision encoder", config.vision.folder, _is_file(config.vision.folder))
    for name, entry in (("T5", config.t5), ("CLIP", config.clip)):
        if entry is not None:
            yield ConfiguredFile(f"{name} text encoder", entry.folder, _is_file(entry.folder))
            if entry.tokenizer is not None:
                yield ConfiguredFile(f"{name} tokenizer", entry.tokenizer, False)
    if config.autoencoder is not None:
        yield ConfiguredFile("autoencoder", config.autoencoder.checkpoint, _is_file(config.autoencoder.checkpoint))
    if config.safety is not None:
        yield ConfiguredFile("safety checker", config.safety.folder, False)
        if config.safety.runtime == "onnx" and config.safety.onnx_file is not None:
            yield ConfiguredFile("safety checker's ONNX file", config.safety.onnx_file, True)


def missing_files(config: EngineConfig) -> list[ConfiguredFile]:
    """What is not on this machine."""
    missing = []
    for part in configured_files(config):
        if part.text.startswith(EMBEDDED_PREFIX):
            continue
        try:
            resolve_path(part.text, what=part.what, base_dir=config.base_folder)
        except MissingFileError:
            missing.append(part)
    return missing


def download(config: EngineConfig, *, token: str | None, report: Callable[[str], None]) -> None:
    """Bring every hub repository that a configuration names into the local cache.

    Args:
        config: which; paths and embedded files in it are left alone.
        token: of the hub, for gated repositories.
        report: told each part before it is fetched.

    Raises:
        FetchError: a repository is gated, does not exist or cannot be reached; parts fetched before stay in the cache.
    """
    for part in configured_files(config):
        # A path in the form of a hub id, `weights/model.safetensors`, is one if it is there.
        if part.hub_id is None or local_path(part.text, what=part.what, base_dir=config.base_folder).exists():
            continue
        hub = part.hub_id
        revision, inside = "" if hub.revision is None else f"@{hub.revision}", "" if hub.inside is None else f", {hub.inside}"
        report(f"{part.what}: {hub.repository}{revision}{inside}")
        with _errors_of(part.what, hub.repository):
            _fetch(hub, part.is_file, token)


def download_tokenizers(*, token: str | None, report: Callable[[str], None]) -> None:
    """Bring T5's and CLIP's tokenizers into the local cache, for encoders that are single files; errors as for `download`."""
    from huggingface_hub import snapshot_download

    for home in TOKENIZERS:
        report(f"{home.encoder} tokenizer: {home.repository}, about {home.size_kb} kB")
        with _errors_of(f"{home.encoder} tokenizer", home.repository):
            snapshot_download(home.repository, token=token, allow_patterns=list(TOKENIZER_PATTERNS))


@contextmanager
def _errors_of(what: str, repository: str) -> Iterator[None]:
    """The hub library's errors in words that say what to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except GatedRepoError as error:
        raise FetchError(
            f"{what}: {repository} is gated. Accept its terms at https://huggingface.co/{repository}, "
            "then set HF_TOKEN to a token that may read it and run this again"
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FetchError(f"{what}: {repository} cannot be downloaded: {reason}") from error


def _fetch(hub: HubId, is_file: bool, token: str | None) -> None:
    from huggingface_hub import hf_hub_download, snapshot_download

    if is_file and hub.inside is not None:
        hf_hub_download(hub.repository, hub.inside, revision=hub.revision, token=token)
        return
    wanted = list(_WANTED) if hub.inside is None else [f"{hub.inside}/{pattern}" for pattern in _WANTED]
    snapshot_download(
        hub.repository, revision=hub.revision, token=token, allow_patterns=wanted, ignore_patterns=list(_UNWANTED)
    )


def _is_file(text: str) -> bool:
    return Path(text).suffix in (".safetensors", ".gguf")
