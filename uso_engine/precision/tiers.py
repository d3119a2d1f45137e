"""The precision tiers: what each makes of a matrix, which GPU it needs and how far it may be off; the layer of each format.

Whatever lists tiers is derived from `TIERS`: a configuration's values, the command line's choices, loading, memory plans,
verification's bounds, messages, benchmarks. Importing this needs no torch, so that a configuration can be read without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from .quantized_linear import QuantizedLinear

Format = Literal["float", "fp8", "fp8_weight", "int8", "int8_weight", "int4"]
"""How one matrix is kept and multiplied: ``_weight`` quantises the weight alone, ``float`` is the engine's own `Linear`."""

FloatType = Literal["float32", "bfloat16"]
"""A floating type by torch's name."""

TierName = Literal["float32", "bf16", "fp8", "int8", "int4"]
"""The keys of `TIERS`, for type checkers and configurations."""

TextTierName = Literal["bf16", "int8", "fp8"]
"""The tiers in which T5 can be kept: those whose `Tier.text_encoder` is not None."""


class Generation(NamedTuple):
    """A generation of GPUs and its lowest compute capability."""

    name: str
    capability: tuple[int, int]


ANY_GPU, AMPERE, ADA = Generation("any", (0, 0)), Generation("Ampere", (8, 0)), Generation("Ada", (8, 9))


@dataclass(frozen=True)
class Tier:
    """One precision tier.

    Args:
        blocks: format of the blocks' matrices.
        sensitive: of the layers that ``[precision] keep`` names.
        modulation: of the linears that make modulation vectors.
        oldest_gpu: what computes it, newer ones too. A CPU computes every tier.
        velocity_bound: largest relative error of the first velocity that verification allows.
        latent_bound: of the last latent.
        dtype: type of what is in format "float", of biases and of activations.
        blocks_with_int8_activations: what ``[precision] int8_activations`` makes of `blocks`; None: it changes nothing here.
        text_encoder: of T5's matrices where ``[precision] text_encoder`` names this tier; None: it cannot.
    """

    blocks: Format
    sensitive: Format
    modulation: Format
    oldest_gpu: Generation
    velocity_bound: float
    latent_bound: float
    dtype: FloatType = "bfloat16"
    blocks_with_int8_activations: Format | None = None
    text_encoder: Format | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether any matrix is in fewer bits than `dtype` has."""
        return (self.blocks, self.sensitive, self.modulation) != ("float", "float", "float")

    @property
    def is_exact(self) -> bool:
        """Whether every tensor answers to the bounds, not the first velocity and the last latent alone."""
        return self.dtype == "float32" and not self.is_quantized


# The bounds leave room above the worst errors of drawn cases, which docs/quantization.md shows.
# Modulation linears turn one vector into the shifts, scales and gates of every row, so their error reaches everything at once;
# they run only at admission, so their size costs host memory and a transfer, not speed. They stay in floating point except in
# int4, beside whose own error int8 is free (`benchmarks/tiers/sensitivity.py`).
TIERS: Mapping[TierName, Tier] = {
    "float32": Tier("float", "float", "float", ANY_GPU, 5e-6, 5e-6, dtype="float32"),
    "bf16": Tier("float", "float", "float", AMPERE, 0.015, 0.015, text_encoder="float"),
    "fp8": Tier("fp8", "float", "float", ADA, 0.045, 0.03, text_encoder="fp8_weight"),
    "int8": Tier(
        "int8_weight",
        "float",
        "float",
        AMPERE,
        0.015,
        0.015,
        blocks_with_int8_activations="int8",
        text_encoder="int8_weight",
    ),
    "int4": Tier("int4", "int8_weight", "int8_weight", AMPERE, 0.16, 0.11),
}

QUANTIZED_TIERS: tuple[TierName, ...] = tuple(name for name, tier in TIERS.items() if tier.is_quantized)

FLOAT_TIERS: Mapping[FloatType, TierName] = {tier.dtype: name for name, tier in TIERS.items() if not tier.is_quantized}
"""The tier in which every matrix is of a floating type."""


@cache
def linear_classes() -> Mapping[Format, type[QuantizedLinear]]:
    """The layer of every format but "float"; imported on demand, since layers need torch."""
    from .fp8_linear import Fp8Linear, Fp8WeightLinear
    from .int4_linear import Int4Linear
    from .int8_linear import Int8Linear, Int8WeightLinear

    return {
        "fp8": Fp8Linear,
        "fp8_weight": Fp8WeightLinear,
        "int8": Int8Linear,
        "int8_weight": Int8WeightLinear,
        "int4": Int4Linear,
    }


def tiers_of_gpu(capability: tuple[int, int]) -> tuple[TierName, ...]:
    """Names of the tiers that a GPU of a compute capability computes."""
    return tuple(name for name, tier in TIERS.items() if capability >= tier.oldest_gpu.capability)
