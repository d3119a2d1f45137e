"""A step computed by several processes is the step of one: same velocity within rounding, bits independent of company."""

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from parallel_threads import in_threads
from random_models import SMALL, drawn_conditions, drawn_sequence, quantise, small_transformer
from torch import Tensor

from uso_engine.errors import ParallelError
from uso_engine.model import block_layers
from uso_engine.model.packing import PackedBatch
from uso_engine.model.params import TransformerParams
from uso_engine.model.sequence import Sequence
from uso_engine.model.transformer import Transformer
from uso_engine.parallel.group import Arriving, Group
from uso_engine.parallel.shares import divide, share_of
from uso_engine.precision.int8_linear import Int8Linear
from uso_engine.verification.measure import relative_error
from uso_kernels.ragged import Ragged

FOUR_HEADS = replace(SMALL, hidden_size=256, num_heads=4)
# Text, style, grid, content: shares of whole tiles, and others; content, text or image that some have none of.
SHAPES = ((64, 0, (8, 8), ()), (21, 4, (3, 5), ((4, 2),)), (10, 4, (6, 4), ((4, 6), (2, 2))), (1, 0, (1, 2), ()))


def drawn(
    transformer: Transformer, shape: tuple[int, int, tuple[int, int], tuple[tuple[int, int], ...]], seed: int
) -> Sequence:
    text, style, grid, contents = shape
    return drawn_sequence(
        transformer, grid, drawn_conditions(transformer.params, seed=seed, text=text, style=style, contents=contents)
    )


def batch_of(transformer: Transformer, shapes: tuple[int, ...]) -> tuple[PackedBatch, Tensor, Tensor]:
    """A batch of sequences, its latents, and its modulation at the second step."""
    sequences = [drawn(transformer, SHAPES[index], seed=index) for index in shapes]
    batch = PackedBatch.form(sequences)
    latents = torch.zeros(batch.output.rows, transformer.params.in_channels)
    for i, index in enumerate(shapes):
        generator = torch.Generator().manual_seed(100 + index)
        latents[batch.output.span(i)] = torch.randn(
            batch.output.lengths[i], latents.shape[1], generator=generator, dtype=torch.float32
        )
    return batch, latents, torch.stack([sequence.modulation[1] for sequence in sequences])


@pytest.mark.parametrize("count", [0, 1, 5, 16, 63, 64, 100, 512, 4096])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_every_row_is_somebodys(count: int, size: int) -> None:
    shares = divide(count, size)
    assert len(shares) == size
    assert [row for share in shares for row in range(share.start, share.stop)] == list(range(count))
    if count >= size:
        assert all(share.stop > share.start for share in shares)
    if count % (16 * size) == 0:
        assert {share.stop - share.start for share in shares} == {count // size}


@pytest.mark.parametrize("size", [2, 3])
def test_shares_lead_to_the_whole_and_back(size: int) -> None:
    """Rows of all shares, brought into the whole's order, are the whole's; and what a share takes of the whole is its own."""
    transformer = small_transformer()
    batch, _, _ = batch_of(transformer, (0, 1, 2, 3))
    shares = [share_of(batch, rank, size) for rank in range(size)]
    for name in ("text", "image", "joint", "output"):
        whole: Ragged = getattr(batch, name)
        marks = torch.full((whole.rows,), -1.0)
        for i in range(len(whole)):
            marks[whole.span(i)] = 1000.0 * i + torch.arange(whole.lengths[i])
        order = getattr(shares[0], name)
        pieces = [marks[order.of(rank)] for rank in range(size)]
        back = torch.cat(pieces)[order.from_shares]
        for i in range(len(whole)):
            assert torch.equal(back[whole.span(i)], marks[whole.span(i)])
        for rank, piece in enumerate(pieces):
            layout: Ragged = getattr(shares[rank].batch, name)
            assert len(piece) == layout.rows == order.rows[rank]
            for i in range(len(layout)):
                assert bool((piece[layout.span(i)] // 1000 == i).all())
    assert torch.equal(
        torch.cat([s.batch.text_tokens[s.batch.text.span(0)] for s in shares]), batch.text_tokens[batch.text.span(0)]
    )


@pytest.mark.parametrize(("params", "size"), [(SMALL, 2), (FOUR_HEADS, 4)], ids=["2", "4"])
@pytest.mark.parametrize("shapes", [(0,), (1,), (2, 3, 0, 1)], ids=str)
def test_the_velocity_is_that_of_one_process(params: TransformerParams, size: int, shapes: tuple[int, ...]) -> None:
    alone = small_transformer(params)
    batch, latents, modulation = batch_of(alone, shapes)
    seen: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    truth = alone(batch, latents, modulation, lambda name, x, layout: expected.update({name: tokens(x, layout)}))
    with in_threads(size, lambda rank: small_transformer(params)) as group:
        for _ in range(2):  # The second time the others know the batch.
            velocity = group.transformer(
                batch, latents, modulation, lambda name, x, layout: seen.update({name: tokens(x, layout)})
            )
            assert relative_error(tokens(velocity, batch.output), tokens(truth, batch.output)) < 5e-6
    assert seen.keys() == expected.keys()
    for name, x in expected.items():
        assert relative_error(seen[name], x) < 5e-6, name


def test_rows_travel_while_a_single_block_computes_its_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first process's thread: sent, then the hidden layer, then waited for; the last block sends queries apart."""
    seen: list[str] = []
    here = threading.current_thread()

    def saying(word: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def said(*args: Any) -> Any:
            if threading.current_thread() is here:
                seen.append(word)
            return function(*args)

        return said

    prepared = block_layers.prepare_hidden
    monkeypatch.setattr(Group, "begin_all_to_all", saying("sent", Group.begin_all_to_all))
    monkeypatch.setattr(Arriving, "wait", saying("came", Arriving.wait))
    monkeypatch.setattr(block_layers, "prepare_hidden", lambda *args: saying("hidden", prepared(*args)))
    with in_threads(2, lambda rank: small_transformer()) as group:
        seen.clear()
        group.transformer(*batch_of(group.transformer, (0,)))
    heads, back = ["sent", "came"], ["sent", "came"]
    double = SMALL.depth * [*heads, *back]
    single = (SMALL.depth_single_blocks - 1) * ["sent", "hidden", "came", *back]
    last = ["sent", "sent", "hidden", "came", "came", *back]
    assert seen == [*double, *single, *last, *back]


def tokens(x: Tensor, layout: Ragged) -> Tensor:
    return x.clone() if layout.token_rows is None else x.index_select(0, layout.token_rows)


def test_company_does_not_change_bits() -> None:
    with in_threads(2, lambda rank: small_transformer()) as group:
        together, latents, modulation = batch_of(group.transformer, (2, 0, 1))
        velocity = group.transformer(together, latents, modulation)
        for i, index in enumerate((2, 0, 1)):
            alone = batch_of(group.transformer, (index,))
            result = group.transformer(*alone)
            assert torch.equal(result[alone[0].output.span(0)], velocity[together.output.span(i)])


def test_a_neighbours_nan_stays_with_the_neighbour() -> None:
    with in_threads(2, lambda rank: small_transformer()) as group:
        batch, latents, modulation = batch_of(group.transformer, (0, 1))
        expected = group.transformer(batch, latents, modulation)[batch.output.span(1)].clone()
        latents[batch.output.span(0)] = float("nan")
        velocity = group.transformer(batch, latents, modulation)
        assert torch.equal(velocity[batch.output.span(1)], expected)
        assert velocity[batch.output.span(0)].isnan().all()


def test_quantised_rows_are_shared_as_well() -> None:
    def make(rank: int) -> Transformer:
        transformer = small_transformer(dtype=torch.bfloat16)
        quantise(transformer, Int8Linear)
        return transformer

    alone = make(0)
    batch, latents, modulation = batch_of(alone, (1, 2))
    latents = latents.bfloat16()
    truth = alone(batch, latents, modulation)
    with in_threads(2, make) as group:
        velocity = group.transformer(batch, latents, modulation)
    assert relative_error(tokens(velocity, batch.output), tokens(truth, batch.output)) < 2e-2


def test_batches_that_are_gone_are_forgotten() -> None:
    with in_threads(2, lambda rank: small_transformer()) as group:
        for seed in itertools.chain(range(3), range(2)):
            batch, latents, modulation = batch_of(group.transformer, (seed,))
            group.transformer(batch, latents, modulation)
            assert len(group.leader._batches) <= 2
            del batch


def test_other_weights_are_refused_everywhere() -> None:
    with (
        pytest.raises(ParallelError, match="cannot compute together: process 1 has another weights"),
        in_threads(2, lambda rank: small_transformer(salt=str(rank))),
    ):
        raise AssertionError("it must not begin")


def test_a_process_that_ends_ends_all_and_says_so() -> None:
    """Its share is never computed: the first process learns it from the channel, and every later step says the same."""

    transformer_of = {rank: small_transformer() for rank in range(2)}
    with in_threads(2, transformer_of.__getitem__, step_timeout_s=3) as group:
        batch = batch_of(transformer_of[0], (0,))
        transformer_of[1].get_submodule("single_blocks.0.linear1").weight = torch.nn.Parameter(
            torch.zeros(1, 1), requires_grad=False
        )
        with pytest.raises(ParallelError, match=r"process 0 of 2 lost the others.*process 1"):
            group.transformer(*batch)
        with pytest.raises(ParallelError, match="have ended"):
            group.transformer(*batch)
        assert 1 in group.errors
