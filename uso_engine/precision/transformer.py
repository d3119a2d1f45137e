"""The transformer in a precision tier: the format of every matrix, and a module made of their layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from uso_engine.errors import BackendError, ConfigError
from uso_engine.model.linear import Linear
from uso_engine.model.params import TransformerParams
from uso_engine.model.transformer import Transformer

from .tiers import FLOAT_TIERS, TIERS, FloatType, Format, TierName, linear_classes, tiers_of_gpu

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

DTYPES: Mapping[FloatType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

TIER_OF_DTYPE: Mapping[torch.dtype, TierName] = {DTYPES[name]: tier for name, tier in FLOAT_TIERS.items()}

_INDEX = re.compile(r"(double_blocks|single_blocks)\.(-\d+)")


def is_modulation(name: str) -> bool:
    """Whether a matrix makes modulation vectors and is therefore needed at admission only."""
    return name.endswith(("_mod.lin", ".modulation.lin", "adaLN_modulation.1"))


def layer_formats(
    params: TransformerParams, tier: TierName, *, keep: Sequence[str] | None = None, int8_activations: bool = False
) -> dict[str, Format]:
    """Decide the format of every matrix of the transformer.

    Args:
        params: the model's sizes.
        tier: whose rule applies; in one that quantises nothing the other arguments make no difference.
        keep: the sensitive layers, instead of `DEFAULT_KEEP`: names of modules or shell patterns over them; a block's number
            may count from the end (``single_blocks.-1``).
        int8_activations: quantise activations too and multiply in int8, in a tier that has this choice.

    Returns:
        By module name, in the model's order. Matrices whose sides are no multiples of 16 stay in floating point.

    Raises:
        ConfigError: a pattern that matches nothing; all such are listed.
    """
    rule = TIERS[tier]
    if not rule.is_quantized:
        return dict.fromkeys(linears(params), "float")
    blocks = (rule.blocks_with_int8_activations if int8_activations else None) or rule.blocks
    patterns = [_absolute(pattern, params) for pattern in (DEFAULT_KEEP if keep is None else keep)]
    matched: set[str] = set()
    formats: dict[str, Format] = {}
    for name, layer in linears(params).items():
        hits = [pattern for pattern in patterns if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        matched.update(hits)
        if name.startswith(ALWAYS_FLOAT) or layer.in_features % 16 or layer.out_features % 16:
            formats[name] = "float"
        elif hits:
            formats[name] = rule.sensitive
        else:
            formats[name] = rule.modulation if is_modulation(name) else blocks
    unmatched = [pattern for pattern in patterns if pattern not in matched]
    if unmatched:
        raise ConfigError(
            f"keep patterns that match no layer: {', '.join(unmatched)}; names look like double_blocks.0.img_attn.qkv, "
            f"single_blocks.-1, single_blocks.*.linear2"
        )
    return formats


def linears(params: TransformerParams) -> dict[str, Linear]:
    """Every matrix of a transformer by module name, on the meta device."""
    with torch.device("meta"):
        module = Transformer(params)
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Linear)}


def quantized_transformer(
    params: TransformerParams, formats: Mapping[str, Format], *, dtype: torch.dtype = torch.bfloat16
) -> Transformer:
    """Make a transformer on the meta device whose matrices have the given formats.

    Args:
        params: its sizes.
        formats: of the matrices, see `layer_formats`; what is left out is "float".
        dtype: of everything that stays in floating point.
    """
    with torch.device("meta"):
        module = Transformer(params).to(dtype)
    for name, chosen in formats.items():
        if chosen == "float":
            continue
        layer = module.get_submodule(name)
        assert isinstance(layer, Linear)
        replacement = linear_classes()[chosen](
            layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=dtype, device="meta"
        )
        parent, _, child = name.rpartition(".")
        module.get_submodule(parent).add_module(child, replacement)
    return module.eval()


def check_tier(tier: TierName, device: torch.device) -> None:
    """Check that a device has what a tier needs; a CPU computes every tier, slowly.

    Raises:
        BackendError: a GPU that is too old for it; names the tiers that work there.
    """
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    possible = tiers_of_gpu(capability)
    if tier not in possible:
        oldest, (major, minor) = TIERS[tier].oldest_gpu
        raise BackendError(
            f"precision tier {tier!r} needs compute capability {major}.{minor} ({oldest}) or newer, "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; "
            f"tiers that work here: {', '.join(possible)}"
        )


def _absolute(pattern: str, params: TransformerParams) -> str:
    """A pattern with block numbers counted from the beginning."""
    counts = {"double_blocks": params.depth, "single_blocks": params.depth_single_blocks}
    return _INDEX.sub(lambda match: f"{match[1]}.{counts[match[1]] + int(match[2])}", pattern)
