"""The authors' way: style encoder, projections and modulation inside each step, LoRA beside the matrices, eager.

`AuthorsWay` is our rendering of it; `AuthorsCode` runs their own modules, from a checkout that USO_REFERENCE_DIR names.
Both take encoders and autoencoder from the shared models, which their code would load from the same files.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step.authors_way import AuthorsWay
from benchmarks.workload import Inputs

from .cases import Case
from .evaluations import Evaluations
from .models import Encoded, Models, encode, noise, png_files, sigmas, weight_bytes


def style_tokens(models: Models, pixels: tuple[Tensor, ...]) -> Tensor:
    """Every layer of the tower, then the projector, for each style image: what the authors' transformer does in a step."""
    made = [models.size.params.hidden_size]
    tokens = []
    for entry in pixels:
        states = models.vision(pixel_values=entry, output_hidden_states=True).hidden_states
        tokens.append(models.projector([states[level] for level in (-2, -11, -20)])[0])
    return torch.cat(tokens) if tokens else torch.empty(0, *made, device=models.device, dtype=models.dtype)


class RenderedAuthors:
    """Our rendering, whole requests.

    Args:
        models: the shared ones.
        evaluations: to stand around its transformer.
        largest_difference: of its first velocity.
    """

    name = "authors' way"

    def __init__(self, models: Models, evaluations: Evaluations, *, largest_difference: float) -> None:
        self._models, self.evaluations, self.largest_difference = models, evaluations, largest_difference
        lora_bytes = sum(x.numel() * x.element_size() for pair in models.lora.values() for x in pair)
        self.weights = weight_bytes(models.base) + lora_bytes
        self.settings: dict[str, object] = {"mode": "eager", "attention": "scaled_dot_product_attention", "LoRA": "unmerged"}

    @torch.no_grad()
    def request(self, case: Case, seed: int) -> list[bytes]:
        return [file for i in range(case.images) for file in self._one(case, seed + i)]

    def _one(self, case: Case, seed: int) -> list[bytes]:
        encoded = encode(self._models, case, seed)
        inputs = Inputs(
            encoded.text.tokens,
            torch.empty(0),
            encoded.text.pooled,
            encoded.contents,
            encoded.grid,
            encoded.content_grids,
            self._models.size.guidance,
        )
        encode_style: Callable[[], Tensor] = lambda: style_tokens(self._models, encoded.style_pixels)  # noqa: E731
        step = AuthorsWay(self._models.base, inputs, lora=self._models.lora, encode_style=encode_style)
        latents = noise(self._models, case, seed)
        for time, following in pairwise(sigmas(self._models, case)):
            self.evaluations.begin()
            velocity = step.velocity(latents, time)
            self.evaluations.end(velocity)
            latents = latents + (following - time) * velocity
        return png_files(self._models, latents[None], encoded.grid)

    def velocity(self, output: Tensor, case: Case) -> Tensor:
        return output

    def close(self) -> None:
        """Nothing is its own."""


class AuthorsCode:
    """The authors' own transformer and denoising loop.

    Args:
        models: the shared ones.
        evaluations: to stand around its transformer.
        largest_difference: of its first velocity.
        folder: a checkout of their repository.

    Raises:
        ModuleNotFoundError: the checkout, or a package that it needs (einops), is not there.
    """

    name = "authors' code"

    def __init__(self, models: Models, evaluations: Evaluations, *, largest_difference: float, folder: Path) -> None:
        self._models, self.evaluations, self.largest_difference = models, evaluations, largest_difference
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        modules: Any = importlib.import_module("uso.flux.model")
        self._sampling: Any = importlib.import_module("uso.flux.sampling")
        self._flux = _transformer(models, modules)
        evaluations.watch(self._flux)
        self.weights = weight_bytes(self._flux)
        self.settings: dict[str, object] = {"mode": "eager", "attention": "scaled_dot_product_attention", "LoRA": "unmerged"}

    @torch.no_grad()
    def request(self, case: Case, seed: int) -> list[bytes]:
        return [file for i in range(case.images) for file in self._one(case, seed + i)]

    def _one(self, case: Case, seed: int) -> list[bytes]:
        models, encoded = self._models, encode(self._models, case, seed)
        inputs: dict[str, object] = {
            "img": noise(models, case, seed)[None],
            "img_ids": _grid_ids(encoded)[None].to(models.device),
            "ref_img": tuple(content[None] for content in encoded.contents),
            "ref_img_ids": [ids[None].to(models.device) for ids in _content_ids(encoded)],
            "txt": encoded.text.tokens[None],
            "txt_ids": torch.zeros(1, len(encoded.text.tokens), 3, device=models.device),
            "vec": encoded.text.pooled[None],
        }
        pixels = [{"pixel_values": entry} for entry in encoded.style_pixels]
        times = sigmas(models, case)
        settings = {"timesteps": times, "guidance": models.size.guidance, "siglip_inputs": pixels}
        latents = self._sampling.denoise(self._flux, **inputs, **settings)
        return png_files(models, latents, encoded.grid)

    def velocity(self, output: Tensor, case: Case) -> Tensor:
        return output[0]

    def close(self) -> None:
        """Nothing is its own but its module."""


def _grid_ids(encoded: Encoded) -> Tensor:
    rows, columns = encoded.grid
    return encoded.positions[: rows * columns]


def _content_ids(encoded: Encoded) -> Iterator[Tensor]:
    rows, columns = encoded.grid
    yield from encoded.positions[rows * columns :].split([len(content) for content in encoded.contents])


def _transformer(models: Models, modules: Any) -> nn.Module:
    """The authors' `Flux` with the shared weights, the LoRA in processors of theirs."""
    params, layers = models.size.params, importlib.import_module("uso.flux.modules.layers")
    sizes = modules.FluxParams(
        in_channels=params.in_channels,
        vec_in_dim=params.vec_in_dim,
        context_in_dim=params.context_in_dim,
        hidden_size=params.hidden_size,
        mlp_ratio=params.mlp_width / params.hidden_size,
        num_heads=params.num_heads,
        depth=params.depth,
        depth_single_blocks=params.depth_single_blocks,
        axes_dim=list(params.axes_dim),
        theta=params.theta,
        qkv_bias=params.qkv_bias,
        guidance_embed=params.guidance_embed,
    )
    with torch.device("meta"):
        flux: Any = modules.Flux(sizes)
        flux.feature_embedder = layers.SigLIPMultiFeatProjModel(
            siglip_token_nums=models.projector.vision_tokens,
            style_token_nums=models.size.style_tokens,
            siglip_token_dims=models.projector.vision_width,
            hidden_size=params.hidden_size,
            context_layer_norm=True,
        )
        processors = _processors(models, layers, flux)
    embedder = {f"feature_embedder.{key}": value for key, value in models.projector.state_dict().items()}
    flux.load_state_dict({**models.base.state_dict(), **embedder}, assign=True)
    flux.set_attn_processor(processors)
    flux.vision_encoder = models.vision
    whole: nn.Module = flux.eval().requires_grad_(False)
    return whole


def _processors(models: Models, layers: Any, flux: Any) -> dict[str, nn.Module]:
    """A LoRA processor for every block; in single blocks the width of the second matrix is made this model's."""
    width, rank = models.size.params.hidden_size, models.size.lora_rank
    found: dict[str, nn.Module] = {}
    for name in flux.attn_processors:
        block = name.removesuffix(".processor")
        if block.startswith("double_blocks"):
            processor = layers.DoubleStreamBlockLoraProcessor(width, rank)
            streams = (("1", "img"), ("2", "txt"))
            parts = {f"{part}_lora{i}": f"{stream}_attn.{part}" for i, stream in streams for part in ("qkv", "proj")}
        else:
            processor = layers.SingleStreamBlockLoraProcessor(width, rank)
            inner = width + models.size.params.mlp_width
            processor.proj_lora = layers.LoRALinearLayer(inner, width, rank)
            parts = {"qkv_lora": "linear1", "proj_lora": "linear2"}
        state = {}
        for part, layer in parts.items():
            state[f"{part}.down.weight"], state[f"{part}.up.weight"] = models.lora[f"{block}.{layer}"]
        processor.load_state_dict(state, assign=True)
        found[name] = processor
    return found
