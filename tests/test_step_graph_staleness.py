"""What may change after a step was captured: no graph repeats a step as it was before.

The stand-in for capturing keeps what a CUDA graph keeps, the kernels that were chosen and the addresses that they read: a
repetition computes with the choices and the tensors of its capture, whatever the transformer has by then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from graphed_denoisers import counts, graphs_of, jobs_of, step_often
from random_models import SMALL, drawn_conditions, drawn_sequence, quantise, small_transformer
from repeated_capture import Repeated, Repeating
from simulated_streams import SimulatedStreams
from torch import Tensor, nn

from uso_engine.model.packing import PackedBatch
from uso_engine.model.run import Fusion
from uso_engine.model.side_stream import SideStream
from uso_engine.model.transformer import Transformer
from uso_engine.precision.int8_linear import Int8Linear
from uso_engine.sampling.denoiser import Denoiser
from uso_engine.sampling.step_graph import CaptureError, signature
from uso_engine.sampling.step_graphs import StepGraphs


class Frozen(Repeated):
    """A computation that is repeated with what the transformer had when it was captured."""

    def __init__(self, transformer: Transformer, compute: Callable[[], Tensor], velocity: Tensor) -> None:
        super().__init__(compute, velocity, 1, 0.0)
        self._transformer, self._choices = transformer, _choices(transformer)
        self._held = [(holder, dict(holder)) for module in transformer.modules() for holder in _holders(module)]

    def replay(self) -> None:
        now, held = _choices(self._transformer), [(holder, dict(holder)) for holder, _ in self._held]
        _choose(self._transformer, self._choices, self._held)
        try:
            super().replay()
        finally:
            _choose(self._transformer, now, held)


class Freezing(Repeating):
    """Captures what a transformer computes."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self._transformer = transformer

    def capture(self, compute: Callable[[], Tensor]) -> tuple[Repeated, Tensor]:
        _, velocity = super().capture(compute)
        self.captured[-1] = Frozen(self._transformer, compute, velocity)
        return self.captured[-1], velocity


Choices = tuple[str, Fusion, SideStream | None]
Holder = dict[str, object]


def _holders(module: nn.Module) -> list[Holder]:
    return [vars(module)[name] for name in ("_parameters", "_buffers", "_modules")]


def _choices(transformer: Transformer) -> Choices:
    return transformer.attention_backend, transformer.fusion, transformer.beside


def _choose(transformer: Transformer, choices: Choices, held: list[tuple[Holder, Holder]]) -> None:
    transformer.attention_backend, transformer.fusion, transformer.beside = choices
    for holder, entries in held:
        holder.clear()
        holder.update(entries)


def denoisers() -> tuple[Transformer, Denoiser, StepGraphs, Denoiser]:
    """A transformer, a denoiser with graphs and one without."""
    transformer = small_transformer()
    graphs = graphs_of(transformer, Freezing(transformer))
    return transformer, Denoiser(transformer, graphs), graphs, Denoiser(transformer)


def attend_otherwise(transformer: Transformer) -> None:
    transformer.attention_backend = "8bit"


def fuse_nothing(transformer: Transformer) -> None:
    transformer.fusion = Fusion(gelu=False, parts=False, values=False)


def go_beside(transformer: Transformer) -> None:
    transformer.beside = SideStream(torch.device("cpu"), SimulatedStreams())


def merge_in_place(transformer: Transformer) -> None:
    with torch.no_grad():
        transformer.get_parameter("double_blocks.0.img_mlp.0.weight").mul_(2)


def put_elsewhere(transformer: Transformer) -> None:
    layer = transformer.get_submodule("single_blocks.1.linear2")
    layer.weight = nn.Parameter(3 * layer.get_parameter("weight"), requires_grad=False)


def point_elsewhere(transformer: Transformer) -> None:
    weight = transformer.get_parameter("double_blocks.1.txt_mlp.2.weight")
    weight.data = weight.data * 3


def quantise_all(transformer: Transformer) -> None:
    quantise(transformer, Int8Linear)


CHANGES = [attend_otherwise, fuse_nothing, go_beside, merge_in_place, put_elsewhere, point_elsewhere, quantise_all]


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_in_the_next_step(change: Callable[[Transformer], None], after: int) -> None:
    """Before, at and after the step that is captured, which is the third; of requests that go on and of new ones."""
    transformer, denoiser, graphs, plain = denoisers()
    jobs, others = jobs_of(denoiser, steps=12), jobs_of(plain, steps=12)

    def agree(steps: int) -> None:
        for _ in range(steps):
            assert torch.equal(denoiser.step(jobs)[0], plain.step(others)[0])

    before = _choices(transformer)
    agree(after)
    change(transformer)
    agree(4)
    # What was chosen, back again.
    transformer.attention_backend, transformer.fusion, transformer.beside = before
    agree(1)
    jobs, others = jobs_of(denoiser, steps=4), jobs_of(plain, steps=4)
    agree(4)
    assert graphs.statistics().replayed > 0


def test_changes_are_seen_in_results() -> None:
    """Those that a stale graph would hide; for others it does not matter which graph is repeated."""
    seen = []
    for change in CHANGES:
        transformer, _, _, plain = denoisers()
        first = plain.step(jobs_of(plain))[0]
        change(transformer)
        if not torch.equal(plain.step(jobs_of(plain))[0], first):
            seen.append(change)
    assert set(seen) >= {attend_otherwise, merge_in_place, put_elsewhere, point_elsewhere, quantise_all}


def test_a_choice_has_graphs_of_its_own_and_finds_them_again() -> None:
    transformer, denoiser, graphs, _ = denoisers()
    jobs = jobs_of(denoiser, steps=16)
    for backend in ("auto", "8bit", "auto", "8bit"):
        transformer.attention_backend = backend
        for _ in range(4):
            denoiser.step(jobs)
    # Of each, two steps without, one that is captured, then repetitions.
    assert counts(graphs) == (2, 10, 4, 2)


@torch.no_grad()
def test_batches_of_one_signature_differ_in_nothing_that_a_graph_keeps() -> None:
    """Other sides of the pictures and another share of style tokens change what is copied in alone."""
    transformer, _, graphs, _ = denoisers()
    forms = [((4, 8), 28, 4, (4, 4)), ((8, 4), 24, 8, (2, 8)), ((2, 16), 30, 2, (8, 2)), ((4, 8), 28, 4, (4, 4))]
    found = set()
    for seed, (grid, text, style, content) in enumerate(forms):
        conditions = drawn_conditions(SMALL, seed=seed, text=text, style=style, contents=(content,))
        sequence = drawn_sequence(transformer, grid, conditions)
        batch = PackedBatch.form([sequence, replace(sequence, text=sequence.text + 1)])
        latents = torch.randn(batch.output.rows, 64, generator=torch.Generator().manual_seed(seed))
        modulation = torch.stack([sequence.modulation[0]] * 2)
        run = transformer.run_of(batch)
        found.add(signature(run, latents))
        for _ in range(4):
            assert torch.equal(graphs.evaluate(run, latents, modulation), transformer(batch, latents, modulation))
    assert len(found) == 1
    assert counts(graphs) == (1, 13, 2, 1)


@pytest.mark.parametrize("name", ["double_blocks.1", "single_blocks.0", "single_blocks.1"])
def test_a_hook_before_a_block_is_called_in_every_step(name: str) -> None:
    """A graph would repeat what it did when the step was captured."""
    transformer = small_transformer()
    seen: list[object] = []
    handle = transformer.get_submodule(name).register_forward_pre_hook(lambda *given: seen.append(given))
    graphs = graphs_of(transformer, Freezing(transformer), "auto")
    step_often(Denoiser(transformer, graphs), 0, 6)
    assert "hooks" in graphs.statistics().failures[0]
    assert graphs.statistics().captured == 0
    assert len(seen) >= 6
    with pytest.raises(CaptureError, match="hooks into the layers"):
        step_often(Denoiser(transformer, graphs_of(transformer, Freezing(transformer))), 0, 6)
    handle.remove()
    graphs = graphs_of(transformer, Freezing(transformer))
    denoiser = Denoiser(transformer, graphs)
    jobs = jobs_of(denoiser, steps=8)
    for _ in range(4):
        denoiser.step(jobs)
    assert graphs.statistics().replayed == 1
    seen.clear()
    transformer.get_submodule(name).register_forward_pre_hook(lambda *given: seen.append(given))
    denoiser.step(jobs)
    assert len(seen) == 1
