"""Measure how much each layer's quantisation alone moves the latent: what the tiers' keep-lists are chosen by.

    python -m benchmarks.tiers.sensitivity [--config uso-tiny] [--kind fp8] [--cases 4]

Everything is computed in float32 but for one group of layers, which is quantised; the error is that of the last latent against
the unquantised model. Without --config the model is the reference cases' small one with the recipe's random weights; with it,
the configuration's own checkpoint with its LoRAs (at the real size a case takes minutes on a CPU: use a GPU, or fewer cases).
The last column, error per square root of a group's share of the parameters, compares large groups with small ones: quantisation
errors of independent layers add like variances.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks.arguments import BenchmarkParser
from benchmarks.measure import write_record
from uso_engine.config import load_config
from uso_engine.loading.transformer import read_loras, resolve
from uso_engine.model.params import TransformerParams
from uso_engine.precision.tiers import Format, linear_classes
from uso_engine.precision.transformer import is_modulation, linears
from uso_engine.sampling.admission import Conditions
from uso_engine.verification.measure import relative_error
from uso_engine.weights.files.tensor_source import TensorSource
from uso_engine.weights.lora import LoRASet
from uso_engine.weights.quantizing import quantize
from uso_engine.weights.transformer_checkpoint import open_transformer_checkpoint

from .errors import DrawnCase, drawn_case


def groups_of(params: TransformerParams) -> dict[str, list[str]]:
    """Layers by group: each block, each role across blocks, all modulation linears, the embedders but ``img_in``."""
    groups: dict[str, list[str]] = {}
    for name, layer in linears(params).items():
        # The model reads its own type from img_in, so that stays a floating-point layer.
        if layer.in_features % 16 or layer.out_features % 16 or name == "img_in":
            continue
        parts = name.split(".")
        if is_modulation(name):
            groups.setdefault("modulation", []).append(name)
        elif name.startswith(("double_blocks", "single_blocks")):
            groups.setdefault(f"{parts[0]}.{parts[1]}", []).append(name)
            groups.setdefault(f"{parts[0]}.*.{'.'.join(parts[2:])}", []).append(name)
        else:
            groups.setdefault("embedders and final layer", []).append(name)
    return groups


def sensitivities(
    params: TransformerParams, cases: list[DrawnCase], sources: list[TensorSource], loras: LoRASet, kind: Format
) -> Iterator[dict[str, object]]:
    """One record per group, the most sensitive per parameter first."""
    sizes = {name: layer.in_features * layer.out_features for name, layer in linears(params).items()}
    exact = [
        case.answer(quantize(params, source, {}, dtype=torch.float32, loras=loras))[1]
        for case, source in zip(cases, sources, strict=True)
    ]
    records = []
    for group, names in groups_of(params).items():
        formats: dict[str, Format] = dict.fromkeys(names, kind)
        errors = []
        for case, source, truth in zip(cases, sources, exact, strict=True):
            module = quantize(params, source, formats, dtype=torch.float32, loras=loras)
            errors.append(relative_error(case.answer(module)[1], truth))
        share = sum(sizes[name] for name in names) / sum(sizes.values())
        error = math.sqrt(sum(e * e for e in errors) / len(errors))
        records.append(
            {"group": group, "kind": kind, "share": share, "latent_error": error, "per_share": error / math.sqrt(share)}
        )
    yield from sorted(records, key=lambda entry: -float(entry["per_share"]))  # type: ignore[arg-type]


def fitted(case: DrawnCase, params: TransformerParams) -> DrawnCase:
    """The same request to a model of other widths."""
    generator = torch.Generator().manual_seed(case.number)
    old = case.conditions
    conditions = Conditions(
        torch.randn(len(old.text), params.context_in_dim, generator=generator),
        torch.randn(params.vec_in_dim, generator=generator),
        tuple(torch.randn(len(tokens), params.hidden_size, generator=generator) for tokens in old.style),
        old.content,
    )
    return replace(case, params=params, conditions=conditions)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__, "cases", "out", cases="4")
    parser.add_argument("--config", help="a configuration whose checkpoint to measure")
    parser.add_argument("--kind", choices=list(linear_classes()), default="fp8", help="how a group is kept; by default fp8")
    options = parser.read(arguments)
    cases = [drawn_case(number) for number in range(100, 100 + options.cases)]
    loras: LoRASet = ()
    if options.config is None:
        params = replace(cases[0].params, guidance_embed=True)
        cases = [replace(case, params=params) for case in cases]
        sources: list[TensorSource] = [case.source for case in cases]
    else:
        config = load_config(options.config)
        params = config.transformer.params
        source = open_transformer_checkpoint(resolve(config.transformer.checkpoint, "transformer checkpoint", config), params)
        loras = read_loras([(entry.path, entry.weight) for entry in config.loras], config)
        cases = [fitted(case, params) for case in cases]
        sources = [source] * len(cases)
    model = options.config or "small model, random weights"
    print(f"{'group':36} {'share':>7} {'error':>8} {'per share':>10}")
    for entry in sensitivities(params, cases, sources, loras, options.kind):
        shown = f"{entry['share']:7.1%} {entry['latent_error']:8.3%} {entry['per_share']:10.2%}"
        print(f"{entry['group']:36} {shown}", flush=True)
        write_record("sensitivity", {"model": model, "cases": len(cases), **entry}, options.out)


if __name__ == "__main__":
    main()
