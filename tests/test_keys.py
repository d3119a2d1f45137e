"""Rows that stand for several: attention sees them as often, in every backend, tier and company, alone and shared."""

from collections.abc import Sequence as Sequences
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from kernel_runs import require_interpreter
from live_bytes import LiveBytes
from parallel_threads import in_threads
from random_models import SIGMAS, SMALL, drawn_conditions, drawn_sequence, quantise, small_transformer
from torch import Tensor

from uso_engine.conditioning.text_padding import FARTHEST, group_padding, merge_padding
from uso_engine.model.keys import Keys
from uso_engine.model.packing import PackedBatch
from uso_engine.model.roofline import step_flops
from uso_engine.model.sequence import Sequence
from uso_engine.model.transformer import Transformer
from uso_engine.precision.int8_linear import Int8Linear
from uso_engine.sampling.job import ImageJob
from uso_engine.sampling.latents import draw_noise
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.step_graph import signature
from uso_engine.verification.measure import relative_error
from uso_kernels.ragged import Ragged

OWN, PADDING = 5, 14


def padded(padding: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Text rows of a small model, the last of which are padding."""
    own = drawn_conditions(SMALL, seed=seed, text=OWN).text
    return own, torch.cat((own, padding))


def rows_around(centres: int, spread: float, seed: int = 0) -> Tensor:
    """PADDING rows, each near one of some centres, in turn."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, SMALL.context_in_dim, generator=generator)
    noise = torch.randn(PADDING, SMALL.context_in_dim, generator=generator)
    return middle[torch.arange(PADDING) % centres] + spread * noise


def kept_and_merged(
    transformer: Transformer, padding: Tensor, *, seed: int = 0, farthest: float = FARTHEST, bare: bool = False
) -> tuple[Sequence, Sequence]:
    """A sequence with style, content and all of its padding, and the same with merged padding."""
    conditions = drawn_conditions(SMALL, seed=seed, text=OWN, style=0 if bare else 4, contents=() if bare else ((4, 2),))
    _, text = padded(padding, seed)
    merged = merge_padding(text, PADDING, group_padding(text, PADDING, farthest))
    grid = (4, 4) if bare else (3, 5)
    all_rows = replace(conditions, text=text)
    fewer = replace(conditions, text=merged.tokens, merged=merged.merged)
    return drawn_sequence(transformer, grid, all_rows), drawn_sequence(transformer, grid, fewer)


def velocities(transformer: Transformer, sequences: Sequences[Sequence]) -> list[Tensor]:
    """Of each sequence in one step."""
    batch = PackedBatch.form(sequences)
    latents = torch.zeros(batch.output.rows, SMALL.in_channels, dtype=sequences[0].text.dtype)
    for i in range(len(sequences)):
        drawn = torch.randn(batch.output.lengths[i], SMALL.in_channels, generator=torch.Generator().manual_seed(7))
        latents[batch.output.span(i)] = drawn.to(latents.dtype)
    with torch.no_grad():
        found = transformer(batch, latents, torch.stack([sequence.modulation[1] for sequence in sequences]))
    return [found[batch.output.span(i)] for i in range(len(sequences))]


@pytest.mark.parametrize("backend", ["auto", "dense", "chunked", "triton"])
@pytest.mark.parametrize("bare", [False, True], ids=["padded", "aligned"])
def test_equal_rows_are_one_row_without_loss(backend: str, bare: bool) -> None:
    """With the key as often as the row; without, the velocity is another."""
    if backend == "triton":
        require_interpreter()
    transformer = small_transformer()
    transformer.attention_backend = backend
    kept, merged = kept_and_merged(transformer, rows_around(2, 0.0), bare=bare)
    assert merged.length == kept.length - PADDING + 2
    (truth,) = velocities(transformer, [kept])
    (found,) = velocities(transformer, [merged])
    assert relative_error(found, truth) < 2e-6
    assert relative_error(velocities(transformer, [replace(merged, merged=())])[0], truth) > 1e-3


def test_equal_rows_are_one_row_in_eight_bits() -> None:
    transformer = small_transformer(dtype=torch.bfloat16)
    quantise(transformer, Int8Linear)
    kept, merged = kept_and_merged(transformer, rows_around(2, 0.0))
    (truth,), (found,) = velocities(transformer, [kept]), velocities(transformer, [merged])
    assert relative_error(found.float(), truth.float()) < 2e-2


def test_the_loss_grows_with_the_square_of_the_spread() -> None:
    transformer = small_transformer()
    errors = []
    for spread in (0.02, 0.04, 0.08):
        kept, merged = kept_and_merged(transformer, rows_around(1, spread), farthest=1.0)
        assert merged.text_length == kept.text_length - PADDING + 1
        errors.append(relative_error(velocities(transformer, [merged])[0], velocities(transformer, [kept])[0]))
    assert all(3 < larger / smaller < 5 for smaller, larger in pairwise(errors)), errors


def jobs_of(transformer: Transformer) -> list[ImageJob]:
    """Images with merged padding and without, with and without a negative prompt."""
    first, second = (kept_and_merged(transformer, rows_around(3, 0.01, seed), seed=seed) for seed in (1, 2))
    other = kept_and_merged(transformer, rows_around(2, 0.0), seed=4, bare=True)
    noise = draw_noise(80, 48, 3)
    return [
        ImageJob(first[1], noise, SIGMAS),
        ImageJob(second[1], noise, SIGMAS, first[1], 2.0),
        ImageJob(second[0], noise, SIGMAS, first[1], 2.0),
        ImageJob(other[1], draw_noise(64, 64, 4), SIGMAS),
        ImageJob(other[0], draw_noise(64, 64, 4), SIGMAS),
    ]


def latents(transformer: Transformer, jobs: list[ImageJob]) -> list[Tensor]:
    run = DenoisingRun(transformer, jobs)
    run.run()
    return run.latents()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_company_does_not_change_a_bit(dtype: torch.dtype) -> None:
    transformer = small_transformer(dtype=dtype)
    jobs = jobs_of(transformer)
    alone = [latents(transformer, [job])[0] for job in jobs]
    for order in ([0, 1, 2, 3, 4], [3, 0], [2, 1, 1], [4, 3, 0]):
        together = latents(transformer, [jobs[i] for i in order])
        for place, i in enumerate(order):
            assert torch.equal(together[place], alone[i]), f"image {i} differs in the company {order}"


@pytest.mark.parametrize("count", [1, 2])
def test_processes_that_share_a_step_copy_keys_behind_the_exchange(count: int) -> None:
    alone = small_transformer()
    sequences = [kept_and_merged(alone, rows_around(3, 0.01, seed), seed=seed)[1] for seed in range(count)]
    truth = velocities(alone, sequences)
    with in_threads(2, lambda rank: small_transformer()) as group:
        for mine, expected in zip(velocities(group.transformer, sequences), truth, strict=True):
            assert relative_error(mine, expected) < 5e-6


def test_keys_are_the_sequences_rows_then_copies() -> None:
    joint = Ragged.pack([20, 17])
    keys = Keys.of(joint, (((3, 2), (5, 4)), ()))
    assert keys.layout.lengths == (24, 17)
    assert keys.sources is not None
    assert keys.sources[:24].tolist() == [*range(20), 3, 5, 5, 5]
    assert keys.sources[keys.layout.span(1)].tolist() == list(range(32, 49))
    same = Keys.of(joint, ((), ()))
    assert same.sources is None and same.layout is joint


def test_a_step_is_counted_with_its_copies() -> None:
    transformer = small_transformer()
    kept, merged = kept_and_merged(transformer, rows_around(1, 0.0))
    flops, signatures = [], []
    for sequence in (kept, merged):
        batch = PackedBatch.form([sequence])
        values = torch.zeros(batch.output.rows, SMALL.in_channels)
        run = transformer.run_of(batch)
        flops.append(step_flops(SMALL, batch.tokens[0]))
        signatures.append(signature(run, values))
    assert batch.tokens[0].copies == PADDING - 1
    assert batch.tokens[0].keys == kept.length
    assert flops[1] < flops[0]
    # A graph of a batch whose other rows stand for several would attend to the wrong ones.
    moved = replace(merged, merged=((merged.merged[0][0] - 1, PADDING),))
    run = transformer.run_of(PackedBatch.form([moved]))
    assert signature(run, values) != signatures[1]


@torch.no_grad()
def test_copies_keep_no_more_alive_than_a_step_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keys and values were made of is let go of before attention begins; a copied row costs itself alone."""
    monkeypatch.setattr("uso_kernels.cpu.multiplies_bfloat16", lambda: True)
    transformer = small_transformer(dtype=torch.bfloat16)
    transformer.attention_backend = "dense"
    plain = drawn_sequence(transformer, (16, 16), drawn_conditions(SMALL, seed=1, text=64))
    peaks = []
    for sequence in (plain, replace(plain, merged=((3, 2),))):
        batch = PackedBatch.form([sequence])
        values = torch.zeros(batch.output.rows, SMALL.in_channels, dtype=torch.bfloat16)
        run = transformer.run_of(batch)
        transformer(run, values, sequence.modulation[:1])
        with LiveBytes() as counted:
            transformer(run, values, sequence.modulation[:1])
        peaks.append(counted.peak)
    assert peaks[1] <= peaks[0] + 2 * 16 * 2 * SMALL.hidden_size


@pytest.mark.parametrize("merged", [((40, 2),), ((3, 1),), ((3, 2), (2, 2)), ((-1, 2),)], ids=str)
def test_merged_rows_that_cannot_be_are_refused(merged: tuple[tuple[int, int], ...]) -> None:
    sequence, _ = kept_and_merged(small_transformer(), rows_around(2, 0.0))
    with pytest.raises(ValueError, match="merged rows must rise, be among the 23 of text and stand for 2 or more"):
        replace(sequence, merged=merged)
