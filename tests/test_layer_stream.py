"""Layers and parts that live on the host and run from buffers: the same answers, and everything back in its place."""

from dataclasses import replace

import pytest
import torch
from random_models import SMALL, drawn_conditions, drawn_sequence, small_transformer
from torch import nn

from uso_engine.model.packing import PackedBatch
from uso_engine.offload.host_copy import HostCopy
from uso_engine.offload.layer_stream import LayerStream, place_transformer
from uso_engine.offload.phases import GIB, MODULATION
from uso_engine.offload.plan import MemoryPlan, plan_memory
from uso_engine.offload.sizes import public_engine_sizes
from uso_engine.offload.streamed_part import StreamedPart
from uso_engine.precision.transformer import layer_formats


def plan_with(**changes: object) -> MemoryPlan:
    plan = plan_memory(80 * GIB, public_engine_sizes(SMALL, layer_formats(SMALL, "bf16")))
    return replace(plan, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("modulation", [False, True])
def test_streamed_transformer_computes_the_same(blocks: bool, modulation: bool) -> None:
    params = replace(SMALL, depth=2, depth_single_blocks=4)
    module, same = small_transformer(params), small_transformer(params)
    conditions = drawn_conditions(params, seed=1, text=16)
    latents = torch.randn(16, params.in_channels)
    plan = plan_with(
        streamed={MODULATION: 1} if modulation else {},
        streamed_double_blocks=(1,) if blocks else (),
        streamed_single_blocks=(0, 2) if blocks else (),
    )
    streams = place_transformer(module, plan, "cpu")
    assert set(streams) == {name for name, used in (("blocks", blocks), (MODULATION, modulation)) if used}
    answers = []
    for transformer in (same, module):
        sequence = drawn_sequence(transformer, (4, 4), conditions)
        batch = PackedBatch.form([sequence])
        answers.append([transformer(batch, latents, sequence.modulation[step][None]) for step in range(3)])
    for a, b in zip(*answers, strict=True):
        assert torch.equal(a, b)
    if blocks:
        stream = streams["blocks"]
        # Three steps, and the first block on its way again at the end of the last.
        sizes = [layer.size_bytes for layer in stream._layers]
        assert stream.moved_bytes == 3 * sum(sizes) + sizes[0]
        assert stream.device_bytes == 2 * max(sizes)
        stream.release()
        assert stream.device_bytes == 0
    if modulation:
        stream = streams[MODULATION]
        assert stream.moved_bytes == stream.host_bytes
        assert stream.device_bytes == 0


class Interrupting:
    """An argument that no layer can read without the user pressing Ctrl-C."""

    @classmethod
    def __torch_function__(cls, *arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt


def test_layers_run_from_the_buffers_and_rest_on_the_host() -> None:
    layers = [nn.Linear(8, 8) for _ in range(4)]
    stream = LayerStream(layers, "cpu", repeats=True)
    hosts = [layer.weight.data_ptr() for layer in layers]
    seen: list[int] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, arguments: seen.append(module.weight.data_ptr()))
    x = torch.randn(2, 8)
    for layer in layers:
        x = layer(x)
    assert len(set(seen)) == 2 and not set(seen) & set(hosts)
    assert [layer.weight.data_ptr() for layer in layers] == hosts
    # A layer that fails leaves its tensors where they belong.
    with pytest.raises(RuntimeError):
        layers[0](torch.randn(2, 9))
    assert layers[0].weight.data_ptr() == hosts[0]
    # An interrupt passes by the hook that would put them back; letting go of the buffers does it.
    with pytest.raises(KeyboardInterrupt):
        layers[1](Interrupting())
    assert layers[1].weight.data_ptr() != hosts[1]
    stream.release()
    assert [layer.weight.data_ptr() for layer in layers] == hosts
    stream.remove()
    moved = stream.moved_bytes
    layers[0](torch.randn(2, 8))
    assert stream.moved_bytes == moved
    with pytest.raises(ValueError, match="at least one layer"):
        LayerStream([], "cpu")


def test_streamed_text_encoder_computes_the_same() -> None:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=3, vocab_size=50, feed_forward_proj="gated-gelu")
    encoder = T5EncoderModel(config)
    encoder.train(False)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = encoder(input_ids=tokens).last_hidden_state
        rest = encoder.shared.weight.nbytes + encoder.encoder.final_layer_norm.weight.nbytes
        layers = sum(parameter.nbytes for parameter in encoder.encoder.block.parameters())
        part = StreamedPart([encoder], list(encoder.encoder.block), "cpu")
        at_rest = {name: parameter.data_ptr() for name, parameter in encoder.named_parameters()}
        for _ in range(2):
            with part.running():
                assert encoder.shared.weight.data_ptr() != at_rest["shared.weight"]
                assert torch.equal(encoder(input_ids=tokens).last_hidden_state, expected)
            assert {name: parameter.data_ptr() for name, parameter in encoder.named_parameters()} == at_rest
    # The embedding has two names and comes once; every tensor starts at a multiple of 256 bytes.
    assert 2 * (rest + layers) <= part.moved_bytes <= 2 * (rest + layers) * 1.2
    assert encoder.shared.weight.data_ptr() == encoder.encoder.embed_tokens.weight.data_ptr()


def test_a_part_that_fails_rests_on_the_host_again() -> None:
    layer = nn.Linear(8, 8)
    part = StreamedPart([layer], [], "cpu")
    at_rest = layer.weight.data_ptr()
    with part.running():
        assert layer.weight.data_ptr() != at_rest
    with pytest.raises(RuntimeError), part.running():
        layer(torch.zeros(2, 9))
    assert layer.weight.data_ptr() == at_rest


def test_a_journey_keeps_values_layouts_and_what_was_put_in_since() -> None:
    layer = nn.Conv2d(8, 8, 3)
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    before = layer.weight.detach().clone()
    copy = HostCopy([layer], pinned=False)
    there = copy.memory.clone()
    copy.run_from(there)
    assert torch.equal(layer.weight, before) and layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert layer.weight.untyped_storage().data_ptr() == there.data_ptr()
    copy.rest()
    layer.weight = nn.Parameter(before + 1, requires_grad=False)
    copy.take_over()
    assert layer.weight.untyped_storage().data_ptr() == copy.memory.data_ptr()
    copy.run_from(copy.memory.clone())
    assert torch.equal(layer.weight, before + 1)
