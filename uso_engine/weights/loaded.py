"""A transformer in memory together with the pristine weights it came from, so that its LoRAs can be changed."""

from __future__ import annotations

from collections.abc import Sequence

from uso_engine.errors import CheckpointError
from uso_engine.model.transformer import Transformer

from .files.tensor_source import TensorSource
from .loading import Progress, remerge
from .lora.low_rank import LoRA


class LoadedTransformer:
    """A transformer with its weights, their source, and the LoRAs merged into them.

    Args:
        module: with weights in place, `configured` merged.
        source: the pristine weights, whose file stays open.
        configured: the LoRAs that the configuration names, USO's own among them.
    """

    def __init__(self, module: Transformer, source: TensorSource, configured: Sequence[tuple[LoRA, float]]) -> None:
        self.module = module
        self._source: TensorSource | None = source
        self._configured = tuple(configured)
        self._merged = self._configured

    @property
    def merged(self) -> tuple[tuple[LoRA, float], ...]:
        """LoRAs in the weights now, with their weights, in merging order."""
        return self._merged

    @property
    def configured_hashes(self) -> tuple[str | None, ...]:
        """SHA-256 of each LoRA that the configuration names."""
        return tuple(getattr(lora.name, "sha256", None) for lora, _ in self._configured)

    def set_loras(
        self, extra: Sequence[tuple[LoRA, float]], *, keep_configured: bool = True, progress: Progress | None = None
    ) -> tuple[str, ...]:
        """Merge other LoRAs, always from the pristine weights.

        Args:
            extra: what to merge besides the configured ones; an empty list takes all extra ones away.
            keep_configured: whether the configuration's LoRAs, USO's own among them, stay.
            progress: told the bytes done and the bytes to do.

        Returns:
            Keys of the weights that changed.

        Raises:
            LoRAError: a LoRA does not fit; the weights stay as they were.
            CheckpointError: the pristine weights can no longer be read.
        """
        if self._source is None:
            raise CheckpointError("this transformer was closed; its pristine weights are gone")
        wanted = (*(self._configured if keep_configured else ()), *extra)
        touched = remerge(self.module, self._source, self._merged, wanted, progress=progress)
        self._merged = wanted
        return touched

    def close(self) -> None:
        """Let go of the file with the pristine weights."""
        if self._source is not None:
            self._source.close()
            self._source = None
