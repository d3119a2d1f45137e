"""Quantising a transformer's weights, one layer at a time, with LoRAs merged before.

Every value is a function of the pristine tensors and the LoRAs alone, so quantising again gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from uso_engine.errors import CheckpointError, LoRAError
from uso_engine.model.params import TransformerParams
from uso_engine.model.transformer import Transformer
from uso_engine.precision.quantized_linear import QuantizedLinear
from uso_engine.precision.tiers import Format, linear_classes
from uso_engine.precision.transformer import quantized_transformer

from .files.key_report import bulleted, compare_shapes, summarise_keys
from .files.tensor_source import TensorSource, shapes_of
from .loading import Progress, merged_tensor
from .lora import LoRASet
from .model_shapes import transformer_shapes


def check_quantizable(params: TransformerParams, source: TensorSource, loras: LoRASet) -> None:
    """Check that weights and LoRAs belong to a model, before any is read.

    Raises:
        CheckpointError: keys missing, left over or of another shape; all are listed.
        LoRAError: a LoRA that changes weights that the model does not have.
    """
    expected = transformer_shapes(params)
    problems = compare_shapes(expected, shapes_of(source))
    if problems:
        raise CheckpointError(bulleted(f"{source.describe()} does not fit the transformer", problems))
    for lora, _ in loras:
        strange = [key for key in lora.updates if key not in expected]
        if strange:
            raise LoRAError(f"{lora.name} changes weights that the model does not have: {summarise_keys(strange)}")


def quantized_tensors(
    params: TransformerParams,
    source: TensorSource,
    formats: Mapping[str, Format],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    loras: LoRASet = (),
    only: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Make the tensors of a quantised transformer, holding one layer at a time.

    Args:
        params: the model's sizes.
        source: the pristine weights.
        formats: of every matrix, see `layer_formats`.
        dtype: of what stays in floating point, biases included.
        device: where layers are quantised and end up.
        loras: merged in float32 before quantising, each with its strength.
        only: checkpoint keys to make, all by default.
        progress: told the bytes read and the bytes to read.

    Yields:
        Key (a name in the quantised module's state) and tensor.

    Raises:
        CheckpointError: weights that do not fit, or are infinite or not a number.
        LoRAError: a LoRA that does not fit, or whose sum with a weight overflows.
        BackendError: a format whose values optimum-quanto chooses, and it is not installed.
    """
    check_quantizable(params, source, loras)
    shapes = transformer_shapes(params)
    keys = list(shapes) if only is None else list(only)
    sizes = {key: torch.Size(shapes[key]).numel() * source.dtype(key).itemsize for key in keys}
    done, total = 0, sum(sizes.values())
    for key in keys:
        module, _, leaf = key.rpartition(".")
        chosen = formats.get(module, "float") if leaf == "weight" else "float"
        if chosen == "float":
            yield key, merged_tensor(source, key, loras, device=device, dtype=dtype)
        else:
            yield from _quantized_weight(source, key, chosen, loras, device)
        done += sizes[key]
        if progress is not None:
            progress(done, total)


def _quantized_weight(
    source: TensorSource, key: str, chosen: Format, loras: LoRASet, device: torch.device | str
) -> Iterator[tuple[str, Tensor]]:
    weight = merged_tensor(source, key, loras, device=device, dtype=torch.float32)
    try:
        tensors = linear_classes()[chosen].quantize_weight(weight)
    except ValueError as error:
        names = [lora.name for lora, strength in loras if strength and key in lora.updates]
        if names:
            raise LoRAError(f"{key} with {', '.join(names)} cannot be quantised to {chosen}: {error}") from error
        raise CheckpointError(f"{source.describe()}: {key} cannot be quantised to {chosen}: {error}") from error
    for name, tensor in tensors.items():
        yield f"{key.removesuffix('weight')}{name}", tensor


def quantize(
    params: TransformerParams,
    source: TensorSource,
    formats: Mapping[str, Format],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    loras: LoRASet = (),
    progress: Progress | None = None,
) -> Transformer:
    """Quantise a transformer into memory; arguments and errors as for `quantized_tensors`."""
    module = quantized_transformer(params, formats, dtype=dtype)
    tensors = quantized_tensors(params, source, formats, dtype=dtype, device=device, loras=loras, progress=progress)
    for key, tensor in tensors:
        put(module, key, tensor)
    return module


def put(module: nn.Module, key: str, tensor: Tensor) -> None:
    """Place one tensor in a quantised transformer.

    Raises:
        ValueError: the model has no such tensor, or it has another shape or type.
    """
    path, _, name = key.rpartition(".")
    owner = module.get_submodule(path)
    present = getattr(owner, name, None)
    if not isinstance(present, Tensor):
        raise ValueError(f"the model has no tensor {key}")
    if present.shape != tensor.shape or present.dtype != tensor.dtype:
        raise ValueError(f"{key} must be {present.dtype} {list(present.shape)}, got {tensor.dtype} {list(tensor.shape)}")
    setattr(owner, name, tensor if isinstance(owner, QuantizedLinear) else nn.Parameter(tensor, requires_grad=False))
