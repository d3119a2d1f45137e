"""Measure each precision tier's error on the reference cases' small model, and that of one product at the real width.

    python -m benchmarks.tiers.errors [--cases 10]

Errors are ||a - b|| / ||b|| against float32 (products: against float64) with the same unrounded weights. Weights are the
recipe's random ones, another salt for every case, so the figures are those of the arithmetic, not of pictures. Also the bytes
of the real model in each tier, from the meta device.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.arguments import BenchmarkParser
from benchmarks.measure import write_record
from uso_engine.model.params import TransformerParams
from uso_engine.model.transformer import Transformer
from uso_engine.offload.sizes import transformer_sizes
from uso_engine.precision.tiers import FLOAT_TIERS, QUANTIZED_TIERS, TIERS, Format, linear_classes
from uso_engine.precision.transformer import layer_formats
from uso_engine.sampling.admission import Conditions, admit
from uso_engine.sampling.job import ImageJob
from uso_engine.sampling.latents import draw_noise, token_grid
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.schedule import schedule
from uso_engine.verification.measure import relative_error
from uso_engine.verification.small_model import small_params
from uso_engine.weights.files.tensor_source import TensorSource
from uso_engine.weights.loading import load_parameters
from uso_engine.weights.model_shapes import transformer_shapes
from uso_engine.weights.quantizing import quantize
from uso_engine.weights.recipe import recipe_source
from uso_kernels.quantize_rows import quantize_rows

STEPS = 4
OUTPUTS = 768
BF16 = FLOAT_TIERS["bfloat16"]
ATTENTION_TIERS: tuple[str, ...] = (BF16, "fp8")
EIGHT_BIT_ATTENTION = ", 8-bit attention"


@dataclass(frozen=True)
class DrawnCase:
    """A request to the small model, everything drawn from one number."""

    number: int
    width: int
    height: int
    params: TransformerParams
    conditions: Conditions

    @property
    def source(self) -> TensorSource:
        """Weights of the case's own salt."""
        return recipe_source(transformer_shapes(self.params), salt=f"tier error {self.number} ")

    def answer(self, module: Transformer) -> tuple[Tensor, Tensor]:
        """First velocity and last latent."""
        sigmas = schedule(STEPS, self.width, self.height)
        sequence = admit(module, self.conditions, token_grid(self.width, self.height), sigmas, 4.0)
        noise = draw_noise(self.width, self.height, self.number + 1)
        denoiser = DenoisingRun(module, [ImageJob(sequence, noise, tuple(sigmas))])
        velocity = denoiser.step().velocities[0].float().clone()
        denoiser.run()
        return velocity, denoiser.latents()[0]


def drawn_case(number: int) -> DrawnCase:
    """Case `number`: size, text, style and content images vary."""
    choice = random.Random(number)
    params = small_params(guidance_embed=choice.random() < 0.75)
    generator = torch.Generator().manual_seed(number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    styles = tuple(normal(24, params.hidden_size) for _ in range(choice.choice((0, 1, 2))))
    contents = tuple(normal(16, *choice.choice(((8, 12), (16, 10), (6, 6)))) for _ in range(choice.choice((0, 1, 2))))
    text = normal(choice.choice((16, 33, 64)), params.context_in_dim)
    conditions = Conditions(text, normal(params.vec_in_dim), styles, contents)
    return DrawnCase(number, choice.choice((64, 96, 160)), choice.choice((64, 96, 128)), params, conditions)


def floating(case: DrawnCase, dtype: torch.dtype) -> Transformer:
    """The case's model unquantised."""
    with torch.device("meta"):
        module = Transformer(case.params)
    load_parameters(module, case.source, device="cpu", dtype=dtype)
    return module.eval()


def everywhere(params: TransformerParams, chosen: Format) -> dict[str, Format]:
    """Every matrix that any tier quantises in one format: what the keep-lists are worth."""
    in_tiers = [layer_formats(params, tier, keep=[]) for tier in QUANTIZED_TIERS]
    return {name: "float" if all(found[name] == "float" for found in in_tiers) else chosen for name in in_tiers[0]}


def variants(params: TransformerParams) -> dict[str, dict[str, Format]]:
    """Formats of every tier, of its choices, and of each tier's own format everywhere."""
    found: dict[str, dict[str, Format]] = {BF16: layer_formats(params, BF16)}
    for tier in QUANTIZED_TIERS:
        found[tier] = layer_formats(params, tier)
        if TIERS[tier].blocks_with_int8_activations is not None:
            found[f"{tier}, activations too"] = layer_formats(params, tier, int8_activations=True)
    return found | {f"{tier} everywhere": everywhere(params, TIERS[tier].blocks) for tier in QUANTIZED_TIERS}


def tier_errors(cases: int) -> Iterator[dict[str, object]]:
    """One record per tier: mean and largest error over drawn cases."""
    found: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for number in range(cases):
        case = drawn_case(number)
        truth = case.answer(floating(case, torch.float32))

        def errors(module: Transformer, case: DrawnCase = case, truth: tuple[Tensor, Tensor] = truth) -> tuple[float, float]:
            velocity, latent = case.answer(module)
            return relative_error(velocity, truth[0]), relative_error(latent, truth[1])

        for name, formats in variants(case.params).items():
            module = floating(case, torch.bfloat16) if name == BF16 else quantize(case.params, case.source, formats)
            found[name].append(errors(module))
            if name in ATTENTION_TIERS:
                module.attention_backend = "8bit"
                found[name + EIGHT_BIT_ATTENTION].append(errors(module))
    real = TransformerParams()
    sized = variants(real)
    for name, formats in {**sized, **{tier + EIGHT_BIT_ATTENTION: sized[tier] for tier in ATTENTION_TIERS}}.items():
        velocities, latents = zip(*found[name], strict=True)
        sizes = transformer_sizes(real, formats)
        yield {
            "tier": name,
            "cases": cases,
            "velocity_mean": sum(velocities) / cases,
            "velocity_max": max(velocities),
            "latent_mean": sum(latents) / cases,
            "latent_max": max(latents),
            "resident_bytes": sizes.without_modulation,
            "modulation_bytes": sum(sizes.modulation),
        }


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "modulated": lambda x: x * (1 + 0.3 * x[:1]) + 0.3 * x[1:2],
    "after GELU": lambda x: F.gelu(x, approximate="tanh"),
}


def product_errors() -> Iterator[dict[str, object]]:
    """One record per kind, width and input: the error of one product against float64."""
    for width in (3072, 15360):
        generator = torch.Generator().manual_seed(width)
        weight = torch.randn(OUTPUTS, width, generator=generator) / width**0.5
        x = torch.randn(64, width, generator=generator)
        for kind, layer_class in linear_classes().items():
            layer = layer_class(width, OUTPUTS, bias=False, dtype=torch.bfloat16, device="meta")
            layer.assign(layer_class.quantize_weight(weight))
            for name, make in INPUTS.items():
                inputs = make(x).bfloat16()
                truth = inputs.double() @ weight.double().t()
                yield {"kind": kind, "width": width, "input": name, "error": relative_error(layer(inputs), truth)}
        for name, make in INPUTS.items():
            yield from _finer_scales(name, make(x).bfloat16(), weight)


def _finer_scales(name: str, inputs: Tensor, weight: Tensor) -> Iterator[dict[str, object]]:
    """The alternative: activations with a scale for every 128 columns instead of one per row, weights per row as before."""
    truth = inputs.double() @ weight.double().t()
    for kind, element in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
        values, scale = quantize_rows(inputs.reshape(-1, 128), element)
        restored = (values.float() * scale[:, None]).view(inputs.shape)
        layer = linear_classes()[kind](weight.shape[1], weight.shape[0], bias=False, device="meta")  # type: ignore[index]
        layer.assign(type(layer).quantize_weight(weight))
        error = relative_error(restored.double() @ layer.dequantized_weight().double().t(), truth)
        yield {"kind": f"{kind}, scales per 128 columns", "width": weight.shape[1], "input": name, "error": error}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__, "cases", "out")
    options = parser.read(arguments)
    for entry in product_errors():
        print(entry, flush=True)
        write_record("quantised product", entry, options.out)
    for entry in tier_errors(options.cases):
        print(entry, flush=True)
        write_record("tier error", entry, options.out)


if __name__ == "__main__":
    main()
