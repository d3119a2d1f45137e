"""What only a GPU can show of the quantised tiers: products on its tensor cores, and streamed layers within their memory."""

from dataclasses import replace

import pytest
import torch
from random_models import drawn_conditions, drawn_sequence

from uso_engine.model.packing import PackedBatch
from uso_engine.model.params import TransformerParams
from uso_engine.offload.layer_stream import place_transformer
from uso_engine.offload.phases import GIB, MODULATION
from uso_engine.offload.plan import plan_memory
from uso_engine.offload.sizes import public_engine_sizes, transformer_sizes
from uso_engine.precision.tiers import Format, linear_classes, tiers_of_gpu
from uso_engine.precision.transformer import layer_formats
from uso_engine.verification.measure import relative_error
from uso_engine.weights.model_shapes import transformer_shapes
from uso_engine.weights.quantizing import quantize
from uso_engine.weights.recipe import recipe_source

pytestmark = pytest.mark.gpu

WIDE = TransformerParams(depth=2, depth_single_blocks=4)


@pytest.mark.parametrize("kind", list(linear_classes()))
@pytest.mark.parametrize(("rows", "outputs"), [(704, 9216), (5824, 3072), (33, 3072)])
def test_gpu_multiplies_what_the_cpu_multiplies(kind: Format, rows: int, outputs: int) -> None:
    if kind == "fp8" and "fp8" not in tiers_of_gpu(torch.cuda.get_device_capability()):
        pytest.skip("no fp8 units")
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(outputs, 3072, generator=generator) / 3072**0.5
    x = torch.randn(rows, 3072, generator=generator).bfloat16() + 0.3
    bias = torch.randn(outputs, generator=generator).bfloat16()
    layer = linear_classes()[kind](3072, outputs, device="meta")
    layer.assign({**linear_classes()[kind].quantize_weight(weight), "bias": bias})
    expected = layer(x[:64])
    on_gpu = layer.to("cuda")
    # Two bf16 roundings apart at most, and fp8's sums are kept in fewer bits on some GPUs.
    assert relative_error(on_gpu(x.cuda())[:64].cpu(), expected) < 5e-3
    part = slice(outputs // 3, None)
    assert relative_error(on_gpu(x.cuda(), part)[:64].cpu(), expected[:, part]) < 5e-3


def test_streamed_transformer_stays_within_its_plan() -> None:
    source = recipe_source(transformer_shapes(WIDE))
    formats = layer_formats(WIDE, "int8")
    conditions = drawn_conditions(WIDE, seed=1, text=512, style=192, contents=((64, 64),))
    sizes = transformer_sizes(WIDE, formats)
    plan = replace(
        plan_memory(80 * GIB, public_engine_sizes(WIDE, formats)),
        streamed={MODULATION: sum(sizes.modulation)},
        streamed_double_blocks=(0, 1),
        streamed_single_blocks=(0, 1, 2),
    )
    answers = []
    for streamed in (False, True):
        module = quantize(WIDE, source, formats)
        if streamed:
            streams = place_transformer(module, plan, "cuda")
        else:
            module.to("cuda")
        torch.cuda.empty_cache()
        sequence = drawn_sequence(module, (64, 64), conditions)
        batch = PackedBatch.form([sequence])
        latents = torch.randn(batch.output.rows, 64, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
        torch.cuda.reset_peak_memory_stats()
        answers.append([module(batch, latents, sequence.modulation[step][None]).cpu() for step in range(3)])
        peak = torch.cuda.max_memory_allocated()
        del module
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    buffers = 2 * max(*sizes.double_blocks, *sizes.single_blocks[:3])
    activations = 2 * sizes.row_widths * batch.joint.rows * WIDE.hidden_size + sizes.scratch
    fixed = sizes.always + sizes.single_blocks[3] + sequence.modulation.nbytes + (64 << 20)
    assert peak <= fixed + buffers + activations
    streams["blocks"].release()
    assert streams["blocks"].device_bytes == 0
