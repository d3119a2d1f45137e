"""Bringing weights into a module tensor by tensor, with LoRAs merged on the way.

A merged weight is round(float32(pristine) + sum of strength * change), a change being scale * up @ down or what another kind of
adapter has in its place. The sum is formed in float32, in an order that the changes decide and not the order of the LoRAs,
always from the pristine tensor of the source. Nothing is ever subtracted, so taking a LoRA away gives back the pristine bits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from uso_engine.errors import CheckpointError, LoRAError, USOError
from uso_engine.precision.finite import is_finite
from uso_engine.weights.files.key_report import bulleted, compare_shapes, summarise_keys
from uso_engine.weights.files.tensor_source import TensorSource, shapes_of
from uso_engine.weights.lora import LoRASet
from uso_engine.weights.lora.update import WeightUpdate, in_order_of_content

_LARGEST = torch.finfo(torch.float32).max

Progress = Callable[[int, int], None]
"""Called after each tensor with the bytes read so far and the bytes to read in all."""


def load_parameters(
    module: nn.Module,
    source: TensorSource,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    loras: LoRASet = (),
    progress: Progress | None = None,
) -> None:
    """Fill a module, usually one on the meta device, with the tensors of a source.

    Needs about one tensor of memory beyond the module's own. If anything goes wrong the module keeps what it had before.

    Args:
        module: its parameters and persistent buffers are replaced, floating-point ones without gradients.
        source: must have exactly the module's keys and shapes.
        device: where the parameters go.
        dtype: floating-point type of all of them; others keep their stored type.
        loras: merged before rounding, each with its strength; their order does not matter.
        progress: called after every tensor.

    Raises:
        ValueError: a strength is not finite.
        CheckpointError: keys are missing, left over or of another shape (all of them are listed), the file is damaged, or a
            tensor holds values that are not numbers.
        LoRAError: a LoRA does not fit, or its sum with a weight overflows.
    """
    slots = _slots(module)
    problems = compare_shapes({key: tuple(slot.tensor.shape) for key, slot in slots.items()}, shapes_of(source))
    if problems:
        raise CheckpointError(bulleted(f"{source.describe()} does not fit {type(module).__name__}", problems))
    recipes = _recipes(loras)
    _check_updates(recipes, {key: tuple(slot.tensor.shape) for key, slot in slots.items()})
    total = _bytes_to_read(source, slots)
    done = 0
    try:
        for key, slot in slots.items():
            slot.put(_merged(source, key, recipes.get(key, ()), device=device, dtype=dtype))
            done += _bytes_to_read(source, (key,))
            if progress is not None:
                progress(done, total)
    except BaseException:
        for slot in slots.values():
            slot.restore()
        raise


def merged_tensor(
    source: TensorSource, key: str, loras: LoRASet, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Tensor:
    """Read one pristine tensor and add the LoRAs' updates of it.

    Args:
        source: of pristine weights under canonical keys.
        key: the tensor.
        loras: each with its strength; their order does not matter.
        device: where the sum is formed, in float32, and where the result lies.
        dtype: what the result is rounded to; the stored type if not given.

    Returns:
        A tensor of the caller's own.

    Raises:
        CheckpointError: the tensor cannot be read, or holds values that are not numbers.
        LoRAError: an update does not fit the tensor, or the sum overflows.
    """
    recipe = _recipes(loras).get(key, ())
    _check_updates({key: recipe}, {key: source.shape(key)})
    return _merged(source, key, recipe, device=device, dtype=dtype)


def remerge(
    module: nn.Module, source: TensorSource, old_loras: LoRASet, new_loras: LoRASet, *, progress: Progress | None = None
) -> tuple[str, ...]:
    """Change the LoRAs of a loaded module: afterwards it is bit-identical to one freshly loaded with the new ones.

    Only tensors that either set changes are computed again. Everything is checked before the first one; should a later step
    fail all the same (the file is gone, no memory, an interrupt), the tensors changed so far are computed back.

    Args:
        module: loaded from ``source`` with ``old_loras``; its parameters keep their storage, type and device.
        source: the pristine weights.
        old_loras: what is merged now.
        new_loras: what shall be merged.
        progress: called after every tensor that is computed again.

    Returns:
        The keys that were computed again.

    Raises:
        ValueError: a strength is not finite, or the module has no plain parameter for a key.
        CheckpointError: the source can no longer be read.
        LoRAError: a LoRA does not fit, or its sum with a weight overflows.
    """
    old, new = _recipes(old_loras), _recipes(new_loras)
    touched = [key for key in {**old, **new} if not _same(old.get(key, ()), new.get(key, ()))]
    parameters = dict(module.named_parameters())
    _check_updates(new, {key: tuple(parameter.shape) for key, parameter in parameters.items()})
    plain = {
        key for key in touched if key in parameters and parameters[key].is_floating_point() and not parameters[key].is_meta
    }
    strange = [key for key in touched if key not in plain]
    if strange:
        raise ValueError(f"{type(module).__name__} has no loaded floating-point parameter for {summarise_keys(strange)}")
    held = set(source.keys())
    found = {key: source.shape(key) for key in touched if key in held}
    problems = compare_shapes({key: tuple(parameters[key].shape) for key in touched}, found)
    if problems:
        raise CheckpointError(bulleted(f"{source.describe()} does not fit {type(module).__name__}", problems))
    total, done = _bytes_to_read(source, touched), 0
    changed: list[str] = []
    try:
        for key in touched:
            parameter = parameters[key]
            value = _merged(source, key, new.get(key, ()), device=parameter.device, dtype=parameter.dtype)
            changed.append(key)
            _overwrite(parameter, value)
            done += _bytes_to_read(source, (key,))
            if progress is not None:
                progress(done, total)
    except BaseException:
        _compute_back(parameters, source, changed, old)
        raise
    return tuple(touched)


def _compute_back(
    parameters: Mapping[str, Tensor], source: TensorSource, changed: list[str], old: Mapping[str, _Recipe]
) -> None:
    for key in changed:
        parameter = parameters[key]
        try:
            value = _merged(source, key, old.get(key, ()), device=parameter.device, dtype=parameter.dtype)
        except USOError as error:
            raise CheckpointError(
                f"the LoRAs could not be changed, nor {key} be computed back: the model holds a mixture, load it again"
            ) from error
        _overwrite(parameter, value)


class _Term(NamedTuple):
    """One update of one tensor with the user's factor, and whose it is."""

    update: WeightUpdate
    strength: float
    name: str


_Recipe = tuple[_Term, ...]


def _recipes(loras: LoRASet) -> dict[str, _Recipe]:
    """For every changed key, what is added to it; a strength of zero adds nothing at all."""
    recipes: dict[str, _Recipe] = {}
    for lora, strength in loras:
        if not math.isfinite(strength):
            raise ValueError(f"the strength of {lora.name} must be a finite number, got {strength}")
        if strength == 0:
            continue
        for key, updates in lora.updates.items():
            if any(abs(strength * update.scale) > _LARGEST for update in updates):
                raise LoRAError(f"{lora.name} at strength {strength:g} overflows float32 at {key}")
            recipes[key] = recipes.get(key, ()) + tuple(_Term(update, float(strength), lora.name) for update in updates)
    return recipes


def _same(a: _Recipe, b: _Recipe) -> bool:
    return Counter((id(term.update), term.strength) for term in a) == Counter((id(term.update), term.strength) for term in b)


def _check_updates(recipes: Mapping[str, _Recipe], shapes: Mapping[str, tuple[int, ...]]) -> None:
    problems: dict[str, list[str]] = {}
    for key, recipe in recipes.items():
        for term in recipe:
            update = term.update
            shape = shapes.get(key)
            if shape is None:
                problems.setdefault(f"{term.name} changes weights that the model does not have", []).append(key)
            elif not _fits(update, shape):
                block = f"rows to {update.rows.stop} and columns to {update.columns.stop} of a weight of shape {list(shape)}"
                problems.setdefault(f"{term.name} changes {block}", []).append(key)
    if problems:
        lines = [f"{problem}: {summarise_keys(dict.fromkeys(keys))}" for problem, keys in problems.items()]
        raise LoRAError(bulleted("the LoRAs do not fit the model", lines))


def _fits(update: WeightUpdate, shape: tuple[int, ...]) -> bool:
    """Whether a block lies within a matrix, or within a vector taken as a matrix of one column."""
    rows, columns = (*shape, 1) if len(shape) == 1 else shape if len(shape) == 2 else (0, 0)
    return update.rows.stop <= rows and update.columns.stop <= columns


@torch.no_grad()
def _merged(
    source: TensorSource, key: str, recipe: _Recipe, *, device: torch.device | str, dtype: torch.dtype | None
) -> Tensor:
    value = source.read(key).to(device)
    stored = value.dtype
    if not stored.is_floating_point:
        if recipe:
            raise CheckpointError(f"{source.describe()}: {key} is {stored}, expected floating-point numbers")
        return value
    target = stored if dtype is None else dtype
    if not is_finite(value):
        raise CheckpointError(f"{source.describe()}: {key} holds values that are infinite or not a number")
    if recipe:
        value = value.to(torch.float32)
        matrix = value.unsqueeze(-1) if value.ndim == 1 else value
        pristine = matrix.clone() if any(term.update.needs_pristine for term in recipe) else None
        for update, strength, _ in in_order_of_content(recipe):
            update.add_to(matrix, strength, pristine)
    value = value.to(target)
    if (recipe or stored != target) and not is_finite(value):
        if recipe:
            names = ", ".join(dict.fromkeys(term.name for term in recipe))
            raise LoRAError(f"{key} with {names} overflows {target}; is the strength too large?")
        raise CheckpointError(f"{source.describe()}: {key} overflows when rounded from {stored} to {target}")
    return value


def _bytes_to_read(source: TensorSource, keys: Mapping[str, object] | tuple[str, ...] | list[str]) -> int:
    return sum(math.prod(source.shape(key)) * source.dtype(key).itemsize for key in keys)


@torch.no_grad()
def _overwrite(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)


class _Slot:
    """A place in a module that holds a parameter or a persistent buffer."""

    def __init__(self, owner: nn.Module, name: str, tensor: Tensor) -> None:
        self.owner = owner
        self.name = name
        self.tensor = tensor

    def put(self, value: Tensor) -> None:
        is_parameter = isinstance(self.tensor, nn.Parameter)
        setattr(self.owner, self.name, nn.Parameter(value, requires_grad=False) if is_parameter else value)

    def restore(self) -> None:
        setattr(self.owner, self.name, self.tensor)


def _slots(module: nn.Module) -> dict[str, _Slot]:
    slots: dict[str, _Slot] = {}
    for key in module.state_dict(keep_vars=True):
        path, _, name = key.rpartition(".")
        owner = module.get_submodule(path)
        slots[key] = _Slot(owner, name, getattr(owner, name))
    return slots
