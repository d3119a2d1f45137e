"""Small transformers with drawn weights, quantised or not, and sequences with drawn conditions, for the tests."""

from __future__ import annotations

import torch

from uso_engine.model.linear import Linear
from uso_engine.model.params import TransformerParams
from uso_engine.model.sequence import Sequence
from uso_engine.model.transformer import Transformer
from uso_engine.precision.quantized_linear import QuantizedLinear
from uso_engine.sampling.admission import Conditions, admit
from uso_engine.weights.recipe import draw

SMALL = TransformerParams(
    vec_in_dim=24, context_in_dim=32, hidden_size=128, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=(16, 24, 24)
)
SIGMAS = (1.0, 0.75, 0.4, 0.0)


def small_transformer(params: TransformerParams = SMALL, *, dtype: torch.dtype = torch.float32, salt: str = "") -> Transformer:
    """A transformer whose weights follow the reference recipe."""
    with torch.device("meta"):
        transformer = Transformer(params)
    state = {key: draw(key, tuple(value.shape), salt, dtype) for key, value in transformer.state_dict().items()}
    transformer.load_state_dict(state, assign=True)
    return transformer.requires_grad_(False)


def quantise(transformer: Transformer, kind: type[QuantizedLinear]) -> list[QuantizedLinear]:
    """Replace every matrix that a step multiplies by in the blocks."""
    replaced = []
    for name, layer in [(n, m) for n, m in transformer.named_modules() if isinstance(m, Linear) and "blocks" in n]:
        if "_mod." in name or "modulation" in name:
            continue
        new = kind(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=layer.weight.dtype)
        tensors = kind.quantize_weight(layer.weight.float())
        new.assign({**tensors, **({} if layer.bias is None else {"bias": layer.bias.detach()})})
        parent, _, child = name.rpartition(".")
        transformer.get_submodule(parent).add_module(child, new)
        replaced.append(new)
    return replaced


def drawn_conditions(
    params: TransformerParams, *, seed: int, text: int, style: int = 0, contents: tuple[tuple[int, int], ...] = ()
) -> Conditions:
    """Conditions of the given lengths; contents are latent heights and widths."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    return Conditions(
        text=normal(text, params.context_in_dim),
        pooled=normal(params.vec_in_dim),
        style=(normal(style, params.hidden_size),) if style else (),
        content=tuple(normal(params.in_channels // 4, height, width) for height, width in contents),
    )


def drawn_sequence(
    transformer: Transformer, grid: tuple[int, int], conditions: Conditions, *, guidance: float = 4.0
) -> Sequence:
    """A sequence for `SIGMAS`."""
    return admit(transformer, conditions, grid, SIGMAS, guidance)
