"""Recognising LoRAs that turn FLUX.1-dev into another model: Black Forest Labs' control LoRAs (Canny, Depth)."""

from __future__ import annotations

from collections.abc import Mapping

from uso_engine.errors import LoRAError
from uso_engine.weights.files.tensor_source import TensorSource

from .found import FoundLayer
from .keys import Role


def refuse_control_lora(source: TensorSource, layers: Mapping[str, FoundLayer]) -> None:
    """Refuse a LoRA that widens the transformer's input, with the reason.

    Args:
        source: the file.
        layers: as they were found, in any state.

    Raises:
        LoRAError: the input layer's ``down`` matrix takes more channels than the transformer has.
    """
    for layer in layers.values():
        if layer.target is None or layer.target.parts[0].key != "img_in.weight" or Role.DOWN not in layer.keys:
            continue
        shape = source.shape(layer.keys[Role.DOWN])
        if len(shape) == 2 and shape[1] > layer.target.columns:
            raise LoRAError(
                f"{source.describe()}: a control LoRA (such as FLUX.1-Canny-dev-lora or FLUX.1-Depth-dev-lora): "
                f"{layer.keys[Role.DOWN]} takes {shape[1]} input channels, the transformer has {layer.target.columns}; the "
                "others would be a control picture, which USO has no place for"
            )
