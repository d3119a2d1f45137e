"""A denoising step computed the way the engine does: the last rungs of the ladder."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.workload import Inputs, conditions
from uso_engine.model.packing import PackedBatch
from uso_engine.model.transformer import Transformer
from uso_engine.sampling.admission import admit

Evaluate = Callable[[], Tensor]
"""One evaluation of the transformer: [L_img, 64], the velocity."""


def engine_step(
    transformer: Transformer, inputs: Inputs, latents: Tensor, times: tuple[float, ...], attention: str
) -> Evaluate:
    """The engine's step on a batch that is formed and admitted."""
    sequence = admit(transformer, conditions(inputs), inputs.grid, (*times, 0.0), inputs.guidance)
    batch = PackedBatch.form([sequence])
    rows = latents.new_zeros(batch.output.rows, latents.shape[1])
    rows[: len(latents)] = latents
    modulation = sequence.modulation[:1]
    transformer.attention_backend = attention
    run = transformer.run_of(batch)

    def evaluate() -> Tensor:
        transformer.attention_backend = attention
        velocity: Tensor = transformer(run, rows, modulation)
        return velocity[: len(latents)]

    return evaluate
