"""Images denoised together from the first step to the last, by themselves: for verification, benchmarks and research."""

from __future__ import annotations

from collections.abc import Sequence as Sequences

from torch import Tensor

from uso_engine.model.packing import PackedBatch
from uso_engine.model.transformer import Observer, Transformer

from .denoiser import Denoiser
from .job import ImageJob
from .step import OnStep, Step, show


class DenoisingRun:
    """Images on their way together.

    Args:
        transformer: the loaded model.
        images: what to denoise, all with the same number of steps; sizes, sigmas and scales may differ.
        reference_numerics: keep latents in the model's dtype and round every operation to it, as the authors do.

    Raises:
        ValueError: no images, different numbers of steps, or one whose parts do not fit.
    """

    def __init__(self, transformer: Transformer, images: Sequences[ImageJob], *, reference_numerics: bool = False) -> None:
        steps = {len(image.sigmas) - 1 for image in images}
        if len(steps) > 1:
            raise ValueError(f"all images of a run take the same number of steps, got {sorted(steps)}")
        self._transformer = transformer
        self._denoiser = Denoiser(transformer)
        self._jobs = [self._denoiser.begin(image, reference_numerics=reference_numerics) for image in images]
        self._tables = self._denoiser.tables(self._jobs)

    @property
    def index(self) -> int:
        """Steps taken."""
        return self._jobs[0].index

    @property
    def steps(self) -> int:
        """Denoising steps of this run."""
        return self._jobs[0].steps

    @property
    def batch(self) -> PackedBatch:
        """The packed batch: where each sequence's rows lie in observed tensors."""
        return self._tables.batch

    @property
    def tokens_per_step(self) -> int:
        """Transformer tokens of one step, padding not counted."""
        return sum(job.image.tokens for job in self._jobs)

    @property
    def attention_backends(self) -> tuple[str, ...]:
        """The attention backends that compute this batch."""
        return self._transformer.attention_backends(self.batch)

    def step(self, observer: Observer | None = None) -> Step:
        """Take one step.

        Args:
            observer: sees the transformer's intermediate tensors.

        Returns:
            What happened; its latents are the running ones.

        Raises:
            RuntimeError: all steps are taken.
        """
        return Step.taken(self._jobs, self._denoiser.step(self._jobs, observer))

    def run(self, on_step: OnStep | None = None, observer: Observer | None = None) -> None:
        """Take all steps; `observer` sees the first one only."""
        while self.index < self.steps:
            step = self.step(observer if self.index == 0 else None)
            if on_step is not None:
                show(step, on_step)
                if step.stopped:
                    return

    def latents(self) -> list[Tensor]:
        """Each image's latent, [16, h / 8, w / 8] in float32, on the model's device."""
        return [job.unpacked() for job in self._jobs]
