"""One request at a time, and none from inside another."""

import threading
from collections.abc import Callable

import pytest

from uso_engine import USOEngine
from uso_engine.sampling.denoiser import Step
from uso_engine.turn import Turn


def test_an_engine_called_from_on_step_says_so_instead_of_waiting_for_itself() -> None:
    size = {"width": 64, "height": 64}
    with USOEngine.from_config("uso-tiny", device="cpu") as engine:
        calls: tuple[Callable[[], object], ...] = (
            lambda: engine.encode_prompt("a fish"),
            lambda: engine.generate(prompt="a fish"),
            lambda: engine.set_loras([]),
            engine.close,
        )
        for call in calls:

            def on_step(step: Step, call: Callable[[], object] = call) -> None:
                call()

            with pytest.raises(RuntimeError, match=r"from on_step only engine\.preview can be called"):
                engine.generate(prompt="a cup", image_size=size, num_inference_steps=2, on_step=on_step)

        def look(step: Step) -> None:
            engine.preview(step)

        assert engine.generate(prompt="a cup", image_size=size, num_inference_steps=2, on_step=look).images


def test_others_wait_for_their_turn() -> None:
    turn, order = Turn(), list[str]()

    def wait() -> None:
        with turn:
            order.append("second")

    with turn:
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]
    # An error hands the turn on, too.
    with pytest.raises(KeyError), turn:
        raise KeyError
    with turn:
        order.append("third")
