"""The workloads that benchmarks share: models with random weights made on the device, and what a request brings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uso_engine.model.params import TransformerParams
from uso_engine.model.rope import Grid
from uso_engine.model.transformer import Transformer
from uso_engine.sampling.admission import Conditions
from uso_engine.sampling.latents import unpack_latent

SMALL = TransformerParams(hidden_size=1024, num_heads=8, depth=3, depth_single_blocks=6)
"""The small step of the issues: 3 + 6 blocks, hidden 1024, 8 heads."""
TINY = TransformerParams(
    vec_in_dim=32, context_in_dim=64, hidden_size=128, num_heads=1, depth=1, depth_single_blocks=2, axes_dim=(16, 56, 56)
)
"""For smoke tests."""


@dataclass(frozen=True)
class Workload:
    """A model's sizes and a request's.

    Args:
        name: what records call it.
        params: of the transformer.
        grid: rows and columns of tokens of the image.
        content: of the content image; (0, 0) for none.
        text: T5 tokens.
        style: style tokens.
        steps: denoising steps.
        lora_rank: of the LoRA.
    """

    name: str
    params: TransformerParams
    grid: Grid
    content: Grid
    text: int = 512
    style: int = 192
    steps: int = 28
    lora_rank: int = 128

    @property
    def is_full_size(self) -> bool:
        """Whether the model is FLUX.1-dev's size, whatever the request's."""
        return self.params == TransformerParams()


WORKLOADS = {
    "full": Workload("full", TransformerParams(), (64, 64), (32, 32)),
    "full_512": Workload("full_512", TransformerParams(), (32, 32), (32, 32)),
    "small": Workload("small", SMALL, (32, 32), (32, 32)),
    "tiny": Workload("tiny", TINY, (6, 8), (4, 4), text=20, style=12, steps=2, lora_rank=4),
}


LowRank = tuple[Tensor, Tensor]
"""down [r, K] and up [N, r]; N may be fewer rows than the matrix has: then they are its first."""


@dataclass(frozen=True)
class Inputs:
    """What a request brings, before any projection.

    Args:
        text: [L_txt, context_in_dim].
        style: [L_style, C].
        pooled: [vec_in_dim].
        contents: packed latents of each content image, [L_ref, 64].
        grid: of the image being made.
        content_grids: of each content image.
        guidance: guidance scale.
    """

    text: Tensor
    style: Tensor
    pooled: Tensor
    contents: tuple[Tensor, ...]
    grid: Grid
    content_grids: tuple[Grid, ...]
    guidance: float


def lora_targets(transformer: Transformer) -> dict[str, tuple[int, int]]:
    """Rows N and columns K that USO's LoRA changes, by canonical weight key."""
    width, mlp = transformer.params.hidden_size, transformer.params.mlp_width
    targets: dict[str, tuple[int, int]] = {}
    for block in range(transformer.params.depth):
        for stream in ("img", "txt"):
            targets[f"double_blocks.{block}.{stream}_attn.qkv"] = (3 * width, width)
            targets[f"double_blocks.{block}.{stream}_attn.proj"] = (width, width)
    for block in range(transformer.params.depth_single_blocks):
        targets[f"single_blocks.{block}.linear1"] = (3 * width, width)
        targets[f"single_blocks.{block}.linear2"] = (width, width + mlp)
    return targets


def random_transformer(params: TransformerParams, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Transformer:
    """A transformer with random weights of sensible size, drawn on the device."""
    with torch.device("meta"):
        transformer = Transformer(params)
    transformer = transformer.to(dtype).to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if name.endswith(".scale"):
            nn.init.ones_(parameter)
        elif parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]), generator=generator)
    return transformer


def random_lora(transformer: Transformer, rank: int, seed: int = 1) -> dict[str, LowRank]:
    """A LoRA of the layers that USO's changes."""
    weight = transformer.img_in.weight
    generator = torch.Generator(weight.device).manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        numbers = torch.randn(rows, columns, generator=generator, device=weight.device, dtype=torch.float32)
        return (numbers / math.sqrt(columns)).to(weight.dtype)

    return {
        name: (normal(rank, columns), 0.1 * normal(rows, rank)) for name, (rows, columns) in lora_targets(transformer).items()
    }


def merge(transformer: Transformer, lora: dict[str, LowRank]) -> None:
    """Add a LoRA to the weights, in float32."""
    for name, (down, up) in lora.items():
        weight = transformer.get_parameter(f"{name}.weight")
        weight[: up.shape[0]] = (weight[: up.shape[0]].float() + up.float() @ down.float()).to(weight.dtype)


def random_inputs(workload: Workload, device: torch.device, dtype: torch.dtype, seed: int = 2) -> Inputs:
    """What a request of a workload brings."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    params, has_content = workload.params, math.prod(workload.content) > 0
    return Inputs(
        text=normal(workload.text, params.context_in_dim),
        style=normal(workload.style, params.hidden_size),
        pooled=normal(params.vec_in_dim),
        contents=(normal(math.prod(workload.content), params.in_channels),) if has_content else (),
        grid=workload.grid,
        content_grids=(workload.content,) if has_content else (),
        guidance=4.0,
    )


def conditions(inputs: Inputs) -> Conditions:
    """The same request as the engine takes it."""
    contents = zip(inputs.contents, inputs.content_grids, strict=True)
    latents = tuple(unpack_latent(tokens, grid) for tokens, grid in contents)
    return Conditions(inputs.text, inputs.pooled, (inputs.style,) if len(inputs.style) else (), latents)
