"""Several requests at once under a memory plan: room, refusals, memory that runs out in a shared step; bits as alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from streamed_engines import plain_and_streamed

from uso_engine import ResearchOptions, USOEngine
from uso_engine.api.events import Done
from uso_engine.errors import DeviceMemoryError, MemoryBudgetError
from uso_engine.generation import Generation
from uso_engine.offload.placement import Placement
from uso_engine.offload.plan import MemoryPlan
from uso_engine.offload.sizes import RequestSize
from uso_engine.scheduling.assembly import make_loop
from uso_engine.scheduling.handle import Failed, RequestHandle
from uso_engine.scheduling.waiting import put_in_line

Fields = dict[str, Any]


def fields(seed: int, side: int = 64, steps: int = 2, **more: Any) -> Fields:
    size = {"width": side, "height": side}
    return {"prompt": f"a house, number {seed}", "seed": seed, "image_size": size, "num_inference_steps": steps, **more}


class Line:
    """A loop over an engine's parts that a test turns by hand."""

    def __init__(self, engine: USOEngine) -> None:
        self.engine, self.loop = engine, make_loop(engine.parts, threaded=False)

    def submit(self, wanted: Fields) -> RequestHandle:
        handle = RequestHandle(wants_events=False)
        put_in_line(self.loop, handle, self.generation(wanted), 0, None)
        return handle

    def generation(self, wanted: Fields) -> Generation:
        return Generation(self.engine.parts, self.engine.request_type(**wanted), ResearchOptions())

    def size(self, wanted: Fields) -> RequestSize:
        generation = self.generation(wanted)
        generation.open()
        return generation.size()

    def run(self) -> None:
        while self.loop.round():
            pass

    def holding(self) -> list[RequestSize]:
        """Of the requests that hold memory of the device now."""
        found = [one for one in self.loop.queue.requests if one.begun or one.stage == "conditioning"]
        return [one.work.size() for one in found if isinstance(one.work, Generation)]


def picture(handle: RequestHandle) -> bytes:
    message = handle.next()
    assert isinstance(message, Done), message
    return message.result.images[0].tobytes()


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[USOEngine, USOEngine]]:
    with plain_and_streamed("bf16", "cpu") as both:
        yield both


@pytest.fixture
def placement(engines: tuple[USOEngine, USOEngine]) -> Iterator[Placement]:
    """Of the engine that streams; its budget is as it was afterwards."""
    placement = engines[1].pipeline.placement
    assert placement is not None
    plan = placement.plan
    yield placement
    placement.plan = plan


def with_budget(plan: MemoryPlan, size_bytes: int) -> MemoryPlan:
    return replace(plan, budget_bytes=size_bytes)


def needed(placement: Placement, together: Sequence[RequestSize], step_rows: int) -> int:
    """The smallest budget in which requests have room together."""
    plan, low, high = placement.plan, 0, 1 << 40
    while low < high:
        middle = (low + high) // 2
        placement.plan = with_budget(plan, middle)
        low, high = (low, middle) if placement.has_room(together, step_rows) else (middle + 1, high)
    placement.plan = plan
    return low


def test_requests_together_have_the_bits_of_each_alone(
    engines: tuple[USOEngine, USOEngine], placement: Placement, content: Image.Image, style: Image.Image
) -> None:
    """Everything is streamed: encoders, modulation linears, blocks, autoencoder."""
    plain, planned = engines
    wanted = [
        fields(1),
        fields(2, side=96, steps=3, images=[content]),
        fields(3, steps=4, images=[content, style], num_images=2),
        fields(4, side=128, steps=1, negative_prompt="a fish"),
    ]
    alone = [plain.generate(**one).images[0].tobytes() for one in wanted]
    line, moved = Line(planned), placement.moved_bytes
    handles = [line.submit(one) for one in wanted[:3]]
    line.loop.round()
    handles.append(line.submit(wanted[3]))
    line.run()
    assert [picture(handle) for handle in handles] == alone
    counters = line.loop.queue.counters
    assert counters.members > counters.steps
    assert placement.moved_bytes > moved
    # Nothing of the streams' buffers stays behind.
    assert all(stream.device_bytes == 0 for stream in placement._streams.values())


def test_no_more_hold_memory_than_the_plan_has_room_for(
    engines: tuple[USOEngine, USOEngine], placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while one is encoded, takes steps or is decoded; all of them get their turn."""
    plain, planned = engines
    wanted = [fields(seed, steps=3) for seed in range(1, 6)]
    alone = [plain.generate(**one).images[0].tobytes() for one in wanted]
    line = Line(planned)
    step_rows = line.loop.queue.limits.max_step_tokens
    two = needed(placement, [line.size(wanted[0])] * 2, step_rows)
    assert two < needed(placement, [line.size(wanted[0])] * 3, step_rows)
    placement.plan = with_budget(placement.plan, two)
    held: list[int] = []

    def watched(name: str) -> None:
        stage = getattr(Generation, name)

        def run(self: Generation, *given: Any) -> Any:
            together = line.holding()
            held.append(len(together))
            assert placement.has_room(together, step_rows), f"{len(together)} hold memory in {name}"
            return stage(self, *given)

        monkeypatch.setattr(Generation, name, run)

    for name in ("encode", "admit", "finish"):
        watched(name)
    handles = [line.submit(one) for one in wanted]
    line.run()
    assert [picture(handle) for handle in handles] == alone
    assert len(held) == 15 and max(held) == 2


def test_who_has_no_room_is_not_passed_by_those_who_came_later(
    engines: tuple[USOEngine, USOEngine], placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, order = Line(engines[1]), list[int]()
    small, large = fields(1, steps=3), fields(2, side=128)
    both = needed(placement, [line.size(small), line.size(large)], line.loop.queue.limits.max_step_tokens)
    placement.plan = with_budget(placement.plan, both - 1)
    admit = Generation.admit

    def noted(self: Generation) -> Any:
        order.append(self.request.seed or 0)
        return admit(self)

    monkeypatch.setattr(Generation, "admit", noted)
    handles = [line.submit(small)]
    while not order:
        line.loop.round()
    handles += [line.submit(one) for one in (large, fields(3), fields(4))]
    line.run()
    assert order[:2] == [1, 2] and sorted(order[2:]) == [3, 4]
    assert all(picture(handle) for handle in handles)


def test_over_the_budget_is_refused_while_others_run(engines: tuple[USOEngine, USOEngine], placement: Placement) -> None:
    plain, planned = engines
    line, wanted = Line(planned), [fields(1), fields(2)]
    two = needed(placement, [line.size(one) for one in wanted], line.loop.queue.limits.max_step_tokens)
    placement.plan = with_budget(placement.plan, two)
    handles = [line.submit(one) for one in wanted]
    line.loop.round()
    with pytest.raises(MemoryBudgetError, match=r"1 x 512x512 .* ask for a smaller size"):
        line.submit(fields(3, side=512))
    assert len(line.loop.queue.requests) == 2
    line.run()
    assert [picture(handle) for handle in handles] == [plain.generate(**one).images[0].tobytes() for one in wanted]
    assert line.loop.queue.counters.outcomes == {"failed": 1, "done": 2}


@pytest.mark.parametrize("times", [1, 2])
def test_memory_that_runs_out_in_the_middle_of_a_shared_step(
    engines: tuple[USOEngine, USOEngine], placement: Placement, times: int
) -> None:
    """Once, or again when it is tried again, while a block is streamed. The others get their bits, and whoever comes then."""
    plain, planned = engines
    wanted = [fields(seed, steps=3) for seed in (1, 2, 3)]
    alone = [plain.generate(**one).images[0].tobytes() for one in wanted]
    line, companies = Line(planned), list[int]()

    def run_out(block: torch.nn.Module, given: tuple[Any, ...]) -> None:
        company = len(given[3].batch.joint)
        if (company > 1 or companies) and len(companies) < times:
            companies.append(company)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    hook = planned.pipeline.transformer.double_blocks[1].register_forward_pre_hook(run_out)
    try:
        handles = [line.submit(one) for one in wanted]
        line.run()
    finally:
        hook.remove()
    messages = [handle.next() for handle in handles]
    failed = [message.error for message in messages if isinstance(message, Failed)]
    assert companies == [2, 1][:times]
    assert line.loop.queue.counters.memory_retries == 1
    assert [type(error) for error in failed] == [DeviceMemoryError] * (times - 1)
    for message, image in zip(messages, alone, strict=True):
        assert isinstance(message, Failed) or (isinstance(message, Done) and message.result.images[0].tobytes() == image)
    assert planned.generate(**wanted[2]).images[0].tobytes() == alone[2]
