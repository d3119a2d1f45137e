"""What only a GPU can show of memory budgets: weights that travel through pinned memory and streams are the right ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from streamed_engines import plain_and_streamed
from torch import Tensor, nn

from uso_engine import USOEngine
from uso_engine.offload.layer_stream import LayerStream
from uso_engine.offload.streamed_part import StreamedPart
from uso_engine.sampling.step import Step

pytestmark = pytest.mark.gpu

REQUEST: dict[str, Any] = {"prompt": "the object in the hills", "num_inference_steps": 4, "seed": 5}


@pytest.fixture(scope="module", params=["bf16", "int8", "int4"])
def engines(request: pytest.FixtureRequest) -> Iterator[tuple[USOEngine, USOEngine]]:
    """The same configuration on the GPU without a plan and with everything streamed."""
    with plain_and_streamed(request.param, "cuda") as both:
        yield both


def pictures() -> dict[str, Any]:
    content = Image.linear_gradient("L").convert("RGB").resize((96, 64))
    return {"images": [content, Image.radial_gradient("L").convert("RGB").resize((80, 80))]}


def difference(engines: tuple[USOEngine, USOEngine], **fields: Any) -> float:
    """Largest difference of two engines' pictures, in 8-bit steps. LoRAs are merged on another device: not always zero."""
    a, b = (np.asarray(engine.generate(**REQUEST, **pictures(), **fields).images[0], dtype=int) for engine in engines)
    return float(np.abs(a - b).max())


def test_streamed_weights_make_the_same_pictures(engines: tuple[USOEngine, USOEngine]) -> None:
    assert difference(engines) <= 8
    assert difference(engines, negative_prompt="a car in the city") <= 8
    assert difference(engines, num_images=3) <= 8


def test_cached_conditions_wait_on_the_host(engines: tuple[USOEngine, USOEngine]) -> None:
    plain, planned = engines
    assert (plain.encode_prompt("a fish").tokens.device.type, planned.encode_prompt("a fish").tokens.device.type) == (
        "cuda",
        "cpu",
    )


def test_previews_while_blocks_are_streamed(engines: tuple[USOEngine, USOEngine]) -> None:
    planned = engines[1]
    expected = planned.generate(**REQUEST, **pictures()).images[0].tobytes()
    seen: list[Image.Image] = []

    def look(step: Step) -> None:
        seen.append(planned.preview(step))

    assert planned.generate(**REQUEST, **pictures(), on_step=look).images[0].tobytes() == expected
    assert len(seen) == REQUEST["num_inference_steps"]


def test_other_loras_do_not_pile_up_on_the_gpu(engines: tuple[USOEngine, USOEngine]) -> None:
    planned = engines[1]
    before = torch.cuda.memory_allocated()
    for keep_configured in (False, True):
        for engine in engines:
            engine.set_loras([], keep_configured=keep_configured)
        assert difference(engines) <= 8
    blocks = [tensor.device.type for tensor in planned.pipeline.transformer.double_blocks.state_dict().values()]
    assert set(blocks) == {"cpu"}
    assert torch.cuda.memory_allocated() <= before + (64 << 20)


class Slow(nn.Module):
    """A layer that reads its weight long after it was started."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1 << 22,), value), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        torch.cuda._sleep(20_000_000)
        return x * 2 + self.weight


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_buffer_is_not_overwritten_while_it_is_read(count: int) -> None:
    layers = [Slow(float(i + 1)) for i in range(count)]
    expected = torch.zeros(1 << 22)
    for _ in range(3):
        for i in range(count):
            expected = expected * 2 + float(i + 1)
    stream = LayerStream(layers, "cuda", repeats=True)
    x = torch.zeros(1 << 22, device="cuda")
    for _ in range(3):
        for layer in layers:
            x = layer(x)
    stream.remove()
    assert torch.equal(x.cpu(), expected)
    part = StreamedPart([nn.ModuleList(layers)], [], "cuda")
    y = torch.zeros(1 << 22, device="cuda")
    for layer in layers:
        with part.running():
            y = layer(y)
    single = torch.zeros(1 << 22)
    for i in range(count):
        single = single * 2 + float(i + 1)
    assert torch.equal(y.cpu(), single)
