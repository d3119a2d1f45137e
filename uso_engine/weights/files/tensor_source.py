"""A named set of tensors that are read one at a time, whatever they lie in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class TensorSource(Protocol):
    """Weights by key: names, shapes and types are known at once, values are read when asked for."""

    def keys(self) -> tuple[str, ...]:
        """Every key, in the source's own order."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        ...

    def dtype(self, key: str) -> torch.dtype:
        """Stored type of one tensor, without reading it."""
        ...

    def read(self, key: str) -> Tensor:
        """One tensor on the CPU in its stored type; a fresh, aligned copy that belongs to the caller."""
        ...

    def describe(self) -> str:
        """Where the tensors come from, for messages."""
        ...

    def close(self) -> None:
        """Let go of files; reading afterwards is a mistake."""
        ...


class MemorySource:
    """Tensors that are in memory already.

    Args:
        tensors: by key; a reader gets a copy.
        name: what messages call them.
    """

    def __init__(self, tensors: Mapping[str, Tensor], name: str = "tensors in memory") -> None:
        self._tensors = dict(tensors)
        self._name = name

    def keys(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def read(self, key: str) -> Tensor:
        return self._tensors[key].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    def describe(self) -> str:
        return self._name

    def close(self) -> None:
        self._tensors = {}


class RecipeSource:
    """Tensors that a function makes when they are read.

    Args:
        shapes: shape of every key.
        draw: makes one tensor from its key and shape.
        dtype: what the drawn values are rounded to.
        name: what messages call them.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        draw: Callable[[str, tuple[int, ...]], Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        name: str = "weights drawn by a recipe",
    ) -> None:
        self._shapes = {key: tuple(shape) for key, shape in shapes.items()}
        self._draw = draw
        self._dtype = dtype
        self._name = name

    def keys(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        return self._dtype

    def read(self, key: str) -> Tensor:
        tensor = self._draw(key, self._shapes[key])
        if tuple(tensor.shape) != self._shapes[key]:
            raise ValueError(f"the recipe drew {tuple(tensor.shape)} for {key}, expected {self._shapes[key]}")
        return tensor.to(self._dtype)

    def describe(self) -> str:
        return self._name

    def close(self) -> None:
        return None


class RenamedSource:
    """Some tensors of another source under other names.

    Args:
        base: where they lie; closed together with this view.
        names: new key to the base's key.
        name: what messages call the view; the base's own description if not given.
    """

    def __init__(self, base: TensorSource, names: Mapping[str, str], name: str | None = None) -> None:
        self._base = base
        self._names = dict(names)
        self._name = name

    def keys(self) -> tuple[str, ...]:
        return tuple(self._names)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._base.shape(self._names[key])

    def dtype(self, key: str) -> torch.dtype:
        return self._base.dtype(self._names[key])

    def read(self, key: str) -> Tensor:
        return self._base.read(self._names[key])

    def describe(self) -> str:
        return self._base.describe() if self._name is None else self._name

    def close(self) -> None:
        self._base.close()


def shapes_of(source: TensorSource) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a source, without reading any."""
    return {key: source.shape(key) for key in source.keys()}  # noqa: SIM118 - a source is not a mapping


def without_prefix(source: TensorSource, prefix: str, *, keys: Iterable[str] | None = None) -> RenamedSource:
    """View the keys that begin with ``prefix`` without it; the others are not in the view.

    Args:
        source: any source.
        prefix: what the keys lose, ``""`` for nothing.
        keys: the keys to look at; all of the source's if not given.
    """
    chosen = source.keys() if keys is None else keys
    return RenamedSource(source, {key[len(prefix) :]: key for key in chosen if key.startswith(prefix)})
