"""Requests: what is accepted in which form, sizes, seeds, and a configuration's own limits."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from request_bodies import URL, body, refusals

from uso_engine.api.request import GenerationRequest, RequestDefaults, request_model
from uso_engine.errors import ImageError
from uso_engine.imaging.sizes import ImageSize, SizeLimits
from uso_engine.imaging.source import EXPECTED_SOURCE

Wire = request_model(wire=True)
TINY = request_model(SizeLimits(64, 512, 300 * 512), RequestDefaults(128, 96, 4, 3.0, 128))


@pytest.mark.parametrize(
    "example",
    [
        # The hosted documentation's kind of example: every field, and its defaults.
        {
            "model": "bytedance/uso",
            "prompt": "A T-rex relaxes on a beach, lying on a sun lounger and wearing sunglasses.",
            "image_urls": ["https://cdn.example.com/t-rex.png"],
        },
        {
            "model": "bytedance/uso",
            "prompt": "Create an image in this style: a T-rex in business attire",
            "image_urls": [
                "https://cdn.example.com/t-rex.png",
                "https://cdn.example.com/blue-mug.jpeg",
                "http://cdn.example.com/style.webp",
            ],
            "image_size": "square_hd",
            "negative_prompt": "",
            "num_inference_steps": 28,
            "guidance_scale": 4,
            "keep_size": False,
            "num_images": 1,
            "seed": 1,
            "sync_mode": False,
            "enable_safety_checker": True,
            "output_format": "png",
        },
    ],
)
def test_documentation_examples_validate_unchanged(example: dict[str, object]) -> None:
    for kind in (GenerationRequest, Wire):
        request = kind.model_validate(example)
        assert kind.model_validate_json(json.dumps(example)) == request
        assert request.prompt == example["prompt"]
        assert (request.num_inference_steps, request.guidance_scale, request.num_images) == (28, 4.0, 1)
        assert request.resolved_size() == (1024, 1024)


def test_whole_numbers_may_be_written_as_floats_and_by_numpy() -> None:
    request = Wire.model_validate_json(json.dumps(body(num_images=2.0, seed=7.0, num_inference_steps=4.0)))
    assert (request.num_images, request.seed, request.num_inference_steps) == (2, 7, 4)
    assert all(type(value) is int for value in (request.num_images, request.seed, request.num_inference_steps))
    given = GenerationRequest.model_validate({"prompt": "", "seed": np.int64(9), "guidance_scale": np.float32(2.5)})
    assert (given.seed, given.guidance_scale) == (9, 2.5)
    assert type(given.seed) is int
    assert type(given.guidance_scale) is float


def test_only_the_prompt_is_required_in_python() -> None:
    request = GenerationRequest(prompt="")
    assert request.model == "bytedance/uso"
    assert request.content_image is None
    assert request.style_images == ()
    assert refusals(GenerationRequest, {}) == ["prompt is required (it may be the empty string)"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("square_hd", (1024, 1024)),
        ("square", (512, 512)),
        ("portrait_4_3", (768, 1024)),
        ("portrait_16_9", (576, 1024)),
        ("landscape_4_3", (1024, 768)),
        ("landscape_16_9", (1024, 576)),
        ({"width": 1000, "height": 777}, (992, 768)),
        (ImageSize(257, 2047), (256, 2032)),
    ],
)
def test_sizes(size: object, expected: tuple[int, int]) -> None:
    assert GenerationRequest.model_validate({"prompt": "", "image_size": size}).resolved_size() == expected


def test_keep_size_follows_the_content_image() -> None:
    keeping = GenerationRequest(prompt="", image_urls=[URL], keep_size=True)
    assert keeping.resolved_size((640, 480)) == (1024, 768)
    assert keeping.resolved_size((37, 911)) == (32, 1024)  # exempt from the limits on sizes of one's own
    other = GenerationRequest(prompt="", image_urls=[URL], keep_size=True, content_long_side=768)
    assert other.resolved_size((640, 480)) == (1024, 768)
    with pytest.raises(ImageError, match="2000x50 becomes 512x12"):
        keeping.resolved_size((2000, 50))
    with pytest.raises(ValueError, match="keep_size needs the content image's size"):
        keeping.resolved_size()
    assert GenerationRequest(prompt="", image_urls=[URL]).resolved_size((37, 911)) == (1024, 1024)


def test_python_takes_pictures_in_every_form(tmp_path: Path) -> None:
    file = io.BytesIO(b"data")
    picture = Image.new("RGB", (3, 4))
    for source in (tmp_path / "a.png", "a.png", b"data", file, picture, URL):
        request = GenerationRequest.model_validate({"prompt": "", "images": (source,)})
        assert request.content_image is source
    request = GenerationRequest.model_validate({"prompt": "", "images": [None, picture, "b.png"]})
    assert request.content_image is None
    assert request.style_images == (picture, "b.png")
    for wrong in (5, object(), {"url": "a.png"}):
        (message,) = refusals(GenerationRequest, {"prompt": "", "images": [wrong]})
        assert message.startswith(f"image_urls[0] must be {EXPECTED_SOURCE}, got ")
        assert "0x" not in message
        (message,) = refusals(GenerationRequest, {"prompt": "", "images": wrong})
        assert message.startswith(f"image_urls must be a list of at most 3 pictures, or one picture ({EXPECTED_SOURCE}), got ")
    both = refusals(GenerationRequest, {"prompt": "", "images": [], "image_urls": []})
    assert both == ["images and image_urls are the same field; give one of them"]


def test_texts_show_no_pictures_and_no_addresses() -> None:
    data = "data:image/png;base64," + "A" * 5000
    request = GenerationRequest.model_validate({"prompt": "", "images": [Image.new("RGB", (3, 4)), data, b"123"]})
    assert "['PIL image 3x4 RGB', 'data URI of 5,022 characters', '3 bytes']" in repr(request)
    with pytest.raises(ValidationError) as caught:
        GenerationRequest.model_validate(
            {"prompt": "", "images": [Image.new("RGB", (3, 4))] * 4, "seed": Image.new("1", (1, 1))}
        )
    assert "0x" not in str(caught.value)
    assert "PIL" not in str(caught.value)


def test_requests_do_not_change() -> None:
    request = GenerationRequest(prompt="")
    with pytest.raises(ValidationError, match="frozen"):
        request.prompt = "other"  # type: ignore[misc]


def test_seeds_are_drawn_once() -> None:
    request = GenerationRequest(prompt="")
    drawn = {request.with_seed().seed for _ in range(20)}
    assert len(drawn) > 15
    assert all(seed is not None and 1 <= seed < 2**31 for seed in drawn)
    assert GenerationRequest(prompt="", seed=7).with_seed().seed == 7


def test_a_configuration_has_its_own_limits_and_defaults() -> None:
    request = TINY(prompt="")
    assert request.resolved_size() == (128, 96)
    assert (request.num_inference_steps, request.guidance_scale, request.content_long_side) == (4, 3.0, 128)
    assert TINY(prompt="", image_urls=[URL], keep_size=True).resolved_size((640, 480)) == (256, 192)
    assert refusals(TINY, {"prompt": "", "image_size": {"width": 63, "height": 64}}) == [
        "image_size.width must be from 64 to 512, got 63"
    ]
    assert refusals(TINY, {"prompt": "", "image_size": {"width": 512, "height": 512}}) == [
        "image_size 512x512 is 262,144 pixels; at most 153,600 are accepted"
    ]
    assert refusals(TINY, {"prompt": "", "image_size": "square_hd"}) == [
        "image_size 'square_hd' is 1024x1024; a side may have at most 512 pixels"
    ]
    assert request_model(SizeLimits(64, 512, 300 * 512), RequestDefaults(128, 96, 4, 3.0, 128)) is TINY
    assert isinstance(request, GenerationRequest)


def test_requests_made_elsewhere_are_fitted() -> None:
    """What was set stays and is checked; what was not takes the other model's defaults."""
    fitted = GenerationRequest.model_validate({"prompt": "a", "images": ["x.png"], "seed": 3}).fitted_to(TINY)
    assert type(fitted) is TINY
    assert (fitted.prompt, fitted.image_urls, fitted.seed) == ("a", ("x.png",), 3)
    assert (fitted.resolved_size(), fitted.num_inference_steps) == ((128, 96), 4)
    with pytest.raises(ValidationError, match="'square_hd' is 1024x1024"):
        GenerationRequest(prompt="", image_size="square_hd").fitted_to(TINY)
    assert fitted.fitted_to(TINY) is fitted


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: request_model(SizeLimits(64, 128, 128 * 128)), "defaults outside the limits: image_size.width must be"),
        (lambda: request_model(defaults=RequestDefaults(steps=0)), "limits: num_inference_steps must be a whole number from 1"),
        (
            lambda: request_model(defaults=RequestDefaults(width=512.5)),  # type: ignore[arg-type]
            "limits: image_size.width must be a whole number",
        ),
        (lambda: request_model(5), "expected SizeLimits, RequestDefaults and True or False, got int"),  # type: ignore[arg-type]
        (lambda: SizeLimits(512, 256, 10**6), "expected 16 <= min_side <= max_side, got 512 and 256"),
        (lambda: SizeLimits(256, 512, 10), "max_pixels 10 is less than the smallest image has, 65536"),
    ],
)
def test_limits_that_contradict_each_other(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_parameters_are_json_without_pictures() -> None:
    request = GenerationRequest.model_validate({"prompt": "a", "images": [b"x"], "negative_prompt": "b"})
    parameters = request.parameters(seed=5, width=64, height=48)
    assert json.loads(json.dumps(parameters)) == parameters
    assert (parameters["seed"], parameters["width"], parameters["true_cfg_scale"]) == (5, 64, 2.0)
    assert "image_urls" not in parameters
    assert "true_cfg_scale" not in GenerationRequest(prompt="a").parameters(seed=5, width=64, height=48)


def test_importing_the_schema_is_light(repository: Path) -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'httpx'}"
    check = f"import sys, uso_engine.api.request, uso_engine.api.response; print({heavy} & set(sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", check], env={"PYTHONPATH": str(repository)}, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "set()"
