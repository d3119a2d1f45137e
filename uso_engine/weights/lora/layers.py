"""What a key style has to say: the layers of this model under the names that LoRA files of that style give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from uso_engine.model.params import TransformerParams
from uso_engine.weights.model_shapes import transformer_shapes


@dataclass(frozen=True)
class LayerRows:
    """Rows of a LoRA's ``up`` matrix and the rows of a canonical weight that they act on.

    Args:
        key: the canonical weight.
        rows: how many.
        row: the first one in the weight.
        source_row: the first one in ``up``.
    """

    key: str
    rows: int
    row: int = 0
    source_row: int = 0


@dataclass(frozen=True)
class LoRALayer:
    """A layer as a LoRA sees it.

    Args:
        rows: outputs of the layer, the rows of ``up``.
        columns: inputs of the layer, the columns of ``down``; 0 for a norm's scale, which is a vector.
        parts: where its rows lie in the model's weights.
    """

    rows: int
    columns: int
    parts: tuple[LayerRows, ...]

    @property
    def bias_key(self) -> str:
        """The canonical key of the bias beside its weight, if the layer has one."""
        return f"{self.parts[0].key.removesuffix('.weight')}.bias"


@dataclass(frozen=True)
class KeyStyle:
    """One way of naming layers in LoRA files.

    Args:
        name: what messages call it.
        prefixes: texts that may stand before a layer's name, longest first.
        layers: the layers of a model by name.
    """

    name: str
    prefixes: tuple[str, ...]
    layers: Callable[[TransformerParams], Mapping[str, LoRALayer]]


DOTTED_PREFIXES = (
    "transformer.base_model.model.",
    "base_model.model.transformer.",
    "base_model.model.diffusion_model.",
    "base_model.model.",
    "model.diffusion_model.",
    "transformer.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "",
)
"""What PEFT, ComfyUI, diffusers and trainers put before a layer's path."""


def matrices(params: TransformerParams) -> dict[str, tuple[int, int]]:
    """Rows and columns of every matrix of the transformer by canonical layer name (without ``.weight``)."""
    shapes = transformer_shapes(params)
    return {key.removesuffix(".weight"): (s[0], s[1]) for key, s in shapes.items() if len(s) == 2}


def norm_layers(params: TransformerParams) -> dict[str, LoRALayer]:
    """The scales of the norms of q and k by canonical name, with and without the ending ``.scale``."""
    layers: dict[str, LoRALayer] = {}
    for key, shape in transformer_shapes(params).items():
        if key.endswith(".scale"):
            layers[key] = layers[key.removesuffix(".scale")] = LoRALayer(shape[0], 0, (LayerRows(key, shape[0]),))
    return layers


def whole_layer(name: str, rows: int, columns: int) -> LoRALayer:
    """A LoRA layer that is one whole canonical matrix, or its first rows.

    Args:
        name: canonical layer name, without ``.weight``.
        rows: how many of its rows, from the first.
        columns: its columns.
    """
    return layer_rows(name, rows, columns)


def layer_rows(name: str, rows: int, columns: int, *, row: int = 0) -> LoRALayer:
    """A LoRA layer that is some consecutive rows of a canonical matrix; arguments as for `whole_layer`, and the first row."""
    return LoRALayer(rows, columns, (LayerRows(f"{name}.weight", rows, row),))
