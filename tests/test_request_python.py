"""Requests as Python objects: pictures of every kind, pickled, dumped, read by a type checker."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic_core import PydanticSerializationError

from uso_engine.api.request import GenerationRequest, RequestDefaults, request_model
from uso_engine.imaging.sizes import ImageSize, SizeLimits
from uso_engine.imaging.source import ImageSource

URL = "https://host.example/a.png"
LIMITS, DEFAULTS = SizeLimits(64, 512, 300 * 512), RequestDefaults(128, 96, 4, 3.0, 128)
PICTURE = Image.new("RGB", (3, 4))


@pytest.mark.parametrize(
    "picture",
    [PICTURE, "a.png", Path("a.png"), URL, b"data", io.BytesIO(), np.zeros((4, 3, 3), np.uint8), torch.zeros(3, 4, 4)],
)
def test_one_picture_needs_no_list(picture: ImageSource) -> None:
    for request in (GenerationRequest(prompt="", images=picture), GenerationRequest(prompt="", image_urls=picture)):
        assert len(request.image_urls) == 1
        assert request.content_image is picture
        assert request.style_images == ()
    listed = GenerationRequest(prompt="", images=[None, picture])
    assert listed.content_image is None
    assert listed.style_images[0] is picture


def test_buffers_are_kept_as_they_are_now() -> None:
    buffer = bytearray(b"data")
    request = GenerationRequest(prompt="", images=[buffer, memoryview(buffer), memoryview(b"d.a.t.a.")[::2]])
    buffer[:] = b"gone"
    assert request.image_urls == (b"data",) * 3
    assert GenerationRequest(prompt="", images=bytearray(b"data")).image_urls == (b"data",)


def test_arrays_are_named_by_shape_in_texts() -> None:
    request = GenerationRequest(prompt="", images=[np.zeros((4, 3, 3), np.uint8), torch.zeros(3, 4, 4)])
    assert "['numpy array [4, 3, 3] uint8', 'tensor [3, 4, 4] float32']" in repr(request)


@pytest.mark.parametrize(
    "kind", [GenerationRequest, request_model(LIMITS, DEFAULTS), request_model(), request_model(wire=True)]
)
def test_requests_pickle_and_dump_silently(kind: type[GenerationRequest]) -> None:
    assert request_model(LIMITS, DEFAULTS, wire=False) is request_model(LIMITS, DEFAULTS)
    images: Sequence[ImageSource] = [URL] if kind.wire else [PICTURE, b"x", Path("a.png")]
    for changes in ({}, {"image_size": {"width": 256, "height": 256}}, {"image_size": "square"}):
        if kind.limits.max_pixels < 512 * 512 and changes.get("image_size") == "square":
            continue
        fields = {"prompt": "a", "model": "bytedance/uso", "image_urls": images, **changes}
        request = kind.model_validate(fields)
        again = pickle.loads(pickle.dumps(request))  # noqa: S301  made here
        assert type(again) is kind
        assert again.model_dump() == request.model_dump()
        assert again.model_fields_set == request.model_fields_set
        assert again.fitted_to(kind) is again
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kind.model_validate(request.model_dump()) == request
            text = kind.model_validate({**fields, "image_urls": [URL]})
            assert kind.model_validate_json(text.model_dump_json()) == text


def test_json_refuses_pictures_that_it_cannot_hold() -> None:
    assert GenerationRequest(prompt="", images=[None, Path("a.png"), URL]).model_dump(mode="json")["image_urls"] == [
        None,
        "a.png",
        URL,
    ]
    with pytest.raises(PydanticSerializationError, match=r"image_urls\[1\] is PIL image 3x4 RGB; JSON holds URLs"):
        GenerationRequest(prompt="", images=["a.png", PICTURE]).model_dump_json()


def test_a_request_made_without_an_engine_takes_what_some_engine_takes() -> None:
    small = GenerationRequest(prompt="", image_size={"width": 64, "height": 100})
    large = GenerationRequest(prompt="", image_size=ImageSize(4096, 4096))
    assert (small.resolved_size(), large.resolved_size()) == ((64, 96), (4096, 4096))
    assert small.fitted_to(request_model(LIMITS, DEFAULTS)).resolved_size() == (64, 96)
    with pytest.raises(ValueError, match=r"image_size\.width must be from 64 to 512, got 4096"):
        large.fitted_to(request_model(LIMITS, DEFAULTS))
    for side in (15, 65_536):
        with pytest.raises(ValueError, match=rf"image_size\.width must be from 16 to 65535, got {side}"):
            GenerationRequest(prompt="", image_size={"width": side, "height": 512})
    # The hosted contract is another matter.
    with pytest.raises(ValueError, match=r"image_size\.width must be from 256 to 2048, got 64"):
        small.fitted_to(request_model())


ORDINARY_USE = """
import io
from pathlib import Path

import numpy as np
from PIL import Image

from uso_engine import FileStore, GenerationCancelled, GenerationRequest, ResearchOptions, Step, USOEngine, request_model

picture = Image.new("RGB", (8, 8))
pixels = np.zeros((8, 8, 3), np.uint8)
requests = [
    GenerationRequest(prompt="x"),
    GenerationRequest(prompt="x", images=[picture, "a.png"], image_size={"width": 512, "height": 512}, seed=3),
    GenerationRequest(prompt="x", images=[None, pixels, b"", bytearray(), memoryview(b""), Path("a"), io.BytesIO()]),
    GenerationRequest(prompt="x", images=picture, image_size="square", num_inference_steps=4, guidance_scale=3),
    GenerationRequest(prompt="x", images=pixels, output_format="jpeg"),
    request_model(wire=True)(prompt="x", image_urls=["https://host.example/a.png"]),
]
text: str = requests[0].prompt
size: tuple[int, int] = requests[1].resolved_size()


def look(step: Step) -> None:
    if step.index == 3:
        raise GenerationCancelled("enough")


def use(engine: USOEngine) -> None:
    result = engine.generate(requests[0], on_step=look, progress=True, research=ResearchOptions(strength=0.5))
    engine.generate("a house", images=picture, seed=7).images[0].save("a.png")
    engine.generate(prompt="a house", image_size={"width": 64, "height": 64})
    result.to_response(FileStore(Path("out")))
    engine("a house", image=picture, width=64, height=64).images[0].save("b.png")
    engine(["a house", "a tree"], image=picture).images[1].save("c.png")
    for one in engine(["a house", "a tree"]):
        seed: int = one.seed
"""
NOT_TYPED = [
    ('GenerationRequest(prompt="x", num_inference_steps="4")', "arg-type"),
    ('GenerationRequest(prompt="x", steps=4)', "call-arg"),
    ("GenerationRequest()", "call-arg"),
]


def test_a_strict_type_checker_accepts_ordinary_use(repository: Path, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """Without pydantic's plugin, which users need not have. torch's own sources are left out: reading them takes a minute."""
    wrong = "\n".join(line for line, _ in NOT_TYPED)
    (tmp_path / "use.py").write_text(f"{ORDINARY_USE}\n{wrong}\n", encoding="utf-8")
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nstrict = true\nmypy_path = {repository}:{repository / 'kernels'}\n"
        "[mypy-torch.*,transformers.*,diffusers.*]\nfollow_imports = skip\n",
        encoding="utf-8",
    )
    assert pytestconfig.cache is not None
    cache = pytestconfig.cache.mkdir("mypy")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(cache), "use.py"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = [line for line in answer.stdout.splitlines() if ": error: " in line]
    first = ORDINARY_USE.count("\n") + 2
    expected = [f"use.py:{first + i}: error: " for i in range(len(NOT_TYPED))]
    assert len(errors) == len(expected), answer.stdout + answer.stderr
    for line, start, (_, code) in zip(errors, expected, NOT_TYPED, strict=True):
        assert line.startswith(start) and line.endswith(f"[{code}]"), answer.stdout


def test_equality_answers_whatever_pictures_are_given() -> None:
    def request(*pictures: ImageSource, prompt: str = "x") -> GenerationRequest:
        return GenerationRequest(prompt=prompt, images=list(pictures))

    array, tensor = np.arange(36, dtype=np.uint8).reshape(4, 3, 3), torch.arange(36, dtype=torch.uint8).reshape(3, 4, 3)
    other_array, other_tensor = array.copy(), tensor.clone()
    other_array[0, 0, 0] = other_tensor[0, 0, 0] = 9
    sources: list[tuple[ImageSource, ImageSource, ImageSource]] = [
        (array, array.copy(), other_array),
        (tensor, tensor.clone(), other_tensor),
        (tensor.to_sparse(), tensor.to_sparse(), other_tensor.to_sparse()),
        (PICTURE, PICTURE.copy(), Image.new("RGB", (3, 4), "red")),
        (b"a", b"a", b"b"),
        ("a.png", "a.png", Path("a.png")),
        (array, array.copy(), tensor),
        (array, array.copy(), array.astype(np.float32)),
    ]
    for one, same, other in sources:
        assert request(one) == request(same)
        assert request(one) != request(other)
        assert request(one) != request(one, one)
        assert request(one) != request(one, prompt="y")
    file = io.BytesIO(b"x")
    assert request(file) == request(file)
    assert request(file) != request(io.BytesIO(b"x"))
    assert request(torch.zeros(3, 4, 4, device="meta")) != request(torch.zeros(3, 4, 4, device="meta"))
    assert request() != "x"
    assert request() != request_model(LIMITS, DEFAULTS)(prompt="x")
    assert {request("a.png"): 1}[request("a.png")] == 1
