"""What 8-bit attention does to a step, a picture and their verification."""

import pytest
import torch
from random_models import drawn_conditions, drawn_sequence, small_transformer
from torch import Tensor

from benchmarks.tiers import attention as attention_losses
from uso_engine import GenerationRequest, USOEngine
from uso_engine.comparison.image_metrics import psnr
from uso_engine.model.packing import PackedBatch
from uso_engine.precision.tiers import TIERS
from uso_engine.verification.measure import FLOAT32_BOUND, LOSSY_ATTENTION_BOUND, bound_for, relative_error
from uso_kernels.ragged import Ragged

# The largest error seen, doubled: a block adds to what came before it.
BOUND = 0.008


@torch.no_grad()
def test_error_per_block_and_of_the_velocity() -> None:
    """On the small model with random weights, whose attention is about even: what 8 bits add to a step in float32."""
    transformer = small_transformer()
    conditions = drawn_conditions(transformer.params, seed=1, text=30, style=8, contents=((8, 12),))
    sequence = drawn_sequence(transformer, (12, 10), conditions)
    batch = PackedBatch.form([sequence])
    latents = torch.randn(batch.output.rows, 64, generator=torch.Generator().manual_seed(0))
    found: list[dict[str, Tensor]] = []
    for backend in ("dense", "8bit"):
        transformer.attention_backend = backend
        seen: dict[str, Tensor] = {}
        assert transformer.attention_backends(batch) == (backend,)

        def observe(name: str, tensor: Tensor, layout: Ragged, seen: dict[str, Tensor] = seen) -> None:
            seen[name] = tensor.clone()

        transformer(batch, latents, sequence.modulation[0][None], observer=observe)
        found.append(seen)
    errors = {name: relative_error(found[1][name], found[0][name]) for name in found[0]}
    assert len(errors) == transformer.params.depth * 2 + transformer.params.depth_single_blocks + 1
    assert all(0 < error < BOUND for error in errors.values()), errors


def test_a_picture_of_the_trained_model(engine: USOEngine) -> None:
    """Who asked for it is told so, and nobody sees it: at 45 dB a colour is off by 1.4 of 255 on average."""
    request = GenerationRequest(prompt="a red ball on a beach", seed=3, num_inference_steps=8)
    with USOEngine.from_config("uso-tiny", device="cpu", attention="8bit", dtype=torch.float32) as lossy:
        result = lossy.generate(request)
    assert result.attention == ("8bit",)
    assert result.parameters["attention"] == ["8bit"]
    assert 45 < psnr(result.images[0], engine.generate(request).images[0]) < 99


def test_losses_are_measured_beside_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_losses, "WAYS", (("dense", 3), ("dense", 2), ("8bit", 3)))
    found = list(attention_losses.losses(2))
    assert [(r["tier"], r["attention"], r["steps"]) for r in found] == [
        (tier, *way) for tier in ("bf16", "fp8") for way in attention_losses.WAYS
    ]
    assert [r["to_tier_db"] == 99 for r in found] == [True, False, False] * 2
    assert [r["to_bf16_db"] == 99 for r in found] == [True] + [False] * 5


def test_verification_allows_more_where_attention_is_lossy() -> None:
    """Of what attention has a part in, and only there."""
    assert bound_for("velocity.0", "fp8", 3, "8bit") == TIERS["fp8"].velocity_bound + LOSSY_ATTENTION_BOUND
    assert bound_for("latents.3", "float32", 3, "8bit") == FLOAT32_BOUND + LOSSY_ATTENTION_BOUND
    assert bound_for("double.0.img", "float32", 3, "8bit") is None
    for name in ("noise", "style_tokens.0"):
        assert bound_for(name, "float32", 3, "8bit") == FLOAT32_BOUND
    assert bound_for("double.0.img", "float32", 3, "triton") == FLOAT32_BOUND
