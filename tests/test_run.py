"""What a batch's evaluations share serves the next one exactly where everything is what it was, and ends with the batch."""

import weakref
from collections.abc import Callable

import pytest
import torch
from random_models import SMALL, drawn_conditions, drawn_sequence, quantise, small_transformer
from torch import Tensor, nn

from uso_engine.model.linear import Linear
from uso_engine.model.packing import PackedBatch
from uso_engine.model.run import Fusion, Run
from uso_engine.model.transformer import Transformer
from uso_engine.precision.int8_linear import Int8Linear
from uso_engine.sampling.denoiser import Denoiser
from uso_engine.sampling.job import ImageJob
from uso_engine.sampling.latents import draw_noise

GRIDS = {"one sequence in order": [(4, 8)], "two with padding rows": [(3, 5), (4, 4)]}


def made(grids: list[tuple[int, int]]) -> tuple[Transformer, PackedBatch, Tensor, Tensor]:
    transformer = small_transformer()
    texts = [28] if len(grids) == 1 else [10, 17]
    sequences = [
        drawn_sequence(transformer, grid, drawn_conditions(SMALL, seed=seed, text=text, style=4))
        for seed, (grid, text) in enumerate(zip(grids, texts, strict=True))
    ]
    batch = PackedBatch.form(sequences)
    latents = torch.randn(batch.output.rows, 64, generator=torch.Generator().manual_seed(0))
    return transformer, batch, latents, torch.stack([sequence.modulation[0] for sequence in sequences])


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
@torch.no_grad()
def test_later_evaluations_have_the_first_ones_bits(grids: list[tuple[int, int]]) -> None:
    """Also with other contents in the same tensors, and nothing is overwritten."""
    transformer, batch, latents, modulation = made(grids)
    run = transformer.run_of(batch)
    kept = []
    for turn in range(3):
        expected = transformer(batch, latents, modulation)
        result = transformer(run, latents, modulation)
        kept.append((result, expected))
        assert run.begin(latents, modulation)
        latents = latents + 0.5
        modulation.mul_(1.0 + 0.1 * turn)
    assert all(torch.equal(result, expected) for result, expected in kept)
    assert not torch.equal(kept[0][0], kept[1][0])


def move_a_weight(transformer: Transformer) -> None:
    weight = transformer.get_parameter("single_blocks.0.linear1.weight")
    weight.data = 2 * weight.data


def replace_a_weight(transformer: Transformer) -> None:
    layer = transformer.get_submodule("double_blocks.1.img_attn.proj")
    layer.weight = nn.Parameter(2 * transformer.get_parameter("double_blocks.1.img_attn.proj.weight"), requires_grad=False)


def replace_a_layer(transformer: Transformer) -> None:
    layer = Linear(SMALL.hidden_size, SMALL.hidden_size)
    nn.init.normal_(layer.weight)
    layer.bias = None
    transformer.get_submodule("double_blocks.0.txt_attn").proj = layer


def move_a_norm(transformer: Transformer) -> None:
    transformer.get_parameter("single_blocks.1.norm.key_norm.scale").data = torch.full((SMALL.head_dim,), 3.0)


def hook_into_a_layer(transformer: Transformer) -> None:
    for name in ("single_blocks.0.linear1", "double_blocks.0.img_mlp.2"):
        transformer.get_submodule(name).register_forward_hook(lambda layer, given, result: 2 * result)


def hook_into_a_block(transformer: Transformer) -> None:
    def heavier(block: nn.Module, given: object) -> None:
        layer = block.get_submodule("linear1")
        layer.weight = nn.Parameter(1.5 * block.get_parameter("linear1.weight"), requires_grad=False)

    transformer.get_submodule("single_blocks.0").register_forward_pre_hook(heavier)


def merge_in_place(transformer: Transformer) -> None:
    transformer.get_parameter("double_blocks.0.img_mlp.0.weight").mul_(2)


def quantise_all(transformer: Transformer) -> None:
    quantise(transformer, Int8Linear)


def fuse_nothing(transformer: Transformer) -> None:
    transformer.fusion = Fusion(gelu=False, parts=False, values=False)


def attend_otherwise(transformer: Transformer) -> None:
    transformer.attention_backend = "chunked"


CHANGES = [
    move_a_weight,
    replace_a_weight,
    replace_a_layer,
    move_a_norm,
    hook_into_a_layer,
    hook_into_a_block,
    merge_in_place,
    quantise_all,
    fuse_nothing,
    attend_otherwise,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
@torch.no_grad()
def test_a_change_between_evaluations_is_seen(grids: list[tuple[int, int]], change: Callable[[Transformer], None]) -> None:
    transformer, batch, latents, modulation = made(grids)
    changed, *_ = made(grids)
    run = transformer.run_of(batch)
    before = [transformer(run, latents, modulation) for _ in range(2)]
    assert torch.equal(before[0], before[1])
    torch.manual_seed(0)
    change(transformer)
    torch.manual_seed(0)
    change(changed)
    for _ in range(2):
        result, expected = transformer(run, latents, modulation), changed(batch, latents, modulation)
        assert torch.equal(result, expected)
    if change not in (fuse_nothing, attend_otherwise):
        assert not torch.allclose(result, before[0], rtol=1e-3)


def test_autograd_and_other_layouts_are_prepared_for_anew() -> None:
    """Gradients of a batch in joint order among it, which writing values in place once lost."""
    transformer, batch, latents, modulation = made([(4, 8)])
    assert batch.is_in_order
    run = transformer.run_of(batch)
    with torch.no_grad():
        for _ in range(2):
            plain = transformer(run, latents, modulation)
    transformer.requires_grad_(True)
    result: Tensor = transformer(run, latents, modulation)
    result.square().sum().backward()
    weight = transformer.get_parameter("double_blocks.0.img_attn.proj.weight")
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    assert torch.allclose(result, plain, atol=1e-5)
    with torch.no_grad():
        transformer(run, latents, modulation)
        assert run.begin(latents, modulation)
        apart = torch.stack((modulation, modulation), dim=3)[..., 0]
        assert not run.begin(latents, apart)


@torch.no_grad()
def test_what_is_kept_of_a_batch_goes_with_its_jobs() -> None:
    """Without a collection of cycles: it may be gigabytes of a GPU."""
    for kind in (None, Int8Linear):
        transformer = small_transformer()
        if kind is not None:
            quantise(transformer, kind)
        denoiser = Denoiser(transformer)
        sequence = drawn_sequence(transformer, (3, 5), drawn_conditions(SMALL, seed=1, text=10))
        job = denoiser.begin(ImageJob(sequence, draw_noise(80, 48, 1), (1.0, 0.6, 0.3, 0.0)))
        for _ in range(2):
            denoiser.step([job])
        tables = denoiser.tables([job])
        gone: list[weakref.ref[object]] = [weakref.ref(x) for x in (tables.run, tables.modulation, tables.batch.cos)]
        del tables
        assert all(reference() is not None for reference in gone)
        denoiser.forget([job])
        assert [reference() for reference in gone] == [None] * 3


def test_a_run_by_default_fuses_all() -> None:
    transformer, batch, *_ = made([(4, 8)])
    assert (transformer.run_of(batch).attention, transformer.run_of(batch).fusion) == (Run(batch).attention, Run(batch).fusion)
