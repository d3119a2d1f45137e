"""A quantised transformer in memory, whose LoRAs can be changed by quantising again from the originals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from uso_engine.errors import CheckpointError
from uso_engine.model.transformer import Transformer
from uso_engine.precision.tiers import Format

from .files.tensor_source import TensorSource
from .loading import Progress
from .lora.low_rank import LoRA, LoRASet
from .quantizing import check_quantizable, put, quantized_tensors

Originals = Callable[[], tuple[TensorSource, LoRASet]]
"""Opens the pristine weights and the configured LoRAs, or raises an error that names what is missing."""


class LoadedQuantizedTransformer:
    """A quantised transformer and the way to its originals; stands where `LoadedTransformer` stands for floating point.

    Args:
        module: with values in place, the configured LoRAs merged.
        formats: of every matrix.
        originals: the open source and the configured LoRAs; or, where the transformer came from a quantised file, what opens
            them: called when LoRAs are changed, not before.
    """

    def __init__(
        self, module: Transformer, formats: Mapping[str, Format], originals: tuple[TensorSource, LoRASet] | Originals
    ) -> None:
        self.module = module
        self._formats = dict(formats)
        self._originals = originals
        self._opened = None if callable(originals) else originals
        self._merged: LoRASet | None = None

    @property
    def merged(self) -> tuple[tuple[LoRA, float], ...]:
        """LoRAs in the weights now, in merging order; opens the originals."""
        return tuple(self._open()[1] if self._merged is None else self._merged)

    def set_loras(
        self, extra: Sequence[tuple[LoRA, float]], *, keep_configured: bool = True, progress: Progress | None = None
    ) -> tuple[str, ...]:
        """Merge other LoRAs and quantise the layers that they change, always from the pristine weights.

        Args:
            extra: what to merge besides the configured ones; an empty list takes all extra ones away.
            keep_configured: whether the configuration's LoRAs, USO's own among them, stay.
            progress: told the bytes done and the bytes to do.

        Returns:
            Checkpoint keys of the weights that changed.

        Raises:
            MissingFileError: the weights that the quantised file was made from are not there; names them.
            CheckpointError: they are not the same any more.
            LoRAError: a LoRA does not fit; the weights stay as they were.
        """
        source, configured = self._open()
        before = self.merged
        wanted = (*(configured if keep_configured else ()), *extra)
        check_quantizable(self.module.params, source, wanted)
        changed = {key for lora, _ in (*before, *wanted) for key in lora.updates}
        touched = tuple(key for key in source.keys() if key in changed)  # noqa: SIM118 - a source is not a mapping
        try:
            self._quantize(touched, wanted, progress)
        except BaseException:
            self._quantize(touched, before, None)
            raise
        self._merged = wanted
        return touched

    def close(self) -> None:
        """Let go of the files with the pristine weights."""
        if self._opened is not None:
            self._opened[0].close()
            self._opened = None

    def _open(self) -> tuple[TensorSource, LoRASet]:
        if self._opened is None:
            if not callable(self._originals):
                raise CheckpointError("this transformer was closed; its pristine weights are gone")
            self._opened = self._originals()
        return self._opened

    @torch.no_grad()
    def _quantize(self, keys: tuple[str, ...], loras: LoRASet, progress: Progress | None) -> None:
        embedder = self.module.img_in.weight
        tensors = quantized_tensors(
            self.module.params,
            self._open()[0],
            self._formats,
            dtype=embedder.dtype,
            device=embedder.device,
            loras=loras,
            only=keys,
            progress=progress,
        )
        for key, tensor in tensors:
            # Computed where the model runs, kept where the old one lies: a streamed layer's must not pile up on the GPU.
            path, _, name = key.rpartition(".")
            put(self.module, key, tensor.to(getattr(self.module.get_submodule(path), name).device))
