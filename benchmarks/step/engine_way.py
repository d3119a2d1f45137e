"""A denoising step computed the way the engine does: the last rungs of the ladder."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.workload import Inputs, conditions
from uso_engine.model.packing import PackedBatch
from uso_engine.model.run import Run
from uso_engine.model.transformer import Transformer
from uso_engine.sampling.admission import admit
from uso_engine.sampling.step_graph import Capturing, StepGraph

Evaluate = Callable[[], Tensor]
"""One evaluation of the transformer: [L_img, 64], the velocity."""


def engine_step(
    transformer: Transformer, inputs: Inputs, latents: Tensor, times: tuple[float, ...], attention: str
) -> Evaluate:
    """The engine's step on a batch that is formed and admitted."""
    run, rows, modulation = _formed(transformer, inputs, latents, times, attention)

    def evaluate() -> Tensor:
        transformer.attention_backend = attention
        velocity: Tensor = transformer(run, rows, modulation)
        return velocity[: len(latents)]

    return evaluate


def captured_step(
    transformer: Transformer, inputs: Inputs, latents: Tensor, times: tuple[float, ...], attention: str, capturing: Capturing
) -> Evaluate:
    """The same step as a CUDA graph, copies of its inputs and of its result included."""
    run, rows, modulation = _formed(transformer, inputs, latents, times, attention)
    graph = StepGraph(transformer, run, rows, modulation, capturing)
    return lambda: graph.evaluate(run, rows, modulation)[: len(latents)]


def _formed(
    transformer: Transformer, inputs: Inputs, latents: Tensor, times: tuple[float, ...], attention: str
) -> tuple[Run, Tensor, Tensor]:
    sequence = admit(transformer, conditions(inputs), inputs.grid, (*times, 0.0), inputs.guidance)
    batch = PackedBatch.form([sequence])
    rows = latents.new_zeros(batch.output.rows, latents.shape[1])
    rows[: len(latents)] = latents
    transformer.attention_backend = attention
    return transformer.run_of(batch), rows, sequence.modulation[:1]
