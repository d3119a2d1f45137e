"""A caller with a stream of its own on a GPU: its work on a step comes between the engine's before and the engine's after."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch
from PIL import Image
from simulated_cuda import simulated_gpus
from simulated_device import SimulatedGPUs, SimulatedStream
from streamed_engines import config_of
from torch import Tensor

from uso_engine import AsyncUSOEngine, GenerationResult, USOEngine
from uso_engine.api.events import Done, Event
from uso_engine.sampling.step import Step

DEVICE = "cuda:1"
Log = list[tuple[object, ...]]


@pytest.fixture
def gpus() -> Iterator[SimulatedGPUs]:
    with simulated_gpus() as found:
        yield found


@pytest.fixture
def log(gpus: SimulatedGPUs, monkeypatch: pytest.MonkeyPatch) -> Log:
    """Every wait of a stream for another one, and every tensor that a stream is told of."""
    noted: Log = []
    wait_stream = SimulatedStream.wait_stream

    def waiting(stream: SimulatedStream, other: SimulatedStream) -> None:
        noted.append(("waits", stream, other))
        wait_stream(stream, other)

    monkeypatch.setattr(SimulatedStream, "wait_stream", waiting)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: noted.append(("lent", tensor.data_ptr(), stream)))
    return noted


def generated(engine: USOEngine, log: Log) -> tuple[GenerationResult, Log]:
    """A request of two steps, its caller's view of them noted too."""

    def look(step: Step) -> None:
        log.append(("looks", *(velocity.data_ptr() for velocity in step.velocities)))

    return engine.generate("a red circle", seed=7, num_inference_steps=2, on_step=look), log


def in_turn(stream: object, engines: object, looks: Log, latents: int) -> Log:
    expected: Log = [("waits", engines, stream)]
    for _, velocity in looks:
        told = [("lent", velocity, stream), ("waits", stream, engines), ("looks", velocity), ("waits", engines, stream)]
        expected += told
    return [*expected, ("lent", latents, stream)]


def test_a_callers_stream_waits_and_is_waited_for(gpus: SimulatedGPUs, log: Log) -> None:
    stream = torch.cuda.Stream(DEVICE)
    with USOEngine.from_config(config_of("float32"), device=DEVICE) as engine, torch.cuda.stream(stream):
        result, _ = generated(engine, log)
    assert result.latents is not None
    looks = [entry for entry in log if entry[0] == "looks"]
    assert len(looks) == 2
    engines = torch.cuda.default_stream(torch.device(DEVICE))
    assert log == in_turn(stream, engines, looks, result.latents.data_ptr())


def test_the_engines_own_stream_waits_for_nothing(gpus: SimulatedGPUs, log: Log) -> None:
    with USOEngine.from_config(config_of("float32"), device=DEVICE) as engine:
        generated(engine, log)
    assert [entry[0] for entry in log] == ["looks", "looks"]


def test_a_result_is_lent_to_the_stream_of_who_awaits_it(gpus: SimulatedGPUs, log: Log) -> None:
    stream = torch.cuda.Stream(DEVICE)

    async def generate() -> GenerationResult:
        async with AsyncUSOEngine.from_config(config_of("float32"), device=DEVICE) as engine:
            with torch.cuda.stream(stream):
                return await engine.generate("a red circle", seed=7, num_inference_steps=1)

    result = asyncio.run(generate())
    engines = torch.cuda.default_stream(torch.device(DEVICE))
    assert result.latents is not None
    assert log == [("waits", engines, stream), ("lent", result.latents.data_ptr(), stream)]


def test_a_result_is_lent_to_the_stream_of_who_is_told_of_its_steps(gpus: SimulatedGPUs, log: Log) -> None:
    stream = torch.cuda.Stream(DEVICE)

    async def told() -> list[Event]:
        async with AsyncUSOEngine.from_config(config_of("float32"), device=DEVICE) as engine:
            with torch.cuda.stream(stream):
                return [event async for event in engine.stream("a red circle", seed=7, num_inference_steps=1)]

    done = asyncio.run(told())[-1]
    assert isinstance(done, Done) and done.result.latents is not None
    engines = torch.cuda.default_stream(torch.device(DEVICE))
    assert log == [("waits", engines, stream), ("lent", done.result.latents.data_ptr(), stream)]


def test_what_is_encoded_is_there_and_lent(gpus: SimulatedGPUs, log: Log) -> None:
    """The engine waits for what the caller's stream is to give it, and that for what it gets."""
    stream, engines = torch.cuda.Stream(DEVICE), torch.cuda.default_stream(torch.device(DEVICE))
    picture = Image.new("RGB", (64, 64), "red")
    with USOEngine.from_config(config_of("float32"), device=DEVICE) as engine, torch.cuda.stream(stream):
        text, style, content = engine.encode_prompt("a fish"), engine.encode_style(picture), engine.encode_content(picture)
    expected: Log = []
    for tensors in ((text.tokens, text.pooled), (style.tokens,), (content,)):
        assert {tensor.device for tensor in tensors} == {torch.device(DEVICE)}
        expected += [("waits", engines, stream), ("waits", stream, engines)]
        expected += [("lent", tensor.data_ptr(), stream) for tensor in tensors]
    assert log == expected


def test_a_preview_waits_for_what_it_shows(gpus: SimulatedGPUs, log: Log) -> None:
    """Which the caller's stream computes of the step, also within `on_step`."""
    stream, engines = torch.cuda.Stream(DEVICE), torch.cuda.default_stream(torch.device(DEVICE))
    looks: list[Log] = []

    def look(step: Step) -> None:
        log.clear()
        assert engine.preview(step).size
        looks.append(list(log))

    with USOEngine.from_config(config_of("float32"), device=DEVICE) as engine, torch.cuda.stream(stream):
        engine.generate("a red circle", seed=7, num_inference_steps=1, on_step=look)
    assert looks == [[("waits", engines, stream), ("waits", stream, engines)]]


def test_weights_that_were_loaded_on_a_callers_stream_are_waited_for(gpus: SimulatedGPUs, log: Log) -> None:
    stream, engines = torch.cuda.Stream(DEVICE), torch.cuda.default_stream(torch.device(DEVICE))
    with torch.cuda.stream(stream):
        engine = USOEngine.from_config(config_of("float32"), device=DEVICE)
    with engine:
        assert log == [("waits", engines, stream)]
