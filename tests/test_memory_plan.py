"""Memory plans: sizes from meta tensors, phases against counted bytes, and layers that are streamed."""

from dataclasses import replace

import pytest
import torch
from live_bytes import LiveBytes
from random_models import SMALL, drawn_conditions, drawn_sequence, small_transformer
from torch import nn

from uso_engine.model.packing import PackedBatch
from uso_engine.model.params import TransformerParams
from uso_engine.offload.autoencoder_sizes import FLUX_DECODER, FLUX_ENCODER
from uso_engine.offload.phases import GIB, Choice, moved_bytes_of, repeated_bytes_of
from uso_engine.offload.plan import describe_plans, plan_memory
from uso_engine.offload.sizes import (
    ROW_WIDTHS,
    EngineSizes,
    PublicModels,
    RequestSize,
    public_engine_sizes,
    transformer_sizes,
)
from uso_engine.precision.tiers import QUANTIZED_TIERS, TextTierName, TierName
from uso_engine.precision.transformer import layer_formats
from uso_kernels.attention.dense import dense_attention_refuses

FLUX = TransformerParams()


@pytest.mark.parametrize(("sequences", "attention"), [(1, "chunked"), (3, "chunked"), (3, "dense")])
def test_activations_are_what_a_run_keeps_alive(sequences: int, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products take bfloat16 as it is, as a GPU's do, and attention has memory of its own, the same on every CPU."""
    if attention == "dense" and (reason := dense_attention_refuses(torch.bfloat16)):
        pytest.skip(reason)
    monkeypatch.setattr("uso_kernels.cpu.multiplies_bfloat16", lambda: True)
    module = small_transformer(dtype=torch.bfloat16)
    module.attention_backend = attention
    conditions = drawn_conditions(SMALL, seed=1, text=64, contents=((16, 16),))
    batch = PackedBatch.form([drawn_sequence(module, (16, 16), conditions)] * sequences)
    latents = torch.zeros(batch.output.rows, SMALL.in_channels, dtype=torch.bfloat16)
    modulation = torch.zeros(sequences, module.modulation_vectors, SMALL.hidden_size, dtype=torch.bfloat16)
    with torch.no_grad(), LiveBytes() as counted:
        module(batch, latents, modulation)
    widths = counted.peak / (2 * batch.joint.rows * SMALL.hidden_size)
    assert 0.7 * ROW_WIDTHS < widths <= 1.04 * ROW_WIDTHS


def test_autoencoder_activations_per_pixel() -> None:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        module = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    assert sum(parameter.numel() for parameter in module.parameters()) == PublicModels().autoencoder
    with torch.no_grad(), LiveBytes() as decoding:
        module.decode(torch.empty(1, 16, 128, 128, device="meta"))
    assert decoding.peak / 1024**2 == pytest.approx(FLUX_DECODER.whole, rel=0.02)
    with torch.no_grad(), LiveBytes() as encoding:
        module.encode(torch.empty(1, 3, 512, 512, device="meta"))
    assert encoding.peak / 512**2 == pytest.approx(FLUX_ENCODER.whole, rel=0.02)


def test_sizes_of_the_public_models() -> None:
    """Built on the meta device from the published configurations."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        SiglipVisionConfig,
        SiglipVisionModel,
        T5Config,
        T5EncoderModel,
        ViTConfig,
        ViTForImageClassification,
    )

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(
            d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=24, vocab_size=32128, feed_forward_proj="gated-gelu",
        ))  # fmt: skip
        clip = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
        vision = SiglipVisionModel(SiglipVisionConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
            image_size=384, patch_size=14,
        ))  # fmt: skip
        # The classifier has two labels, as a configuration has by default.
        safety = ViTForImageClassification(ViTConfig())
    sizes = PublicModels()
    matrices = [layer.weight for layer in t5.modules() if isinstance(layer, nn.Linear)]
    assert sorted(tuple(weight.shape) for weight in matrices) == sorted(sizes.t5_block_matrices * sizes.t5_blocks)
    block = sum(rows * columns for rows, columns in sizes.t5_block_matrices)
    assert count(t5) == sizes.t5_blocks * block + sizes.t5_others
    assert count(t5.encoder.block[1]) == block + sizes.t5_block_others
    assert (count(clip), count(clip.encoder.layers[0])) == (sizes.clip, sizes.clip_block)
    assert (count(vision), count(vision.encoder.layers[0])) == (sizes.vision, sizes.vision_block)
    assert count(safety) == sizes.safety


def flux(tier: TierName, text_encoder: TextTierName = "int8") -> EngineSizes:
    return public_engine_sizes(FLUX, layer_formats(FLUX, tier), text_encoder=text_encoder)


def test_sizes_of_the_transformer_add_up() -> None:
    whole = transformer_sizes(FLUX, layer_formats(FLUX, "bf16"))
    assert whole.total == 2 * 11_901_408_320
    assert sum(whole.modulation) == pytest.approx(2 * 3.247e9, rel=1e-3)
    assert (len(whole.double_blocks), len(whole.single_blocks), len(whole.modulation)) == (19, 38, 2 * 19 + 38 + 1)
    limits: dict[TierName, float] = {"fp8": 9.1e9, "int4": 4.9e9}
    for tier, most in limits.items():
        assert transformer_sizes(FLUX, layer_formats(FLUX, tier)).without_modulation <= most
    assert RequestSize().rows == 5824


@pytest.mark.parametrize("budget_gib", [24, 16, 12, 8])
@pytest.mark.parametrize("tier", QUANTIZED_TIERS)
def test_every_tier_has_a_plan_for_every_usual_card(tier: TierName, budget_gib: int) -> None:
    sizes = flux(tier)
    plan = plan_memory(budget_gib * GIB, sizes)
    assert plan.fits
    assert plan.peak_bytes <= budget_gib * GIB
    # Everything is somewhere, once.
    blocks = sum(sizes.transformer.double_blocks[i] for i in plan.streamed_double_blocks)
    blocks += sum(sizes.transformer.single_blocks[i] for i in plan.streamed_single_blocks)
    everything = sizes.transformer.total + sum(part.weight_bytes for part in sizes.components.values())
    assert sum(plan.resident.values()) + sum(plan.streamed.values()) + blocks == everything
    assert 37 not in plan.streamed_single_blocks
    if tier == "int4":
        assert not plan.streamed_single_blocks
    text = str(plan)
    assert f"budget {budget_gib}.0 GiB: fits" in text
    assert f"{plan.transfer_s:.1f} s" in text


def test_plans_get_better_with_the_budget() -> None:
    sizes = flux("fp8")
    plans = [plan_memory(budget * GIB, sizes) for budget in (8, 10, 12, 14, 16, 20, 24, 32, 80)]
    streamed = [len(plan.streamed_single_blocks) + len(plan.streamed_double_blocks) for plan in plans]
    assert streamed == sorted(streamed, reverse=True)
    assert plans[-1].streamed == {}
    assert (plans[-1].moved_bytes, plans[-1].decoding) == (0, "whole")


def test_strips_come_after_what_moves_once_and_before_what_moves_at_every_step() -> None:
    sizes, work = flux("int4"), RequestSize()
    found = {budget: plan_memory(budget * GIB, sizes) for budget in (12, 8)}
    assert (found[12].decoding, found[8].decoding) == ("whole", "strips")
    assert "T5" in found[12].streamed
    assert not any(plan.streamed_single_blocks or plan.streamed_double_blocks for plan in found.values())
    assert "autoencoder decodes in strips; pictures differ by rounding" in str(found[8])
    # What strips on the host move is weighed against what blocks move.
    host = Choice(frozenset(), decoding="host strips")
    assert repeated_bytes_of(host, sizes, work) == sizes.decoder.moved_bytes("host strips", 1024**2) > 0
    assert moved_bytes_of(host, sizes, replace(work, images=2)) == 2 * moved_bytes_of(host, sizes, work)


def test_a_plan_decodes_other_sizes_as_they_need_it() -> None:
    sizes = flux("fp8")
    plan = plan_memory(16 * GIB, sizes)
    works = [RequestSize(width=side, height=side) for side in (512, 1024, 1536, 2048)]
    assert [plan.decoding_for(sizes, work) for work in works] == ["whole", "whole", "strips", "host strips"]
    for work in works:
        assert plan.peak_for(sizes, work).peak_bytes <= plan.budget_bytes
        # Whether an image is cut, which its rounding depends on, is decided for one, however many there are.
        for images in (2, 4, 400):
            many = plan.decoding_for(sizes, replace(work, images=images))
            assert (many == "whole") == (plan.decoding_for(sizes, work) == "whole")
    assert plan.decoding_for(sizes, replace(works[2], images=100)) == "host strips"
    # A configuration that asks for strips gets them where there is room for the whole.
    asked = replace(sizes, strip_pixels=256**2)
    assert plan_memory(80 * GIB, asked).decoding == "strips"
    assert plan.decoding_for(asked, works[0]) == "strips"


def test_transfers_are_counted_per_step_and_per_style_image() -> None:
    sizes = flux("fp8")
    plan = plan_memory(8 * GIB, sizes)
    per_step = sum(sizes.transformer.single_blocks[i] for i in plan.streamed_single_blocks)
    per_step += sum(sizes.transformer.double_blocks[i] for i in plan.streamed_double_blocks)
    once = sum(plan.streamed.values())
    # The autoencoder comes twice: for the content image and for the result.
    twice = plan.streamed.get("autoencoder", 0)
    assert plan.moved_bytes == 28 * per_step + once + twice
    assert plan.transfer_s == pytest.approx(plan.moved_bytes / 25e9)
    assert plan_memory(8 * GIB, sizes, pcie_bytes_per_s=50e9).transfer_s == pytest.approx(plan.transfer_s / 2)
    more = plan_memory(8 * GIB, sizes, RequestSize(styles=2))
    assert more.fits and more.moved_bytes > plan.moved_bytes


def test_budget_too_small_says_why() -> None:
    plan = plan_memory(2 * GIB, flux("fp8"))
    assert not plan.fits
    text = str(plan)
    assert "budget 2.0 GiB: too small" in text
    assert "denoising needs" in text and "even with everything streamed" in text
    big = plan_memory(8 * GIB, flux("int4"), RequestSize(width=2048, height=2048, images=4, negative=True))
    assert [problem.split()[0] for problem in big.problems] == ["denoising"]
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="positive"):
            plan_memory(wrong, flux("int4"))


def test_description_has_a_plan_for_each_budget() -> None:
    text = describe_plans(flux("int4"), (24, 2))
    assert text.startswith("transformer 4.84 GB without modulation linears (3.25 GB); parts around it: the public models")
    assert "budget 24.0 GiB: fits" in text and "budget 2.0 GiB: too small" in text
