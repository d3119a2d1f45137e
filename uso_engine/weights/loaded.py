"""A transformer in memory and the pristine weights that it came from, so that its LoRAs can be changed."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

from uso_engine.errors import CheckpointError
from uso_engine.model.transformer import Transformer
from uso_engine.precision.tiers import TierName

from .files.tensor_source import TensorSource
from .loading import Progress, remerge
from .lora import LoRA, LoRASet

Originals = tuple[TensorSource, LoRASet]
"""The pristine weights, whose file is open, and the LoRAs that the configuration names, USO's own among them."""


class LoadedTransformer(abc.ABC):
    """A transformer with its weights, whose LoRAs can be changed: always from the pristine weights, all of them or none.

    Args:
        module: with weights in place, the configured LoRAs merged.
        tier: of its weights.
        originals: what it came from; or what opens them, or raises an error that names what is missing: called when LoRAs are
            changed, not before.
        configured_hashes: SHA-256 of each LoRA that the configuration names; by default what the opened originals say.
    """

    def __init__(
        self,
        module: Transformer,
        tier: TierName,
        originals: Originals | Callable[[], Originals],
        *,
        configured_hashes: Sequence[str | None] | None = None,
    ) -> None:
        self.module = module
        self.tier = tier
        self._originals = originals
        self._opened = None if callable(originals) else originals
        self._merged: LoRASet | None = None
        if configured_hashes is None:
            configured = () if self._opened is None else self._opened[1]
            configured_hashes = [getattr(lora.name, "sha256", None) for lora, _ in configured]
        self.configured_hashes = tuple(configured_hashes)
        self._closed = False

    @property
    def merged(self) -> tuple[tuple[LoRA, float], ...]:
        """LoRAs in the weights now, with their weights, in merging order; opens the originals."""
        return tuple(self._open()[1] if self._merged is None else self._merged)

    def set_loras(
        self, extra: Sequence[tuple[LoRA, float]], *, keep_configured: bool = True, progress: Progress | None = None
    ) -> tuple[str, ...]:
        """Merge other LoRAs, always from the pristine weights.

        Args:
            extra: what to merge besides the configured ones; an empty list takes all extra ones away.
            keep_configured: whether the configuration's LoRAs, USO's own among them, stay.
            progress: told the bytes done and the bytes to do.

        Returns:
            Checkpoint keys of the weights that changed.

        Raises:
            LoRAError: a LoRA does not fit; the weights stay as they were.
            MissingFileError: the weights that a quantised file was made from are not there; names them.
            CheckpointError: they are not the same any more or can no longer be read, or the transformer was closed.
        """
        source, configured = self._open()
        wanted = (*(configured if keep_configured else ()), *extra)
        touched = self._merge(source, self.merged, wanted, progress)
        self._merged = wanted
        return touched

    def close(self) -> None:
        """Let go of the files with the pristine weights. A second call does nothing."""
        self._closed = True
        if self._opened is not None:
            self._opened[0].close()
            self._opened = None

    @abc.abstractmethod
    def _merge(self, source: TensorSource, before: LoRASet, wanted: LoRASet, progress: Progress | None) -> tuple[str, ...]:
        """Put the wanted LoRAs into the weights in the place of those before, and say which weights changed; or change none."""

    def _open(self) -> Originals:
        if self._closed:
            raise CheckpointError("this transformer was closed; its pristine weights are gone")
        if self._opened is None:
            assert callable(self._originals)
            self._opened = self._originals()
        return self._opened


class LoadedFloatTransformer(LoadedTransformer):
    """A transformer in floating point: LoRAs are added to its weights."""

    def _merge(self, source: TensorSource, before: LoRASet, wanted: LoRASet, progress: Progress | None) -> tuple[str, ...]:
        return remerge(self.module, source, before, wanted, progress=progress)
