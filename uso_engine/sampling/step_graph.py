"""A step of one batch signature as a CUDA graph: what the host does once is repeated by the device alone.

A graph repeats the same kernels on the same addresses. So it has a batch and inputs of its own: those of the step at hand are
copied into them, and the velocity is copied out, so that nothing that a caller holds is overwritten. Any batch of the same
lengths can use it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import fields, replace
from typing import Protocol

import torch
from torch import Tensor

from uso_engine.errors import BackendError
from uso_engine.model.packing import PackedBatch
from uso_engine.model.run import Layers, Run
from uso_engine.model.transformer import Transformer

_CONTENTS = ("text_tokens", "content_tokens", "cos", "sin")
"""What of a batch differs between batches of one signature; tables of rows and tiles follow from what that holds."""


class CaptureError(BackendError):
    """A step could not be captured as a CUDA graph; the message says why."""


class Captured(Protocol):
    """A captured computation."""

    @property
    def size_bytes(self) -> int:
        """Device memory that it keeps."""

    def replay(self) -> None:
        """Compute it again, on the current stream."""


class Capturing(Protocol):
    """What captures a computation; `uso_engine.sampling.cuda_capture.CudaCapturing` is the real one."""

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot capture what a device computes, or None."""

    def capture(self, compute: Callable[[], Tensor]) -> tuple[Captured, Tensor]:
        """Record what a computation queues, without computing it.

        Returns:
            What repeats it, and the tensor that a repetition fills.

        Raises:
            RuntimeError: something in it cannot be captured; memory among it (`torch.OutOfMemoryError`).
        """


def signature(run: Run, latents: Tensor) -> Hashable:
    """What batches agree in that can use the same graph: lengths of all sequences, which rows stand for several, type,
    attention, fusion, and whether work goes beside other work.

    Tier, device and weights are the engine's; a change of them makes a graph stale (`StepGraph.is_current`).
    """
    batch = run.batch
    lengths = batch.text.lengths, batch.image.lengths, batch.output.lengths
    return *lengths, batch.merged, latents.dtype, run.attention, run.fusion, run.beside is not None


class StepGraph:
    """A captured evaluation of a transformer.

    Args:
        transformer: whose weights the graph reads where they are.
        run: of a batch of the signature; it is copied.
        latents: [T_out, in_channels].
        modulation: [S, vectors, C].
        capturing: captures.

    Raises:
        CaptureError: it cannot be captured, a repetition has other bits than what was captured, or layers have hooks.
        torch.OutOfMemoryError: memory does not do.
    """

    def __init__(self, transformer: Transformer, run: Run, latents: Tensor, modulation: Tensor, capturing: Capturing) -> None:
        batch = run.batch
        copied = replace(batch, **{name: getattr(batch, name).clone() for name in _CONTENTS})
        self._run, self._latents, self._modulation = transformer.run_of(copied), latents.clone(), modulation.clone()
        self._ends = Layers(transformer.img_in), Layers(transformer.final_layer.linear)
        self._holds = weakref.ref(batch)

        def evaluate() -> Tensor:
            # Not by calling it: hooks of the whole are for every step, and not for a graph to repeat.
            return transformer.forward(self._run, self._latents, self._modulation)

        self.first_velocity: Tensor | None = evaluate()  # Compiles, and prepares what the captured evaluation then finds.
        try:
            self._captured, self._velocity = capturing.capture(evaluate)
            self._captured.replay()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureError(f"capturing a step failed: {error}") from error
        if not torch.equal(*(velocity.view(torch.uint8) for velocity in (self._velocity, self.first_velocity))):
            raise CaptureError("a repetition of the captured step has other bits than the step")
        blocks = (*transformer.double_blocks, *transformer.single_blocks)
        # A block whose hook may change its weights before each call is not prepared, so that nobody would look at it.
        if not (self.is_current and self._run.has_prepared(blocks)):
            raise CaptureError("somebody hooks into the layers, or watches their operations")
        own = (self._latents, self._modulation, *(getattr(copied, name) for name in _CONTENTS))
        self.size_bytes = self._captured.size_bytes + sum(tensor.nbytes for tensor in own)
        """Device memory that it keeps."""

    @property
    def is_current(self) -> bool:
        """Whether every layer is where the graph reads it. LoRAs merged in place are; replaced or moved weights are not."""
        return self._run.begin(self._latents, self._modulation) and all(layers.is_current for layers in self._ends)

    def evaluate(self, run: Run, latents: Tensor, modulation: Tensor) -> Tensor:
        """The velocity [T_out, in_channels] of a batch of the graph's signature; no later evaluation overwrites it."""
        if self._holds() is not run.batch:
            for name in _CONTENTS:
                getattr(self._run.batch, name).copy_(getattr(run.batch, name))
            self._holds = weakref.ref(run.batch)
        self._latents.copy_(latents)
        self._modulation.copy_(modulation)
        self._captured.replay()
        return self._velocity.clone()


assert set(_CONTENTS) < {entry.name for entry in fields(PackedBatch)}
