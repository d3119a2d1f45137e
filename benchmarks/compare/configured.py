"""The models of a configuration, from its files, for every way."""

from __future__ import annotations

from functools import cached_property

import torch
from transformers import SiglipVisionModel

from benchmarks.workload import LowRank
from uso_engine.conditioning.content import Autoencoder
from uso_engine.conditioning.style import StyleEncoder, load_vision_tower
from uso_engine.conditioning.text import TextEncoders
from uso_engine.config import EngineConfig
from uso_engine.loading.assembly import load_autoencoder, load_projector, load_text_encoders
from uso_engine.loading.presence import require_parts
from uso_engine.loading.transformer import load_transformer, read_loras, resolve
from uso_engine.model.projector import StyleProjector
from uso_engine.model.transformer import Transformer
from uso_engine.precision.transformer import TIER_OF_DTYPE
from uso_engine.sampling.latents import PIXELS_PER_TOKEN
from uso_engine.weights.lora.low_rank import LowRankUpdate

from .cases import Size
from .models import Models

_PARTS = ("projector", "vision", "t5", "clip", "autoencoder")


class ConfiguredModels(Models):
    """The models that a configuration names, in one floating type; its tier is left aside.

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
        require_parts(config)
        self._given = config
        super().__init__(_size(config, next(iter(self._updates().values()))), device, dtype)

    @cached_property
    def config(self) -> EngineConfig:
        return self._given

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


def _size(config: EngineConfig, update: LowRankUpdate) -> Size:
    """What a configuration's requests bring: its own picture, and one of half its sides."""
    assert config.projector is not None and config.t5 is not None
    side, steps = config.defaults.width, config.defaults.steps
    half, low = (side * part // 16 // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN for part in (8, 9))
    return Size(
        name=config.name,
        params=config.transformer.params,
        encoders=None,
        text=config.t5.max_length,
        style_tokens=config.projector.style_tokens,
        content_side=config.content.long_side,
        sides=(half, side),
        wide=(side, low),
        steps=steps,
        few_steps=min(4, steps),
        lora_rank=update.down.shape[0],
    )
