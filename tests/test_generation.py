"""What of a request needs no model, and so no turn; and that its images are made one by one."""

import io
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_files import encoded, gradient
from PIL import Image
from recorded_shapes import Shapes

from uso_engine import ResearchOptions, USOEngine
from uso_engine.errors import ImageError, MissingFileError
from uso_engine.generation import Generation
from uso_engine.imaging.open import ImageSource
from uso_engine.sampling.step import Step
from uso_engine.scheduling.machine import PipelineMachine

SMALL: dict[str, Any] = {"image_size": {"width": 64, "height": 64}, "num_inference_steps": 1, "seed": 1}
PICTURE = encoded(gradient(96, 64), "PNG")


class SlowServer(ThreadingHTTPServer):
    """Answers with a picture once it is released."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked, self.released = threading.Event(), threading.Event()
        super().__init__(("127.0.0.1", 0), Answer)


class Answer(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        pass

    def do_GET(self) -> None:
        assert isinstance(self.server, SlowServer)
        self.server.asked.set()
        self.server.released.wait(60)
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(PICTURE)))
        self.end_headers()
        self.wfile.write(PICTURE)


@pytest.fixture
def server() -> Iterator[SlowServer]:
    with SlowServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


def placed(source: ImageSource, place: str) -> dict[str, Any]:
    """A request's fields with a picture in one of the places that take one."""
    images: dict[str, list[ImageSource | None]] = {"content": [source], "style": [None, source]}
    research = {
        "more content": ResearchOptions(content_images=(source,)),
        "more style": ResearchOptions(style_images=(source,)),
    }
    return {"images": images.get(place, []), "research": research.get(place)}


@pytest.mark.parametrize("place", ["content", "style", "more content", "more style"])
def test_a_request_that_waits_for_its_url_holds_up_nobody(engine: USOEngine, server: SlowServer, place: str) -> None:
    url = f"http://127.0.0.1:{server.server_port}/slow.png"
    made: list[bytes] = []

    def wait() -> None:
        made.append(engine.generate(prompt="a cup", **placed(url, place), **SMALL).images[0].tobytes())

    waiting = threading.Thread(target=wait)
    waiting.start()
    try:
        assert server.asked.wait(60)
        # With the engine taken these would wait for ever: the picture comes only when they are through.
        assert engine.generate(prompt="a fish", **SMALL).images
        assert engine.encode_prompt("a fish").tokens.shape[-1] > 0
        assert waiting.is_alive()
        assert made == []
    finally:
        server.released.set()
        waiting.join(60)
    at_once = Image.open(io.BytesIO(PICTURE))
    expected = engine.generate(prompt="a cup", **placed(at_once, place), **SMALL)
    assert made == [expected.images[0].tobytes()]


def test_what_cannot_be_opened_is_said_while_another_request_runs(engine: USOEngine, tmp_path: Path) -> None:
    running, looked = threading.Event(), threading.Event()
    let_go: list[bool] = []

    def on_step(step: Step) -> None:
        running.set()
        let_go.append(looked.wait(60))

    thread = threading.Thread(target=lambda: engine.generate(prompt="a cup", on_step=on_step, **SMALL))
    thread.start()
    try:
        assert running.wait(60)
        missing = tmp_path / "missing"
        with pytest.raises(MissingFileError):
            engine.generate(prompt="x", images=[missing], **SMALL)
        with pytest.raises(ImageError, match=r"at least 16 pixels"):
            engine.generate(prompt="x", images=[Image.new("RGB", (2000, 20))], **SMALL)
        for research in (ResearchOptions(prompt_embedding=missing), ResearchOptions(style_tokens=(missing,))):
            with pytest.raises(MissingFileError):
                engine.generate(prompt="x", research=research, **SMALL)
    finally:
        looked.set()
        thread.join(60)
    assert let_go == [True]


def test_transparency_lies_on_white_or_is_dropped(engine: USOEngine) -> None:
    """A picture of which nothing is to be seen: white paper, or what is stored beneath."""
    hidden = gradient(96, 64).convert("RGBA")
    hidden.putalpha(0)
    white = Image.new("RGB", (96, 64), "white")

    def made(picture: Image.Image, **options: Any) -> list[bytes]:
        both = (
            engine.generate(prompt="x", images=[picture], research=ResearchOptions(**options), **SMALL),
            engine.generate(prompt="x", images=[None, picture], research=ResearchOptions(**options), **SMALL),
            engine.generate(
                prompt="x", research=ResearchOptions(content_images=(picture,), style_images=(picture,), **options), **SMALL
            ),
        )
        return [result.images[0].tobytes() for result in both]

    assert made(hidden) == made(hidden, alpha="white") == made(white)
    assert made(hidden, alpha="drop") == made(hidden.convert("RGB"))
    assert not set(made(hidden)) & set(made(hidden, alpha="drop"))
    with pytest.raises(ValueError, match="alpha must be 'white' or 'drop', got 'black'"):
        made(hidden, alpha="black")


def test_encoders_take_the_same_choice(engine: USOEngine) -> None:
    hidden = gradient(96, 64).convert("RGBA")
    hidden.putalpha(0)
    shown = hidden.convert("RGB")
    assert torch.equal(engine.encode_style(hidden, alpha="drop").tokens, engine.encode_style(shown).tokens)
    assert torch.equal(engine.encode_content(hidden, alpha="drop"), engine.encode_content(shown))
    assert not torch.equal(engine.encode_style(hidden).tokens, engine.encode_style(shown).tokens)
    assert not torch.equal(engine.encode_content(hidden), engine.encode_content(shown))


def recorded(monkeypatch: pytest.MonkeyPatch, shapes: list[Shapes]) -> None:
    """Let what the engine's threads compute for a request be seen by the last of these."""
    for owner, name in ((PipelineMachine, "admit"), (PipelineMachine, "step"), (Generation, "encode"), (Generation, "finish")):
        original: Callable[..., Any] = getattr(owner, name)

        def seen(*given: Any, original: Callable[..., Any] = original) -> Any:
            with shapes[-1]:
                return original(*given)

        monkeypatch.setattr(owner, name, seen)


def test_what_a_library_is_handed_for_an_image_does_not_depend_on_its_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """Denoising, decoding and the safety checker: the operations of two images are those of each, whatever the machine."""
    pictures = [gradient(96, 64), gradient(80, 80)]
    fields: dict[str, Any] = {
        **SMALL,
        "prompt": "a house",
        "images": pictures,
        "negative_prompt": "a cup",
        "num_inference_steps": 2,
    }
    found = []
    with USOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32) as engine:
        engine.generate(**fields)  # The conditions are cached from here on.
        recorded(monkeypatch, shapes := [])
        for request in ({"seed": 20, "num_images": 2}, {"seed": 20}, {"seed": 21}):
            shapes.append(Shapes())
            engine.generate(**{**fields, **request})
            found.append(shapes[-1].found)
    assert {"addmm", "convolution"} < {name for name, _ in found[0]}
    # Of a request once, for all its images: pooled text, the steps' modulation, projections of 20 text and 40 content tokens.
    once = found[1] + found[2] - found[0]
    assert found[0] + once == found[1] + found[2]
    assert {(name, shapes[1][0]) for name, shapes in once} == {("addmm", rows) for rows in (1, 2, 20, 40)}
