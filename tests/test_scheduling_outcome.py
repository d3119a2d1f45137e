"""An error that a caller keeps, as a notebook does, holds nothing of what was being computed: not by its traceback either."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from small_requests import HandTurnedLoop, SmallWork, image_jobs

import uso_engine.generation as generation_module
import uso_engine.loading.assembly as assembly_module
from uso_engine import AsyncUSOEngine, Step, USOEngine
from uso_engine.errors import EngineDrainingError
from uso_engine.inputs import encode_conditions
from uso_engine.loading.transformer import load_transformer
from uso_engine.scheduling.outcome import Answer, Outcome

SMALL: dict[str, Any] = {"image_size": {"width": 64, "height": 64}, "num_inference_steps": 2, "enable_safety_checker": True}
PICTURE = Image.linear_gradient("L").convert("RGB").resize((64, 64))


class Broken(RuntimeError):
    """What a stage raises."""


class Held:
    """What the functions that an error came through had in their hands."""

    def __init__(self) -> None:
        self.references: dict[str, weakref.ref[Any]] = {}

    def __call__(self, name: str, what: object) -> Any:
        self.references[name] = weakref.ref(what)
        return what

    def left(self) -> list[str]:
        """What is still alive once the engine's threads have gone on."""
        gc.collect()
        for _ in range(500):
            alive = [name for name, reference in self.references.items() if reference() is not None]
            if not alive:
                return []
            time.sleep(0.01)
        return alive


@pytest.fixture(scope="module")
def engine() -> Iterator[USOEngine]:
    with USOEngine.from_config("uso-tiny", device="cpu") as made:
        yield made


def fails_after(held: Held, name: str, real: Callable[..., Any], *, fails: bool = True) -> Callable[..., Any]:
    """A function that does its work, has its result in its hands, and fails."""

    def compute(*arguments: Any, **named: Any) -> Any:
        result = held(name, real(*arguments, **named))
        own = held(f"{name}'s own", torch.zeros(3))
        if fails:
            raise Broken(f"{name} fails") from _caused(held, name)
        return result if own is not None else None

    return compute


def _caused(held: Held, name: str) -> Exception:
    """An error from which another is raised, with functions of its own."""
    cause = held(f"{name}'s cause", torch.ones(3))
    try:
        raise ValueError(cause.shape)
    except ValueError as error:
        return error


def break_stage(engine: USOEngine, stage: str, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, safety = engine.pipeline, engine.parts.safety
    assert safety is not None
    conditions = fails_after(held, "conditions", encode_conditions, fails=stage == "conditioning")
    monkeypatch.setattr(generation_module, "encode_conditions", conditions)
    if stage == "admission":
        real = pipeline.admit
        monkeypatch.setattr(pipeline, "admit", fails_after(held, "jobs", lambda *given: held("job", real(*given)[0])))
    if stage in ("decoding", "screening"):
        admit = pipeline.admit
        monkeypatch.setattr(pipeline, "admit", lambda *given: [held("job", image) for image in admit(*given)])
        monkeypatch.setattr(pipeline, "decode", fails_after(held, "pixels", pipeline.decode, fails=stage == "decoding"))
    if stage == "screening":
        real_screen = safety.screen
        monkeypatch.setattr(
            safety, "screen", fails_after(held, "image", lambda given: held("screened", real_screen(given)[0][0]))
        )


@pytest.mark.parametrize("watched", [False, True], ids=["", "on_step"])
@pytest.mark.parametrize("stage", ["conditioning", "admission", "decoding", "screening"])
def test_an_error_of_a_stage(engine: USOEngine, stage: str, watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held()
    break_stage(engine, stage, held, monkeypatch)

    def on_step(step: Step) -> None:
        held(f"latent {step.index}", step.latents[0])

    kept: list[BaseException] = []
    try:
        engine.generate(prompt="a cup", images=[PICTURE], seed=1, on_step=on_step if watched else None, **SMALL)
    except Broken as error:
        kept.append(error)
    assert len(kept) == 1
    assert len(held.references) >= 3
    assert held.left() == []


@pytest.mark.parametrize("stage", ["conditioning", "decoding"])
@pytest.mark.parametrize("streamed", [False, True], ids=["", "streamed"])
def test_an_error_that_is_awaited(engine: USOEngine, stage: str, streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    held, kept = Held(), list[BaseException]()

    async def ask() -> None:
        async with AsyncUSOEngine.from_config("uso-tiny", device="cpu") as served:
            break_stage(served.engine, stage, held, monkeypatch)
            try:
                if streamed:
                    async for _ in served.stream(prompt="a cup", seed=1, **SMALL):
                        pass
                else:
                    await served.generate(prompt="a cup", seed=1, on_step=lambda step: None, **SMALL)
            except Broken as error:
                kept.append(error)
            assert held.left() == []

    asyncio.run(ask())
    assert len(kept) == 1


def test_an_error_of_a_call_without_a_request(engine: USOEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held()
    monkeypatch.setattr(engine.pipeline, "encode_prompt", fails_after(held, "shape", lambda prompt: torch.ones(len(prompt))))
    with pytest.raises(Broken) as caught:
        engine.encode_prompt("a cup")
    assert held.left() == []
    assert caught.value.__traceback__ is not None


@pytest.mark.parametrize("kind", [Broken, KeyboardInterrupt])
def test_an_error_while_loading(kind: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts that were there before the one that failed."""
    held = Held()
    load_safety = assembly_module.load_safety_checker

    def fail(*arguments: object, **named: object) -> None:
        raise kind("the text encoders fail")

    monkeypatch.setattr(
        assembly_module, "load_transformer", lambda *given, **named: held("transformer", load_transformer(*given, **named))
    )
    monkeypatch.setattr(
        assembly_module, "load_safety_checker", lambda *given, **named: held("checker", load_safety(*given, **named))
    )
    monkeypatch.setattr(assembly_module, "load_text_encoders", fail)
    with pytest.raises(kind) as caught:
        USOEngine.from_config("uso-tiny", device="cpu")
    assert held.left() == []
    assert caught.value.__traceback__ is not None


def test_an_outcome_neither_holds_its_work_nor_itself() -> None:
    """Nor does what raises its error: no collector has to find it."""
    held = Held()

    def work(given: torch.Tensor, *, named: torch.Tensor) -> None:
        own = held("own", given + named)
        raise Broken(str(own.shape))

    gc.disable()
    try:
        outcome = Outcome.of(work, held("argument", torch.zeros(2)), named=held("named", torch.zeros(2)))
        assert [name for name, reference in held.references.items() if reference() is not None] == []
        try:
            outcome.get()
        except Broken as error:
            raised = weakref.ref(error)
        del outcome
        assert raised() is None
    finally:
        gc.enable()


def test_calls_that_are_given_up_together_have_errors_of_their_own() -> None:
    """Calls of a worker, before it ends and after, and changes of LoRAs."""
    loop = HandTurnedLoop().loop
    answers: list[Answer[Any]] = [loop.conditioning.call(int) for _ in range(2)]
    answers += [loop._lora_switch.ask(name).done for name in ("one", "two")]
    loop.stop()
    answers += [loop.conditioning.call(int) for _ in range(2)]
    loop._end_all()
    errors = [answer._outcomes.get().error for answer in answers]
    assert len(set(map(id, errors))) == 6
    assert {str(error) for error in errors} == {"engine small was closed; make a new one with USOEngine.from_config"}


@pytest.mark.parametrize("begun", [False, True])
def test_requests_that_are_cut_off_together_have_errors_of_their_own(begun: bool) -> None:
    """Each is raised in its caller's thread, and holds the functions that it came through there."""
    loop = HandTurnedLoop()
    images = image_jobs(loop.transformer, 0, 3)
    requests = [loop.submit(SmallWork(images)) for _ in range(2)]
    if begun:
        loop.turn(3)
    made: list[BaseException] = []

    def reason() -> BaseException:
        made.append(EngineDrainingError("the engine drained"))
        return made[-1]

    assert loop.queue.doom(reason, begun=begun) == 2
    loop.run()
    assert [request.error for request in requests] == made and made[0] is not made[1]
