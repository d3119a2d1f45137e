"""The transformer against diffusers' own, and what its parts promise."""

import pytest
import torch
from random_models import SIGMAS, SMALL, drawn_conditions, drawn_sequence, small_transformer
from torch import Tensor

from benchmarks.step.against_diffusers import TimeProjection
from uso_engine.model.modulation import sinusoidal_embedding
from uso_engine.model.packing import PackedBatch
from uso_engine.model.params import TransformerParams
from uso_engine.model.transformer import Transformer
from uso_engine.sampling.latents import draw_noise, pack_latent
from uso_engine.verification.measure import relative_error
from uso_engine.weights.diffusers_keys import diffusers_pieces, diffusers_shapes
from uso_kernels.ragged import Ragged


def diffusers_state(transformer: Transformer) -> dict[str, Tensor]:
    """The transformer's weights under diffusers' names, cut by our key map."""
    ours = transformer.state_dict()
    state = {name: torch.full(shape, float("nan")) for name, shape in diffusers_shapes(transformer.params).items()}
    for key, pieces in diffusers_pieces(transformer.params).items():
        for piece in pieces:
            target = state[piece.name]
            target[piece.source_row : piece.source_row + piece.rows] = ours[key][piece.row : piece.row + piece.rows]
    return state


@pytest.mark.parametrize("guidance_embed", [True, False])
@pytest.mark.parametrize("size", [(96, 64), (80, 48)])
def test_text_only_agrees_with_diffusers(guidance_embed: bool, size: tuple[int, int]) -> None:
    from diffusers import FluxTransformer2DModel

    params = TransformerParams(
        vec_in_dim=24, context_in_dim=32, hidden_size=128, num_heads=2, depth=2, depth_single_blocks=3,
        axes_dim=(16, 24, 24), guidance_embed=guidance_embed,
    )  # fmt: skip
    transformer = small_transformer(params)
    theirs = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=24, guidance_embeds=guidance_embed, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    theirs.load_state_dict(diffusers_state(transformer))
    theirs.time_text_embed.time_proj = TimeProjection()
    width, height = size
    rows, columns = height // 16, width // 16
    conditions = drawn_conditions(params, seed=1, text=21)
    noise = draw_noise(width, height, 3)
    image_ids = torch.zeros(rows, columns, 3)
    image_ids[..., 1] += torch.arange(rows)[:, None]
    image_ids[..., 2] += torch.arange(columns)[None, :]
    for index, sigma in enumerate(SIGMAS[:-1]):
        with torch.no_grad():
            expected = theirs.eval()(
                hidden_states=pack_latent(noise)[None],
                encoder_hidden_states=conditions.text[None],
                pooled_projections=conditions.pooled[None],
                timestep=torch.tensor([sigma]),
                guidance=torch.tensor([4.0]) if guidance_embed else None,
                img_ids=image_ids.view(-1, 3),
                txt_ids=torch.zeros(21, 3),
            ).sample[0]
        sequence = drawn_sequence(transformer, (rows, columns), conditions)
        batch = PackedBatch.form([sequence])
        latents = torch.zeros(batch.output.rows, 64)
        latents[batch.output.span(0)] = pack_latent(noise)
        velocity = transformer(batch, latents, sequence.modulation[index][None])[batch.output.span(0)]
        assert relative_error(velocity, expected) < 5e-6


def test_observer_sees_every_block_in_its_own_layout() -> None:
    transformer = small_transformer()
    sequence = drawn_sequence(transformer, (3, 5), drawn_conditions(SMALL, seed=2, text=10, style=4, contents=((4, 2),)))
    batch = PackedBatch.form([sequence])
    seen: dict[str, tuple[int, Ragged]] = {}

    def observe(name: str, tensor: Tensor, layout: Ragged) -> None:
        seen[name] = (len(tensor), layout)

    transformer(batch, torch.zeros(batch.output.rows, 64), sequence.modulation[:1], observe)
    expected = {
        "double.0.txt": batch.text, "double.0.img": batch.image, "double.1.txt": batch.text, "double.1.img": batch.image,
        "single.0": batch.joint, "single.1": batch.output, "velocity": batch.output,
    }  # fmt: skip
    assert {name: layout for name, (_, layout) in seen.items()} == expected
    assert all(rows == layout.rows for rows, layout in seen.values())


def test_modulation_table_has_one_row_per_step_and_vector() -> None:
    transformer = small_transformer()
    pooled = torch.randn(SMALL.vec_in_dim)
    times, guidance = torch.tensor([1.0, 0.5]), torch.full((2,), 4.0)
    table = transformer.modulation_table(times, guidance, pooled)
    assert table.shape == (2, 12 * SMALL.depth + 3 * SMALL.depth_single_blocks + 2, SMALL.hidden_size)
    assert not torch.equal(table, transformer.modulation_table(times, guidance + 1, pooled))
    assert not torch.equal(table, transformer.modulation_table(times, guidance, pooled + 1))
    assert not torch.equal(table[0], table[1])


def test_time_is_embedded_in_the_precision_it_comes_in() -> None:
    time = torch.tensor([0.9773])
    exact, rounded = sinusoidal_embedding(time), sinusoidal_embedding(time.to(torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    # 977.3 against bfloat16's 976: the fastest frequency has gone on by more than a radian.
    assert abs(float(exact[0, 0]) - float(rounded[0, 0])) > 0.1


def test_gradients_flow_to_every_weight() -> None:
    transformer = small_transformer()
    transformer.requires_grad_(True)
    sequence = drawn_sequence(transformer, (2, 2), drawn_conditions(SMALL, seed=3, text=5))
    batch = PackedBatch.form([sequence])
    conditions = drawn_conditions(SMALL, seed=3, text=5)
    table = transformer.modulation_table(torch.tensor([0.5]), torch.tensor([4.0]), conditions.pooled)
    transformer(batch, torch.randn(batch.output.rows, 64), table).square().sum().backward()
    # txt_in is used at admission only, which keeps no graph.
    without = [name for name, p in transformer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    last_text = f"double_blocks.{SMALL.depth - 1}.txt"
    assert [name for name in without if not name.startswith(("txt_in", last_text))] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 130}, "not a multiple of num_heads"),
        ({"axes_dim": (16, 24, 22)}, "must add up to the head dimension 64"),
        ({"axes_dim": (17, 23, 24)}, "must be even"),
        ({"axes_dim": (32, 32)}, "at least 3 axes"),
        ({"in_channels": 66}, "not a multiple of 4"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(change: dict[str, int], message: str) -> None:
    sizes = {"hidden_size": 128, "num_heads": 2, "axes_dim": (16, 24, 24), **change}
    if change == {"hidden_size": 130}:
        sizes["num_heads"] = 4
    with pytest.raises(ValueError, match=message):
        TransformerParams(**sizes)  # type: ignore[arg-type]
