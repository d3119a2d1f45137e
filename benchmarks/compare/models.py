"""What every way shares: one set of encoders, an autoencoder, and a transformer's weights with a LoRA, made on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import SiglipVisionModel

from benchmarks.encoders import EncoderSizes, autoencoder_module, filled, text_modules, vision_module
from benchmarks.workload import LowRank, merge, random_lora, random_transformer
from uso_engine.conditioning.content import Autoencoder
from uso_engine.conditioning.prompt_tokenizer import load_clip_tokenizer, load_t5_tokenizer
from uso_engine.conditioning.style import StyleEncoder
from uso_engine.conditioning.text import TextEmbedding, TextEncoders
from uso_engine.config import EngineConfig, LimitsConfig, load_config
from uso_engine.embedded.build import FOLDER
from uso_engine.imaging.encode import ImageMetadata, encode_image
from uso_engine.imaging.pixels import from_pixels, to_pixels
from uso_engine.imaging.resize import resize_content
from uso_engine.model.projector import StyleProjector
from uso_engine.model.rope import Grid, content_positions, grid_positions
from uso_engine.model.transformer import Transformer
from uso_engine.sampling.latents import draw_noise, pack_latent, token_grid, unpack_latent
from uso_engine.sampling.schedule import schedule

from .cases import PROMPT, Case, Size, pictures

# FLUX's.
SCALE, SHIFT = 0.3611, 0.1159
SEED = 5


@dataclass
class Models:
    """The models of a size.

    Args:
        size: their sizes.
        device: where they are.
        dtype: of the transformer, the text encoders and the style projector; the others are in float32, as the authors'.
    """

    size: Size
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def identity(self) -> str | None:
        """What tells models of one name from others that are given it; None where the name and the sources say all."""
        return None

    @cached_property
    def config(self) -> EngineConfig:
        """The public model's, with the size's own numbers."""
        public, (width, height) = load_config("uso-flux-dev"), self.size.shapes[1]
        assert public.projector is not None and public.t5 is not None
        vision = {"vision_tokens": self.encoders.vision_tokens, "vision_width": self.encoders.vision["hidden_size"]}
        return public.model_copy(
            update={
                "transformer": public.transformer.model_copy(update={"params": self.size.params}),
                "projector": public.projector.model_copy(update={**vision, "style_tokens": self.size.style_tokens}),
                "t5": public.t5.model_copy(update={"max_length": self.size.text}),
                "content": public.content.model_copy(update={"long_side": self.size.content_side}),
                "defaults": public.defaults.model_copy(update={"width": width, "height": height, "steps": self.size.steps}),
                "limits": LimitsConfig(min_side=16),
            }
        )

    @property
    def encoders(self) -> EncoderSizes:
        """Sizes of the modules that are made here."""
        assert self.size.encoders is not None
        return self.size.encoders

    @cached_property
    def base(self) -> Transformer:
        """Without its LoRA."""
        return random_transformer(self.size.params, self.device, self.dtype)

    @cached_property
    def lora(self) -> dict[str, LowRank]:
        """Beside the base."""
        return random_lora(self.base, self.size.lora_rank)

    @cached_property
    def merged(self) -> Transformer:
        """With the LoRA in its weights."""
        transformer = random_transformer(self.size.params, self.device, self.dtype)
        merge(transformer, self.lora)
        return transformer

    @cached_property
    def text(self) -> TextEncoders:
        """T5 and CLIP, with uso-tiny's tokenizers."""
        t5, clip = text_modules(self.encoders)
        for encoder in (t5, clip):
            self._fill(encoder, self.dtype)
        # Filling undid the tie that a checkpoint has.
        t5.encoder.embed_tokens.weight = t5.shared.weight
        words = load_t5_tokenizer(FOLDER / "t5"), load_clip_tokenizer(FOLDER / "clip")
        return TextEncoders(t5, words[0], clip, words[1], t5_max_length=self.size.text)

    @cached_property
    def vision(self) -> SiglipVisionModel:
        """SigLIP's tower in float32."""
        vision = vision_module(self.encoders)
        self._fill(vision, torch.float32)
        return vision

    @cached_property
    def projector(self) -> StyleProjector:
        """The style projector."""
        width, patches = self.encoders.vision["hidden_size"], self.encoders.vision_tokens
        projector = StyleProjector(patches, width, self.size.style_tokens, self.size.params.hidden_size, device="meta")
        self._fill(projector, self.dtype)
        return projector

    @cached_property
    def style(self) -> StyleEncoder:
        """Tower and projector as the engine runs them: without the layers that no style token needs."""
        from uso_engine.conditioning.style import built_in_processor

        return StyleEncoder(self.vision, self.projector, built_in_processor(self.encoders.vision["image_size"]))

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """In float32, as the authors run it."""
        module = autoencoder_module(self.encoders)
        self._fill(module, torch.float32)
        return Autoencoder(module, scale_factor=SCALE, shift_factor=SHIFT, device=self.device)

    def _fill(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Give a module random weights, the same in every process."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(SEED)
            filled(module, self.device, dtype)


@dataclass(frozen=True)
class Encoded:
    """What a case's request brings to the transformer, encoded once, as peers that hoist their encoders do.

    Args:
        text: T5's and CLIP's answer.
        style_pixels: of each style image, preprocessed.
        contents: packed latents of each content image, [L_ref, 64].
        content_grids: rows and columns of each.
        grid: of the picture.
    """

    text: TextEmbedding
    style_pixels: tuple[Tensor, ...]
    contents: tuple[Tensor, ...]
    content_grids: tuple[Grid, ...]
    grid: Grid

    @property
    def positions(self) -> Tensor:
        """Position ids of image and content tokens, [L_img + L_ref, 3]."""
        return torch.cat((grid_positions(self.grid), *content_positions(self.grid, self.content_grids)))


@torch.no_grad()
def encode(models: Models, case: Case, seed: int) -> Encoded:
    """Run the text encoders and the autoencoder; style images are preprocessed only."""
    given = pictures(case, seed)
    latents = []
    for picture in [entry for entry in given[:1] if entry is not None]:
        resized = resize_content(picture, long_side=models.size.content_side)
        latents.append(models.autoencoder.encode(to_pixels(resized).to(models.device)).to(models.dtype))
    pixels = [models.style.preprocess(entry).to(models.device) for entry in given[1:] if entry is not None]
    return Encoded(
        models.text.encode(f"{PROMPT} {seed}"),
        tuple(pixels),
        tuple(pack_latent(latent) for latent in latents),
        tuple((latent.shape[1] // 2, latent.shape[2] // 2) for latent in latents),
        token_grid(case.width, case.height),
    )


def noise(models: Models, case: Case, seed: int) -> Tensor:
    """The packed latents that a picture starts from, [L_img, 64], the engine's own."""
    return pack_latent(draw_noise(case.width, case.height, seed)).to(models.device, models.dtype)


def sigmas(models: Models, case: Case) -> list[float]:
    """From 1 to 0, the authors' schedule."""
    return schedule(models.size.steps_of(case), case.width, case.height)


@torch.no_grad()
def png_files(models: Models, tokens: Tensor, grid: Grid) -> list[bytes]:
    """Decode packed latents [n, L_img, 64] and encode the pictures."""
    pixels = models.autoencoder.decode(unpack_latent(tokens.float(), grid))
    return [png_file(image) for image in from_pixels(pixels)]


def png_file(image: Image.Image) -> bytes:
    """A picture as the engine writes it."""
    return encode_image(image, "png", ImageMetadata("benchmark"))


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of the parameters of modules, those that several share counted once."""
    found = {parameter.data_ptr(): parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in found.values())
