"""A quantised transformer in memory, whose LoRAs are changed by quantising again from the originals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from uso_engine.model.transformer import Transformer
from uso_engine.precision.tiers import Format, TierName

from .files.tensor_source import TensorSource
from .loaded import LoadedTransformer, Originals
from .loading import Progress
from .lora import LoRASet
from .quantizing import check_quantizable, put, quantized_tensors


class LoadedQuantizedTransformer(LoadedTransformer):
    """A quantised transformer: LoRAs are merged into the originals of the layers that they change, which are quantised again.

    Args:
        module: with values in place, the configured LoRAs merged.
        tier: of its weights.
        originals: as for `LoadedTransformer`; a quantised file's are opened when LoRAs are changed.
        formats: of every matrix.
        configured_hashes: as for `LoadedTransformer`.
    """

    def __init__(
        self,
        module: Transformer,
        tier: TierName,
        originals: Originals | Callable[[], Originals],
        formats: Mapping[str, Format],
        *,
        configured_hashes: Sequence[str | None] | None = None,
    ) -> None:
        super().__init__(module, tier, originals, configured_hashes=configured_hashes)
        self._formats = dict(formats)

    def _merge(self, source: TensorSource, before: LoRASet, wanted: LoRASet, progress: Progress | None) -> tuple[str, ...]:
        check_quantizable(self.module.params, source, wanted)
        changed = {key for lora, _ in (*before, *wanted) for key in lora.updates}
        touched = tuple(key for key in source.keys() if key in changed)  # noqa: SIM118 - a source is not a mapping
        try:
            self._quantize(source, touched, wanted, progress)
        except BaseException:
            self._quantize(source, touched, before, None)
            raise
        return touched

    @torch.no_grad()
    def _quantize(self, source: TensorSource, keys: tuple[str, ...], loras: LoRASet, progress: Progress | None) -> None:
        embedder = self.module.img_in.weight
        tensors = quantized_tensors(
            self.module.params,
            source,
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
