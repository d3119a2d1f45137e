"""The training's batched forward is the engine's packed forward."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from training.batched import condition, make_rotary, predict_velocity
from training.transformer import shift_times
from uso_engine.model.packing import PackedBatch
from uso_engine.model.params import TransformerParams
from uso_engine.model.sequence import Sequence
from uso_engine.model.transformer import Transformer
from uso_engine.sampling.schedule import schedule

PARAMS = TransformerParams(
    in_channels=16,
    vec_in_dim=8,
    context_in_dim=12,
    hidden_size=32,
    mlp_ratio=3.0,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 6, 6),
)
GRID = (4, 4)


def build_model() -> Transformer:
    generator = torch.Generator().manual_seed(0)
    model = Transformer(PARAMS)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def packed_velocity(
    model: Transformer,
    latents: Tensor,
    times: Tensor,
    pooled: Tensor,
    text: Tensor,
    content: Tensor | None,
    style: Tensor | None,
) -> Tensor:
    sequences = []
    for i in range(len(latents)):
        tokens = model.embed_text(text[i])
        tokens = tokens if style is None else torch.cat((style[i], tokens))
        reference = tokens.new_zeros(0, PARAMS.hidden_size) if content is None else model.embed_latents(content[i])
        cos, sin = make_rotary(model, len(tokens), GRID, 0 if content is None else 1)
        table = model.modulation_table(times[i : i + 1], torch.tensor([3.0]), pooled[i])
        sequences.append(Sequence(tokens, reference, GRID, cos, sin, table))
    batch = PackedBatch.form(sequences)
    output = model(batch, latents.flatten(0, 1), torch.stack([sequence.modulation[0] for sequence in sequences]))
    return torch.stack([output[batch.output.span(i)] for i in range(len(latents))])


def test_batched_and_packed_velocities_agree_for_every_mixture_of_references() -> None:
    model = build_model()
    generator = torch.Generator().manual_seed(1)
    latents, reference = torch.randn(2, 3, 16, 16, generator=generator)
    times, pooled = torch.rand(3, generator=generator), torch.randn(3, 8, generator=generator)
    text, tokens = torch.randn(3, 7, 12, generator=generator), torch.randn(3, 6, 32, generator=generator)
    for content in (None, reference):
        for style in (None, tokens):
            with torch.no_grad():
                expected = packed_velocity(model, latents, times, pooled, text, content, style)
                rotary = make_rotary(model, 7 + (0 if style is None else 6), GRID, 0 if content is None else 1)
                activated = condition(model, times, torch.full((3,), 3.0), pooled)
                actual = predict_velocity(model, latents, activated, text, content, rotary, style)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_every_parameter_gets_a_gradient() -> None:
    model = build_model().requires_grad_(True)
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 16, 16, generator=generator)
    activated = condition(model, torch.rand(2), torch.ones(2), torch.randn(2, 8, generator=generator))
    rotary = make_rotary(model, 5, GRID, 1)
    text = torch.randn(2, 5, 12, generator=generator)
    predict_velocity(model, latents, activated, text, latents, rotary).square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    # The last double block's text MLP feeds the single blocks, so nothing is left out.
    assert without == []


def test_training_times_are_the_engines_sigmas() -> None:
    evenly = torch.linspace(1, 0, 29)
    torch.testing.assert_close(shift_times(evenly), torch.tensor(schedule(28, 128, 128)), rtol=1e-5, atol=1e-6)
    assert all(a > b for a, b in pairwise(shift_times(evenly).tolist()))
