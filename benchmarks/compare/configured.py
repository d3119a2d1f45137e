"""The models of a configuration, from its files, for every way."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path

import torch
from transformers import SiglipVisionModel

from benchmarks.workload import LowRank
from uso_engine.conditioning.content import Autoencoder
from uso_engine.conditioning.style import StyleEncoder, load_vision_tower
from uso_engine.conditioning.text import TextEncoders
from uso_engine.config import LARGEST_SIDE, EngineConfig, LimitsConfig
from uso_engine.loading.assembly import load_autoencoder, load_projector, load_text_encoders
from uso_engine.loading.download import configured_files
from uso_engine.loading.presence import require_parts
from uso_engine.loading.transformer import load_transformer, read_loras, resolve
from uso_engine.model.projector import StyleProjector
from uso_engine.model.transformer import Transformer
from uso_engine.precision.transformer import TIER_OF_DTYPE
from uso_engine.sampling.latents import PIXELS_PER_TOKEN
from uso_engine.sampling_settings import SamplingConfig
from uso_engine.weights.lora.low_rank import LowRankUpdate

from .cases import SIZES, Size
from .models import Models

_PARTS = ("projector", "vision", "t5", "clip", "autoencoder")
_SAYS_NOTHING = {"description", "demonstration", "model_name", "cache", "queue", "quality", "safety"}
"""Of a configuration: what a compared request has no use for. Its name is a record's size."""


class ConfiguredModels(Models):
    """The models that a configuration names, in one floating type, and what its requests get that do not say.

    Its tier, its sampler and its limits of sizes are left aside: every way takes Euler steps over the authors' schedule.

    Args:
        config: of USO, with one LoRA of the kind that USO's is: the authors' code takes no other.
        device: where they are.
        dtype: of the transformer, the text encoders and the style projector.

    Raises:
        SystemExit: a configuration that the compared ways cannot all run.
        MissingFileError, CheckpointError: as the engine's loading.
    """

    def __init__(self, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
        if missing := [name for name in _PARTS if getattr(config, name) is None]:
            raise SystemExit(f"--config {config.name}: the ways that are compared need every part of USO, it has no {missing}")
        if len(config.loras) != 1:
            raise SystemExit(f"--config {config.name}: the authors' code takes one LoRA, it has {len(config.loras)}")
        if config.transformer.family != "uso":
            raise SystemExit(f"--config {config.name}: expected a model of the family uso, got {config.transformer.family}")
        if config.name in SIZES:
            raise SystemExit(f"--config {config.name}: records call a size of random models so; give it another name")
        require_parts(config)
        self._given = config
        super().__init__(_size(config, next(iter(self._updates().values()))), device, dtype)

    @cached_property
    def config(self) -> EngineConfig:
        size = LimitsConfig(min_side=PIXELS_PER_TOKEN, max_side=LARGEST_SIDE, max_pixels=LARGEST_SIDE**2)
        return self._given.model_copy(update={"limits": size, "sampling": SamplingConfig()})

    @cached_property
    def identity(self) -> str | None:
        """16 digits of what the configuration says and of its files: place, length and time of each. No contents are read."""
        said = self.config.model_dump(mode="json", exclude=_SAYS_NOTHING)
        used = configured_files(self._given.model_copy(update={"safety": None}))
        files = [(part.what, _state(resolve(part.text, part.what, self._given))) for part in used]
        return hashlib.sha256(json.dumps([said, files], sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def base(self) -> Transformer:
        return self._transformer(self._given.model_copy(update={"loras": []}))

    @cached_property
    def merged(self) -> Transformer:
        return self._transformer(self._given)

    def _transformer(self, config: EngineConfig) -> Transformer:
        loaded = load_transformer(config, device=self.device, tier=TIER_OF_DTYPE[self.dtype])
        try:
            return loaded.module
        finally:
            loaded.close()

    @cached_property
    def lora(self) -> dict[str, LowRank]:
        weight = self._given.loras[0].weight
        return {
            key.removesuffix(".weight"): (
                update.down.to(self.device, self.dtype),
                (update.up.float() * update.scale * weight).to(self.device, self.dtype),
            )
            for key, update in self._updates().items()
        }

    def _updates(self) -> dict[str, LowRankUpdate]:
        entry = self._given.loras[0]
        ((lora, _),) = read_loras([(entry.path, entry.weight)], self._given)
        found = {}
        for key, updates in lora.updates.items():
            update = updates[0]
            if len(updates) > 1 or not isinstance(update, LowRankUpdate) or update.row_start or update.column_start:
                where = f"--config {self._given.name}: {key} of {entry.path}"
                raise SystemExit(f"{where}: the authors' code takes one product of two matrices, from the first row on")
            found[key] = update
        return found

    @cached_property
    def text(self) -> TextEncoders:
        encoders = load_text_encoders(self._given, device=self.device, dtype=self.dtype)
        assert encoders is not None
        return encoders

    @cached_property
    def vision(self) -> SiglipVisionModel:
        assert self._given.vision is not None
        folder = resolve(self._given.vision.folder, "vision encoder", self._given)
        vision, self._processor = load_vision_tower(folder, device=self.device)
        return vision

    @cached_property
    def projector(self) -> StyleProjector:
        assert self._given.projector is not None
        return load_projector(self._given, self._given.projector, device=self.device, dtype=self.dtype)

    @cached_property
    def style(self) -> StyleEncoder:
        vision = self.vision
        return StyleEncoder(vision, self.projector, self._processor)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        assert self._given.autoencoder is not None
        path = resolve(self._given.autoencoder.checkpoint, "autoencoder", self._given)
        return load_autoencoder(self._given.autoencoder, path, device=self.device)


def _state(path: Path) -> list[tuple[str, int, int]]:
    """A file, or every file of a folder: where it is, bytes, and when it was written, in ns."""
    files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _size(config: EngineConfig, update: LowRankUpdate) -> Size:
    """What a configuration's requests bring: its own picture, one of half its sides, and one of another shape."""
    assert config.projector is not None and config.t5 is not None
    defaults = config.defaults
    width, height = defaults.width, defaults.height
    # Where its own is no square, the square of the shorter side.
    other = (width, height * 9 // 16) if width == height else (min(width, height),) * 2
    return Size(
        name=config.name,
        params=config.transformer.params,
        encoders=None,
        text=config.t5.max_length,
        style_tokens=config.projector.style_tokens,
        content_side=config.content.long_side,
        shapes=(_on_grid(width // 2, height // 2), _on_grid(width, height)),
        other_shape=_on_grid(*other),
        steps=defaults.steps,
        few_steps=min(4, defaults.steps),
        lora_rank=update.down.shape[0],
        guidance=defaults.guidance,
    )


def _on_grid(width: int, height: int) -> tuple[int, int]:
    """Whole tokens, as a request's size is rounded; at least one."""
    across, down = (max(PIXELS_PER_TOKEN, side // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN) for side in (width, height))
    return across, down
