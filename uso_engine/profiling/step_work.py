"""How much work an engine's denoising steps were, counted while they are taken, and how near to the least time they came."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from uso_engine.model.packing import PackedBatch
from uso_engine.model.params import TransformerParams
from uso_engine.model.roofline import Rates, Tokens, floor_ms, step_flops
from uso_engine.model.run import Run
from uso_engine.model.transformer import Transformer


@dataclass
class StepWork:
    """Sequences that were evaluated.

    Args:
        params: of the transformer.
        sequences: how often a sequence of which lengths.
    """

    params: TransformerParams
    sequences: Counter[Tokens] = field(default_factory=Counter)

    @property
    def flops(self) -> float:
        """FLOPs of matrix products and attention of all of them."""
        return sum(count * step_flops(self.params, tokens) for tokens, count in self.sequences.items())

    def floor_ms(self, rates: Rates) -> float:
        """The least time of their products and attention."""
        return sum(count * floor_ms(self.params, tokens, rates)["floor"] for tokens, count in self.sequences.items())

    def speed(self, seconds: float, rates: Rates) -> str:
        """TFLOP/s, and the least time's part of the time taken.

        Args:
            seconds: that all of them took.
            rates: of the device; those of a GPU's table are of bfloat16.
        """
        if not self.sequences or seconds <= 0:
            return "no step was taken"
        share = self.floor_ms(rates) / (1e3 * seconds)
        return f"{self.flops / seconds / 1e12:.3g} TFLOP/s, {share:.0%} of the floor ({rates.source})"


@contextmanager
def counted_steps(transformer: Transformer) -> Iterator[StepWork]:
    """Count the sequences that a transformer evaluates within a `with` statement."""
    work = StepWork(transformer.params)

    def count(module: nn.Module, arguments: tuple[object, ...]) -> None:
        batch = arguments[0].batch if isinstance(arguments[0], Run) else arguments[0]
        assert isinstance(batch, PackedBatch)
        work.sequences.update(batch.tokens)

    hook = transformer.register_forward_pre_hook(count)
    try:
        yield work
    finally:
        hook.remove()
