"""The text stream's work beside the image stream's: the same bits, and no memory that two streams use in no order.

The device is simulated (`simulated_streams.py`). Each rule of `uso_engine/model/side_stream.py` is broken here once, and found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphed_denoisers import counts, graphs_of, jobs_of
from parallel_threads import in_threads
from random_models import SMALL, drawn_conditions, drawn_sequence, quantise, small_transformer
from repeated_capture import Repeating
from simulated_streams import FIRST, SECOND, LateJoin, NoFork, NoJoin, RaceFinder, SimulatedStreams, StaleFork
from test_layer_stream import plan_with
from torch import Tensor, nn

from uso_engine.errors import BackendError
from uso_engine.model.packing import PackedBatch
from uso_engine.model.run import Fusion
from uso_engine.model.side_stream import SideStream, why_no_side_stream
from uso_engine.model.transformer import Observer, Transformer
from uso_engine.offload.layer_stream import place_transformer
from uso_engine.precision.fp8_linear import Fp8Linear
from uso_engine.precision.int8_linear import Int8Linear
from uso_engine.sampling.denoiser import Denoiser
from uso_engine.sampling.step_graph import signature
from uso_kernels.ragged import Ragged

CPU = torch.device("cpu")
IN_ORDER, MIXED = [(4, 8)], [(3, 5), (4, 4)]
"""One sequence in joint order, values in place; and two whose rows are mixed there."""


Made = tuple[Transformer, PackedBatch, Tensor, Tensor]


def made(grids: list[tuple[int, int]], kind: type[Any] | None = None, **changes: Any) -> Made:
    """A transformer, a batch, latents and modulation."""
    transformer = small_transformer()
    if kind is not None:
        quantise(transformer, kind)
    texts = [28] if len(grids) == 1 else [10, 17]
    sequences = [
        replace(drawn_sequence(transformer, grid, drawn_conditions(SMALL, seed=seed, text=text, style=4)), **changes)
        for seed, (grid, text) in enumerate(zip(grids, texts, strict=True))
    ]
    batch = PackedBatch.form(sequences)
    assert batch.is_in_order == (grids is IN_ORDER)
    latents = torch.randn(batch.output.rows, 64, generator=torch.Generator().manual_seed(0))
    return transformer, batch, latents, torch.stack([sequence.modulation[0] for sequence in sequences])


def unfused() -> Made:
    transformer, *rest = made(IN_ORDER)
    transformer.fusion = Fusion(gelu=False, parts=False, values=False)
    return transformer, *rest  # type: ignore[return-value]


def fresh() -> Tensor:
    return torch.ones(4)


def watched(
    transformer: Transformer,
    batch: PackedBatch,
    latents: Tensor,
    modulation: Tensor,
    streams: SimulatedStreams,
    observer: Observer | None = None,
) -> RaceFinder:
    """What a finder has seen of two evaluations, one after the other."""
    transformer.beside = SideStream(CPU, streams)
    run = transformer.run_of(batch)
    with RaceFinder(streams) as finder, torch.no_grad():
        for _ in range(2):
            transformer(run, latents, modulation, observer)
    return finder


CASES: dict[str, Callable[[], Made]] = {
    "in order": lambda: made(IN_ORDER),
    "mixed": lambda: made(MIXED),
    "int8, in order": lambda: made(IN_ORDER, Int8Linear),
    "fp8, mixed": lambda: made(MIXED, Fp8Linear),
    "merged text": lambda: made(IN_ORDER, merged=((3, 4),)),
    "nothing fused": unfused,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_bits_are_those_of_one_stream(case: Callable[[], Made]) -> None:
    """Also where blocks are prepared, which no mode may watch; switched on, off and on within a run."""
    transformer, batch, latents, modulation = case()
    expected = transformer(batch, latents, modulation)
    run = transformer.run_of(batch)
    beside = SideStream(CPU, SimulatedStreams())
    for choice in (beside, None, beside):
        transformer.beside = choice
        run = transformer.run_of(batch)
        for _ in range(2):
            assert torch.equal(transformer(run, latents, modulation), expected)
            assert run.begin(latents, modulation)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_no_memory_is_used_in_no_order(case: Callable[[], Made]) -> None:
    finder = watched(*case(), SimulatedStreams())
    assert finder.faults == []
    # Projection, norm and rotation; then three products, an activation where it is a pass of its own, two additions.
    assert finder.counts[SECOND] >= 2 * SMALL.depth * 7 and finder.counts[FIRST] > finder.counts[SECOND]


def test_the_second_streams_memory_is_what_the_documents_say() -> None:
    """While an MLP's second product is computed: the stream as it was with its norm, its sum, the hidden layer, the result."""
    transformer, batch, latents, modulation = made(IN_ORDER)
    finder = watched(transformer, batch, latents, modulation, SimulatedStreams())
    assert finder.peak[SECOND] == 8 * batch.text.rows * SMALL.hidden_size * 4


def test_an_observer_may_keep_and_let_go_of_what_it_sees() -> None:
    """It computes with tensors of both streams, and lets go of the last block's while this one's are computed with."""
    kept: dict[str, Tensor] = {}

    def observe(name: str, tensor: Tensor, layout: Ragged) -> None:
        stream = name.split(".")[-1]
        earlier = kept.pop(stream, None)
        kept[stream] = tensor if earlier is None or earlier.shape != tensor.shape else tensor - earlier

    assert watched(*made(IN_ORDER), SimulatedStreams(), observe).faults == []
    assert set(kept) >= {"txt", "img"}


@torch.no_grad()
def test_blocks_that_come_from_the_host_are_not_overwritten_while_they_are_read() -> None:
    transformer, batch, latents, modulation = made(IN_ORDER)
    expected = transformer(batch, latents, modulation)
    place_transformer(transformer, plan_with(streamed={}, streamed_double_blocks=(0, 1), streamed_single_blocks=(0, 1)), CPU)
    assert watched(transformer, batch, latents, modulation, SimulatedStreams()).faults == []
    assert torch.equal(transformer(batch, latents, modulation), expected)
    assert "overwrites what second reads" in "; ".join(watched(transformer, batch, latents, modulation, NoJoin()).faults)


SEEDED = {
    NoFork: "second: {} before first has written",
    StaleFork: "second: {} before first has written",
    NoJoin: "first: {} before second has written",
    LateJoin: "first: hands out memory that second still uses",
}


@pytest.mark.parametrize("grids", [IN_ORDER, MIXED], ids=["in order", "mixed"])
@pytest.mark.parametrize(("fault", "told"), SEEDED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_wait_that_is_missing_is_found(fault: type[SimulatedStreams], told: str, grids: list[tuple[int, int]]) -> None:
    before, after = told.split("{}") if "{}" in told else (told, told)
    faults = watched(*made(grids), fault()).faults
    assert any(text.startswith(before) and text.endswith(after) for text in faults), faults[:5]


@torch.no_grad()
def test_a_pair_keeps_what_everybody_else_has_let_go_of() -> None:
    """Another thread may be handed out memory of the first stream at any time."""
    streams = SimulatedStreams()

    def second(given: Tensor) -> Tensor:
        result = given + 1
        del given
        with streams.entered(streams.first):
            torch.ones(4)  # The other thread's.
        return result

    first, beside = SideStream(CPU, streams).pair(fresh, second, (), CPU)
    with RaceFinder(streams) as finder:
        held = [torch.ones(4)]
        first()
        result = beside(held.pop())
        assert torch.equal(result, torch.full((4,), 2.0))
    assert finder.faults == []


@torch.no_grad()
def test_work_that_fails_is_waited_for_and_leaves_the_first_stream_current() -> None:
    streams = SimulatedStreams()
    side = SideStream(CPU, streams)

    def failing(x: Tensor) -> Tensor:
        (x + 1).sum()
        raise RuntimeError("out of memory")

    first, beside = side.pair(fresh, failing, (), CPU)
    with RaceFinder(streams) as finder:
        x = torch.ones(4)
        first()
        with pytest.raises(RuntimeError, match="out of memory"):
            beside(x)
        assert streams.current() is streams.first
        assert streams.first.clock[SECOND] == streams.made[0].clock[SECOND] > 0
        del x
        torch.ones(4)
    assert finder.faults == []
    with pytest.raises(AssertionError, match="first function"):
        beside(torch.ones(4))


@torch.no_grad()
def test_processes_that_share_a_step_exchange_in_one_order() -> None:
    _, batch, latents, modulation = made(IN_ORDER)
    with in_threads(2, lambda rank: small_transformer()) as group:
        expected = group.transformer(batch, latents, modulation)

    def beside(rank: int) -> Transformer:
        made = small_transformer()
        made.beside = SideStream(CPU, SimulatedStreams())
        return made

    with in_threads(2, beside) as group:
        assert torch.equal(group.transformer(batch, latents, modulation), expected)
        finder = watched(group.transformer, batch, latents, modulation, SimulatedStreams())
        assert finder.faults == [] and finder.counts[SECOND] > 0


@torch.no_grad()
def test_graphs_are_of_either_way_and_have_the_same_bits() -> None:
    transformer, capturing = small_transformer(), Repeating()
    plain = Denoiser(transformer)
    expected = [plain.step(jobs)[0] for jobs in [jobs_of(plain)] for _ in range(6)]
    transformer.beside = SideStream(CPU, SimulatedStreams())
    denoiser = Denoiser(transformer, graphs := graphs_of(transformer, capturing))
    found = [denoiser.step(jobs)[0] for jobs in [jobs_of(denoiser)] for _ in range(6)]
    assert counts(graphs) == (1, 3, 2, 1)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    _, batch, latents, _ = made(IN_ORDER)
    beside = signature(transformer.run_of(batch), latents)
    transformer.beside = None
    assert signature(transformer.run_of(batch), latents) != beside


def test_switched_off_nothing_is_wrapped() -> None:
    transformer, batch, *_ = made(IN_ORDER)
    assert transformer.beside is None
    run, first, second = transformer.run_of(batch), object, type
    assert run.pair(first, second, ()) == (object, type)


def hook_into_text(transformer: Transformer) -> None:
    transformer.get_submodule("double_blocks.1.txt_mlp.0").register_forward_hook(lambda *given: None)


def hook_into_image(transformer: Transformer) -> None:
    transformer.get_submodule("double_blocks.0.img_attn.qkv").register_forward_pre_hook(lambda *given: None)


def move_the_stream(transformer: Transformer) -> None:
    transformer.beside = SideStream(torch.device("meta"), SimulatedStreams())


@pytest.mark.parametrize(
    ("change", "told"),
    [(hook_into_text, "has a hook"), (hook_into_image, "has a hook"), (move_the_stream, "stream is of meta")],
    ids=lambda value: getattr(value, "__name__", ""),
)
@torch.no_grad()
def test_what_cannot_go_beside_is_refused(change: Callable[[Transformer], None], told: str) -> None:
    """Also between two evaluations of one run; hooks of whole blocks see one order and may stay."""
    transformer, batch, latents, modulation = made(IN_ORDER)
    transformer.beside = SideStream(CPU, SimulatedStreams())
    seen: list[nn.Module] = []
    transformer.get_submodule("double_blocks.0").register_forward_hook(lambda block, *given: seen.append(block))
    transformer(run := transformer.run_of(batch), latents, modulation)
    assert len(seen) == 1
    change(transformer)
    with pytest.raises(ValueError, match=told):
        transformer(run, latents, modulation)


def test_autograd_and_devices_without_streams_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, batch, latents, modulation = made(IN_ORDER)
    transformer.beside = SideStream(CPU, SimulatedStreams())
    with pytest.raises(ValueError, match="no_grad"):
        transformer(batch, latents, modulation)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:0"):
        with pytest.raises(BackendError, match="PyTorch sees no GPU"):
            SideStream(torch.device(device))
    with pytest.raises(BackendError, match="a CPU has no streams"):
        SideStream(CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why_no_side_stream(torch.device("cuda")) is None
    # Tensors say which GPU they are on, so a stream of "cuda" alone would be nobody's.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert SideStream(torch.device("cuda"), SimulatedStreams()).device == torch.device("cuda", 1)
