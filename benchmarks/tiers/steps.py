"""A denoising step in every precision tier against bf16: the same random weights, timed in turn in one run.

    python -m benchmarks.tiers.steps --workload full        on a GPU, every tier that it can compute
    python -m benchmarks.tiers.steps --workload tiny        a smoke test

Only one quantised copy is in memory beside the bf16 model. Each tier's velocity is compared with bf16's: with random weights
that is no measure of pictures, but a wrong scale would show in it. int8 is measured with and without quantised activations.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.arguments import BenchmarkParser
from benchmarks.measure import Clock, interleave, write_record
from benchmarks.step.engine_way import engine_step
from benchmarks.workload import Workload, random_inputs, random_transformer
from uso_engine.model.linear import Linear
from uso_engine.model.params import TransformerParams
from uso_engine.model.transformer import Transformer
from uso_engine.offload.sizes import transformer_sizes
from uso_engine.precision.quantized_linear import QuantizedLinear
from uso_engine.precision.tiers import QUANTIZED_TIERS, TIERS, Format, linear_classes, tiers_of_gpu
from uso_engine.precision.transformer import layer_formats, quantized_transformer
from uso_engine.verification.measure import relative_error

LARGEST_DIFFERENCE = 0.5
"""A step that differs more is broken, not rounded."""


def formats_by_name(params: TransformerParams, device: torch.device) -> dict[str, dict[str, Format]]:
    """Forms of the matrices of every tier that a device computes."""
    able = QUANTIZED_TIERS if device.type == "cpu" else tiers_of_gpu(torch.cuda.get_device_capability(device))
    tiers = [tier for tier in QUANTIZED_TIERS if tier in able]
    found: dict[str, dict[str, Format]] = {tier: layer_formats(params, tier) for tier in tiers}
    chosen = [tier for tier in tiers if TIERS[tier].blocks_with_int8_activations is not None]
    return found | {f"{tier}, W8A8": layer_formats(params, tier, int8_activations=True) for tier in chosen}


def with_8_bit_activations() -> tuple[str, ...]:
    """Those of `formats_by_name` that multiply in 8 bits, and can be faster than bf16."""
    found: dict[str, Format | None] = {tier: TIERS[tier].blocks for tier in QUANTIZED_TIERS}
    found |= {f"{tier}, W8A8": TIERS[tier].blocks_with_int8_activations for tier in QUANTIZED_TIERS}
    return tuple(name for name, chosen in found.items() if chosen is not None and linear_classes()[chosen].takes is not None)


@torch.no_grad()
def quantized_copy(transformer: Transformer, formats: dict[str, Format]) -> Transformer:
    """A quantised model of a model's weights, on its device; what stays in floating point is shared with it."""
    copy = quantized_transformer(transformer.params, formats, dtype=transformer.img_in.weight.dtype)
    for name in formats:
        source = transformer.get_submodule(name)
        assert isinstance(source, Linear)
        target = copy.get_submodule(name)
        if isinstance(target, QuantizedLinear):
            tensors = type(target).quantize_weight(source.weight.float())
            target.assign(tensors if source.bias is None else {**tensors, "bias": source.bias.detach()})
        else:
            parent, _, child = name.rpartition(".")
            copy.get_submodule(parent).add_module(child, source)
    for name, parameter in transformer.named_parameters():
        if name.endswith(".scale"):
            parent, _, child = name.rpartition(".")
            setattr(copy.get_submodule(parent), child, parameter)
    return copy


@torch.no_grad()
def run(
    workload: Workload,
    device: torch.device,
    rounds: int,
    out: Path | None,
    clock: Clock = "wall",
    only: tuple[str, ...] | None = None,
) -> list[dict[str, object]]:
    """Compare, time, print and record every tier, or only those that are named.

    Raises:
        SystemExit: a tier's velocity is not even near bf16's.
    """
    transformer = random_transformer(workload.params, device, torch.bfloat16)
    inputs = random_inputs(workload, device, torch.bfloat16)
    generator = torch.Generator("cpu").manual_seed(3)
    tokens = inputs.grid[0] * inputs.grid[1]
    latents = torch.randn(tokens, workload.params.in_channels, generator=generator).to(device, torch.bfloat16)
    plain = engine_step(transformer, inputs, latents, (0.75,), "auto")
    truth = plain()
    records: list[dict[str, object]] = []
    for name, formats in formats_by_name(workload.params, device).items():
        if only is not None and name not in only:
            continue
        step = engine_step(quantized_copy(transformer, formats), inputs, latents, (0.75,), "auto")
        difference = relative_error(step(), truth)
        if not difference <= LARGEST_DIFFERENCE:
            raise SystemExit(f"{name} does not compute bf16's velocity: relative difference {difference:.3g}")
        times = interleave({"bf16": plain, name: step}, rounds=rounds, device=device, clock=clock)
        record: dict[str, object] = {
            "workload": workload.name,
            "device": device.type,
            "tier": name,
            "rounds": rounds,
            "clock": clock,
            "bf16_ms": times["bf16"],
            "tier_ms": times[name],
            "times_bf16": times["bf16"]["median_ms"] / times[name]["median_ms"],
            "difference": difference,
            "resident_gb": transformer_sizes(workload.params, formats).without_modulation / 1e9,
        }
        write_record("tier_steps", record, out)
        records.append(record)
        print(
            f"{name:12s} {times[name]['median_ms']:9.1f} ms, bf16 {times['bf16']['median_ms']:9.1f} ms, off by {difference:.2%}"
        )
        del step
        gc.collect()
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__, "workload", "device", "rounds", "clock", "threads", "out", rounds="10")
    options = parser.read(arguments)
    run(options.workload, options.device, options.rounds, options.out, options.clock)


if __name__ == "__main__":
    main()
