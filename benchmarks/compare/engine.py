"""The engine, through its public interface, in one tier."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.tiers.steps import LARGEST_DIFFERENCE, formats_by_name, quantized_copy
from uso_engine import GenerationResult, USOEngine
from uso_engine.conditioning.cache import CacheLimits
from uso_engine.model.transformer import Transformer
from uso_engine.pipeline import Pipeline
from uso_engine.precision.tiers import TierName
from uso_engine.precision.transformer import TIER_OF_DTYPE
from uso_engine.weights.loaded import LoadedFloatTransformer, Originals

from .cases import PROMPT, Case, pictures
from .evaluations import Evaluations
from .models import Models, png_file, weight_bytes


class EngineWay:
    """`USOEngine.generate` on the shared models, its caches empty at every request.

    Args:
        models: the shared ones.
        evaluations: to stand around its transformer.
        tier: a name of `benchmarks.tiers.steps.formats_by_name`, or the floating type's own.
        largest_difference: of its first velocity, for the floating type's own.
        attention: backend by name, or "auto".
    """

    def __init__(
        self,
        models: Models,
        evaluations: Evaluations,
        tier: str | None = None,
        *,
        largest_difference: float,
        attention: str = "auto",
    ) -> None:
        own: TierName = TIER_OF_DTYPE[models.dtype]
        self.name = f"ours, {tier or own}" if attention == "auto" else f"ours, {tier or own}, attention {attention}"
        self.evaluations, self._models = evaluations, models
        self.largest_difference = largest_difference if tier is None else LARGEST_DIFFERENCE
        # A module of its own, so that what stands around its evaluations stands around nobody else's.
        if tier is None:
            with torch.device("meta"):
                transformer = Transformer(models.size.params)
            transformer.load_state_dict(models.merged.state_dict(), assign=True)
        else:
            transformer = quantized_copy(models.merged, formats_by_name(models.size.params, models.device)[tier])
        transformer.attention_backend = attention
        evaluations.watch(transformer)
        self.weights = weight_bytes(transformer)
        config = models.config
        loaded = LoadedFloatTransformer(transformer, own, _no_originals)
        pipeline = Pipeline(
            loaded, text=models.text, style=models.style, autoencoder=models.autoencoder, limits=CacheLimits(0, 0, 0)
        )
        self._engine = USOEngine(config, pipeline, safety=None, device=models.device)
        self.settings: dict[str, object] = {"tier": tier or own, "attention": attention, "caches": "empty at every request"}

    def request(self, case: Case, seed: int) -> list[bytes]:
        return [png_file(image) for image in self.generate(case, seed).images]

    def generate(self, case: Case, seed: int) -> GenerationResult:
        """Everything of a request but the files."""
        result = self._engine.generate(
            prompt=f"{PROMPT} {seed}",
            images=pictures(case, seed),
            image_size={"width": case.width, "height": case.height},
            num_inference_steps=self._models.size.steps_of(case),
            num_images=case.images,
            guidance_scale=self._models.size.guidance,
            seed=seed,
            enable_safety_checker=False,
        )
        self.settings["attention"] = "+".join(result.attention)
        return result

    def velocity(self, output: Tensor, case: Case) -> Tensor:
        return output[: self._models.size.tokens(case).image]

    def close(self) -> None:
        self._engine.close()


def _no_originals() -> Originals:
    raise AssertionError("a comparison changes no LoRAs")
