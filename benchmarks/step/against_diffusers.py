"""One denoising step, ours against diffusers' FluxTransformer2DModel fed the same tokens and weights, in the same run.

    python -m benchmarks.step.against_diffusers [--workload small] [--rounds 5]

The small workload is the issues': hidden 1024, 3 + 6 blocks, 8 heads, 512 x 512, one content and one style image, bfloat16.
diffusers has no place for style tokens, so both get 704 text tokens; its LoRA is merged too, so this compares the
computation of a step alone. diffusers computes modulation, rotary tables and projections in every step, ours before the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arguments import BenchmarkParser
from benchmarks.measure import Clock, count_allocations, interleave, write_record
from benchmarks.workload import Inputs, Workload, random_inputs, random_transformer
from uso_engine.model.roofline import Tokens, step_flops
from uso_engine.model.rope import content_positions, grid_positions
from uso_engine.model.transformer import Transformer
from uso_engine.verification.measure import relative_error
from uso_engine.weights.diffusers_keys import diffusers_pieces, diffusers_shapes

from .engine_way import Evaluate, engine_step

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# 1000 times this is a bfloat16 number: diffusers rounds it there, the engine does not.
TIME = 0.5


class TimeProjection(nn.Module):
    """diffusers' `Timesteps` with its frequencies computed in float64 and rounded once.

    Its float32 `exp` differs between makers of CPUs by 5.7e-7, which moves the velocity by 1e-5.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Map [N], 1000 times a time or a guidance scale, to [N, 256]."""
        frequencies = torch.from_numpy(np.exp(-np.log(10_000.0) * np.arange(128) / 128).astype(np.float32))
        angles = values[:, None].float() * frequencies.to(values.device)
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


def diffusers_twin(transformer: Transformer) -> FluxTransformer2DModel:
    """diffusers' model with the same constants and weights, in the same memory where its matrices are rows of ours."""
    from diffusers import FluxTransformer2DModel

    params, weight = transformer.params, transformer.img_in.weight
    with torch.device("meta"):
        twin = FluxTransformer2DModel(
            in_channels=params.in_channels,
            num_layers=params.depth,
            num_single_layers=params.depth_single_blocks,
            attention_head_dim=params.head_dim,
            num_attention_heads=params.num_heads,
            joint_attention_dim=params.context_in_dim,
            pooled_projection_dim=params.vec_in_dim,
            guidance_embeds=params.guidance_embed,
            axes_dims_rope=params.axes_dim,
        )
    ours = transformer.state_dict()
    shapes = diffusers_shapes(params)
    state: dict[str, Tensor] = {}
    for key, pieces in diffusers_pieces(params).items():
        for piece in pieces:
            source = ours[key][piece.row : piece.row + piece.rows]
            if piece.rows == shapes[piece.name][0]:
                state[piece.name] = source
                continue
            whole = state.setdefault(piece.name, torch.empty(shapes[piece.name], dtype=weight.dtype, device=weight.device))
            whole[piece.source_row : piece.source_row + piece.rows] = source
    twin.load_state_dict(state, assign=True)
    twin.time_text_embed.time_proj = TimeProjection()
    return twin.eval().requires_grad_(False)


def diffusers_step(twin: FluxTransformer2DModel, inputs: Inputs, latents: Tensor) -> Evaluate:
    """The same step by diffusers."""
    device, dtype = latents.device, latents.dtype
    hidden = torch.cat((latents, *inputs.contents))[None]
    ids = torch.cat((grid_positions(inputs.grid), *content_positions(inputs.grid, inputs.content_grids))).to(device)
    arguments = {
        "hidden_states": hidden,
        "encoder_hidden_states": inputs.text[None],
        "pooled_projections": inputs.pooled[None],
        "timestep": torch.tensor([TIME], device=device, dtype=dtype),
        "guidance": torch.tensor([inputs.guidance], device=device),
        "img_ids": ids,
        "txt_ids": torch.zeros(len(inputs.text), 3, device=device),
    }

    def evaluate() -> Tensor:
        velocity: Tensor = twin(**arguments, return_dict=False)[0][0, : len(latents)]
        return velocity

    return evaluate


@torch.no_grad()
def run(
    workload: Workload, device: torch.device, dtype: torch.dtype, rounds: int, out: Path | None, clock: Clock = "wall"
) -> dict[str, object]:
    """Compare both velocities, time both in turn, print and record.

    Raises:
        SystemExit: they do not compute the same.
    """
    workload = replace(workload, text=workload.text + workload.style, style=0)
    transformer = random_transformer(workload.params, device, dtype)
    inputs = random_inputs(workload, device, dtype)
    latents = torch.randn(math.prod(workload.grid), workload.params.in_channels, generator=torch.Generator().manual_seed(3))
    latents = latents.to(device, dtype)
    variants = {
        "diffusers": diffusers_step(diffusers_twin(transformer), inputs, latents),
        "ours": engine_step(transformer, inputs, latents, (TIME,), "auto"),
    }
    difference = relative_error(variants["ours"](), variants["diffusers"]())
    if not difference <= TOLERANCE[dtype]:
        raise SystemExit(f"diffusers and the engine do not compute the same velocity: relative difference {difference:.1e}")
    times = interleave(variants, rounds=rounds, device=device, clock=clock)
    tokens = Tokens(workload.text, 0, math.prod(workload.grid), math.prod(workload.content))
    with FlopCounterMode(display=False) as counter:
        variants["diffusers"]()
    record: dict[str, object] = {
        "workload": workload.name,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens.all,
        "rounds": rounds,
        "clock": clock,
        "difference": difference,
        "ours_ms": times["ours"],
        "diffusers_ms": times["diffusers"],
        "ratio": times["diffusers"]["median_ms"] / times["ours"]["median_ms"],
        "flops": step_flops(workload.params, tokens),
        # The counter does not know the dense attention of a CPU.
        "diffusers_counted_flops": counter.get_total_flops(),
        **{f"{name}_allocations": count_allocations(variant, device) for name, variant in variants.items()},
    }
    write_record("step", record, out)
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__, "workload", "device", "dtype", "rounds", "clock", "threads", "out", workload="small")
    options = parser.read(arguments)
    record = run(options.workload, options.device, options.dtype, options.rounds, options.out, options.clock)
    for name, value in record.items():
        print(f"{name:24s} {value}")


if __name__ == "__main__":
    main()
