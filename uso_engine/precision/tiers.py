"""Which layer is kept in which form: a tier is a rule over the transformer's matrices.

The defaults were chosen with `benchmarks/tiers/sensitivity.py`. Modulation linears turn one vector into the shifts, scales
and gates of every row, so their error reaches everything at once; they run only at admission, so their size costs host memory
and a transfer, not speed. They stay in floating point except in int4, beside whose own error int8 is free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch

from uso_engine.errors import BackendError, ConfigError
from uso_engine.model.linear import Linear
from uso_engine.model.params import TransformerParams
from uso_engine.model.transformer import Transformer

from .fp8_linear import Fp8Linear, Fp8WeightLinear
from .int4_linear import Int4Linear
from .int8_linear import Int8Linear, Int8WeightLinear
from .quantized_linear import QuantizedLinear

Kind = Literal["float", "fp8", "fp8_weight", "int8", "int8_weight", "int4"]
"""How one matrix is kept and multiplied: ``_weight`` quantises the weight alone, ``float`` is the engine's own `Linear`."""

QuantizedTier = Literal["fp8", "int8", "int4"]
FLOAT_TIERS: Mapping[str, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16}

CLASSES: Mapping[Kind, type[QuantizedLinear]] = {
    "fp8": Fp8Linear,
    "fp8_weight": Fp8WeightLinear,
    "int8": Int8Linear,
    "int8_weight": Int8WeightLinear,
    "int4": Int4Linear,
}

DEFAULT_KEEP = (
    "double_blocks.0",
    "single_blocks.-1",
    "double_blocks.-1.img_attn.proj",
    "double_blocks.-1.txt_attn.qkv",
)
"""The sensitive layers: the first double and the last single block, and of the last double block the two matrices whose
quantisation moves the answer most for their size (`benchmarks/tiers/sensitivity.py`). Without these two, fp8 misses its bound
on models without a guidance embedding."""

ALWAYS_FLOAT = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer.linear")
"""The embedders and the last projection: 0.4 % of the parameters, and the model reads its own type from ``img_in``."""

_INDEX = re.compile(r"(double_blocks|single_blocks)\.(-\d+)")


@dataclass(frozen=True)
class TierRule:
    """What a tier makes of blocks, of the sensitive layers (`keep`), and of modulation linears."""

    blocks: Kind
    sensitive: Kind
    modulation: Kind


RULES: Mapping[QuantizedTier, TierRule] = {
    "fp8": TierRule("fp8", "float", "float"),
    "int8": TierRule("int8_weight", "float", "float"),
    "int4": TierRule("int4", "int8_weight", "int8_weight"),
}


def is_modulation(name: str) -> bool:
    """Whether a matrix makes modulation vectors and is therefore needed at admission only."""
    return name.endswith(("_mod.lin", ".modulation.lin", "adaLN_modulation.1"))


def layer_kinds(
    params: TransformerParams, tier: QuantizedTier, *, keep: Sequence[str] | None = None, int8_activations: bool = False
) -> dict[str, Kind]:
    """Decide the form of every matrix of the transformer.

    Args:
        params: the model's sizes.
        tier: whose rule applies.
        keep: the sensitive layers, instead of `DEFAULT_KEEP`: names of modules or shell patterns over them; a block's number
            may count from the end (``single_blocks.-1``). fp8 and int8 keep them in floating point, int4 in int8.
        int8_activations: in the int8 tier, quantise activations too and multiply in int8.

    Returns:
        By module name, in the model's order. Matrices whose sides are no multiples of 16 stay in floating point.

    Raises:
        ConfigError: a pattern that matches nothing; all such are listed.
    """
    rule = RULES[tier]
    blocks: Kind = "int8" if rule.blocks == "int8_weight" and int8_activations else rule.blocks
    patterns = [_absolute(pattern, params) for pattern in (DEFAULT_KEEP if keep is None else keep)]
    matched: set[str] = set()
    kinds: dict[str, Kind] = {}
    for name, layer in linears(params).items():
        hits = [pattern for pattern in patterns if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        matched.update(hits)
        if name.startswith(ALWAYS_FLOAT) or layer.in_features % 16 or layer.out_features % 16:
            kinds[name] = "float"
        elif hits:
            kinds[name] = rule.sensitive
        else:
            kinds[name] = rule.modulation if is_modulation(name) else blocks
    unmatched = [pattern for pattern in patterns if pattern not in matched]
    if unmatched:
        raise ConfigError(
            f"keep patterns that match no layer: {', '.join(unmatched)}; names look like double_blocks.0.img_attn.qkv, "
            f"single_blocks.-1, single_blocks.*.linear2"
        )
    return kinds


def linears(params: TransformerParams) -> dict[str, Linear]:
    """Every matrix of a transformer by module name, on the meta device."""
    with torch.device("meta"):
        module = Transformer(params)
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Linear)}


def quantized_transformer(
    params: TransformerParams, kinds: Mapping[str, Kind], *, dtype: torch.dtype = torch.bfloat16
) -> Transformer:
    """Make a transformer on the meta device whose matrices have the given kinds.

    Args:
        params: its sizes.
        kinds: of every matrix, see `layer_kinds`.
        dtype: of everything that stays in floating point.
    """
    with torch.device("meta"):
        module = Transformer(params).to(dtype)
    for name, kind in kinds.items():
        if kind == "float":
            continue
        layer = module.get_submodule(name)
        assert isinstance(layer, Linear)
        replacement = CLASSES[kind](
            layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=dtype, device="meta"
        )
        parent, _, child = name.rpartition(".")
        module.get_submodule(parent).add_module(child, replacement)
    return module.eval()


def tiers_of_gpu(capability: tuple[int, int]) -> tuple[str, ...]:
    """Precision tiers that a GPU of a compute capability can run, the bf16 one among them."""
    if capability < (8, 0):
        return ("float32",)
    tiers = ("float32", "bf16", "int8", "int4")
    return (*tiers, "fp8") if capability >= (8, 9) else tiers


def check_tier(tier: str, device: torch.device) -> None:
    """Check that a device has what a tier needs; a CPU computes every tier, slowly.

    Raises:
        BackendError: a GPU without fp8 units, or older than Ampere; names the tiers that work there.
    """
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    possible = tiers_of_gpu(capability)
    if tier not in possible:
        name = torch.cuda.get_device_name(device)
        raise BackendError(
            f"precision tier {tier!r} needs compute capability {'8.9 (Ada, Hopper, Blackwell)' if tier == 'fp8' else '8.0'} "
            f"or newer, {name} has {capability[0]}.{capability[1]}; tiers that work here: {', '.join(possible)}"
        )


def _absolute(pattern: str, params: TransformerParams) -> str:
    """A pattern with block numbers counted from the beginning."""
    counts = {"double_blocks": params.depth, "single_blocks": params.depth_single_blocks}
    return _INDEX.sub(lambda match: f"{match[1]}.{counts[match[1]] + int(match[2])}", pattern)
