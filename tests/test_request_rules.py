"""Every rule of the schema, broken once each: the message names the field, the limit and the value."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from request_bodies import URL, body, refusals

from uso_engine.api.messages import validation_messages
from uso_engine.api.request import request_model
from uso_engine.imaging.sizes import PRESETS

Wire = request_model(wire=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "bytedance/seed"}, "model must be 'bytedance/uso', got 'bytedance/seed'"),
        ({"model": None}, "model must be 'bytedance/uso', got null"),
        ({"prompt": "x" * 4001}, "prompt must have at most 4000 characters, got 4001"),
        ({"prompt": None}, "prompt must be a string, got null"),
        ({"prompt": ["a"]}, "prompt must be a string, got a list of 1"),
        ({"prompt": "\ud800"}, "prompt must be text; it holds half of a surrogate pair"),
        ({"image_urls": [URL] * 4}, "image_urls must have at most 3 images, got 4"),
        ({"image_urls": URL}, f"image_urls must be a list of at most 3, got '{URL}'"),
        ({"image_urls": None}, "image_urls must be a list of at most 3, got null"),
        ({"image_urls": ["cat.png"]}, "image_urls[0] must be an http(s) URL or a data URI, got 'cat.png'"),
        (
            {"image_urls": [URL, "file:///etc/passwd"]},
            "image_urls[1] must be an http(s) URL or a data URI, got 'file:///etc/passwd'",
        ),
        ({"image_urls": [URL, 7]}, "image_urls[1] must be an http(s) URL or a data URI, got 7"),
        (
            {"image_urls": [URL, None]},
            "image_urls[1] must be an http(s) URL or a data URI, got null; only the first, the content image, may be left out",
        ),
        (
            {"image_size": "square_xl"},
            f"image_size must be one of {', '.join(PRESETS)}, or an object with width and height, got 'square_xl'",
        ),
        ({"image_size": {"width": 512}}, "image_size.height is required"),
        ({"image_size": {"width": "512", "height": 512}}, "image_size.width must be a whole number, got '512'"),
        ({"image_size": {"width": 512.5, "height": 512}}, "image_size.width must be a whole number, got 512.5"),
        ({"image_size": {"width": True, "height": 512}}, "image_size.width must be a whole number, got true"),
        ({"image_size": {"width": 255, "height": 512}}, "image_size.width must be from 256 to 2048, got 255"),
        ({"image_size": {"width": 512, "height": 2049}}, "image_size.height must be from 256 to 2048, got 2049"),
        (
            {"image_size": {"width": 1, "height": 9999}},
            "image_size.width must be from 256 to 2048, got 1; image_size.height must be from 256 to 2048, got 9999",
        ),
        ({"image_size": {"width": 512, "height": 512, "depth": 3}}, "image_size.depth is not a field; known: width, height"),
        ({"negative_prompt": "天" * 4001}, "negative_prompt must have at most 4000 characters, got 4001"),
        ({"negative_prompt": 3}, "negative_prompt must be a string, got 3"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 50, got 0"),
        ({"num_inference_steps": 51}, "num_inference_steps must be a whole number from 1 to 50, got 51"),
        ({"num_inference_steps": 28.5}, "num_inference_steps must be a whole number from 1 to 50, got 28.5"),
        ({"guidance_scale": 0.99}, "guidance_scale must be a number from 1 to 20, got 0.99"),
        ({"guidance_scale": 21}, "guidance_scale must be a number from 1 to 20, got 21"),
        ({"guidance_scale": "4"}, "guidance_scale must be a number from 1 to 20, got '4'"),
        ({"guidance_scale": True}, "guidance_scale must be a number from 1 to 20, got true"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number from 1 to 20, got NaN"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a number from 1 to 20, got Infinity"),
        ({"keep_size": "yes"}, "keep_size must be true or false, got 'yes'"),
        ({"keep_size": 1}, "keep_size must be true or false, got 1"),
        ({"num_images": 0}, "num_images must be a whole number from 1 to 4, got 0"),
        ({"num_images": 5}, "num_images must be a whole number from 1 to 4, got 5"),
        ({"num_images": 2.5}, "num_images must be a whole number from 1 to 4, got 2.5"),
        ({"num_images": True}, "num_images must be a whole number from 1 to 4, got true"),
        ({"num_images": "2"}, "num_images must be a whole number from 1 to 4, got '2'"),
        ({"num_images": None}, "num_images must be a whole number from 1 to 4, got null"),
        ({"seed": 0}, "seed must be a whole number from 1 to 9007199254740991, got 0"),
        ({"seed": -5}, "seed must be a whole number from 1 to 9007199254740991, got -5"),
        (
            {"seed": -1},
            "seed must be a whole number from 1 to 9007199254740991, got -1; leave it out to have one drawn",
        ),
        ({"seed": 2**53}, "seed must be a whole number from 1 to 9007199254740991, got 9007199254740992"),
        ({"seed": True}, "seed must be a whole number from 1 to 9007199254740991, got true"),
        ({"seed": "7"}, "seed must be a whole number from 1 to 9007199254740991, got '7'"),
        ({"seed": 10**5000}, "seed must be a whole number from 1 to 9007199254740991, got a number of 16610 bits"),
        ({"sync_mode": "true"}, "sync_mode must be true or false, got 'true'"),
        ({"enable_safety_checker": 0}, "enable_safety_checker must be true or false, got 0"),
        ({"output_format": "webp"}, "output_format must be 'png' or 'jpeg', got 'webp'"),
        ({"output_format": "PNG"}, "output_format must be 'png' or 'jpeg', got 'PNG'"),
        ({"true_cfg_scale": 0.5}, "true_cfg_scale must be a number from 1 to 20, got 0.5"),
        ({"style_scale": -1}, "style_scale must be a number from 0 to 4, got -1"),
        ({"style_scale": 4.5}, "style_scale must be a number from 0 to 4, got 4.5"),
        ({"content_long_side": 32}, "content_long_side must be a whole number from 64 to 1024, got 32"),
        ({"content_long_side": 1025}, "content_long_side must be a whole number from 64 to 1024, got 1025"),
        ({"num_image": 2}, "'num_image' is not a field of a request; did you mean 'num_images'?"),
        ({"steps": 4}, "'steps' is not a field of a request; did you mean 'num_inference_steps'?"),
        (
            {"width": 512},
            "'width' is not a field of a request; did you mean 'image_size'? It takes a name or {'width': …, 'height': …}",
        ),
        ({"images": [URL]}, "'images' is not a field of a request; did you mean 'image_urls'?"),
        (
            {"image_urls": [None, URL], "keep_size": True},
            "keep_size is true, but there is no content image (the first of image_urls) whose size could be kept",
        ),
        ({"image_urls": ["", "{braces}"]}, "image_urls[1] must be an http(s) URL or a data URI, got '{braces}'"),
    ],
)
def test_broken_rules_are_named(changes: dict[str, object], says: str) -> None:
    assert refusals(Wire, body(**changes)) == [says]


def test_unknown_fields_far_from_any_other_list_what_is_known() -> None:
    (message,) = refusals(Wire, body(xyzzy=1))
    assert message.startswith("'xyzzy' is not a field of a request; known: model, prompt, image_urls, image_size, ")


@pytest.mark.parametrize("name", ["model", "prompt", "image_urls"])
def test_required_fields_over_http(name: str) -> None:
    data = body()
    del data[name]
    (message,) = refusals(Wire, data)
    assert message.startswith(f"{name} is required")


def test_everything_wrong_is_said_at_once() -> None:
    messages = refusals(Wire, {"prompt": 5, "num_images": 9, "sede": 1, "image_urls": [1, 2]})
    assert len(messages) == 5
    assert messages[0] == "model is required"
    assert "image_urls[0]" in messages[2]
    assert "image_urls[1]" in messages[2]


@pytest.mark.parametrize("data", ["text", [], 5, None])
def test_a_request_is_an_object(data: object) -> None:
    (message,) = refusals(Wire, data)
    assert message.startswith("the request must be an object with fields, got")


def test_invalid_json_is_said() -> None:
    with pytest.raises(ValidationError) as caught:
        Wire.model_validate_json(b'{"model": ')
    (message,) = validation_messages(caught.value)
    assert message.startswith("Invalid JSON")


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": ""},
        {"prompt": "x" * 4000},
        {"prompt": "天" * 4000},
        {"negative_prompt": "天" * 4000},
        {"image_urls": []},
        {"image_urls": [None]},
        {"image_urls": ["", URL, URL]},
        {"image_urls": ["data:image/png;base64,AAAA", "HTTPS://HOST/x"]},
        {"guidance_scale": 1},
        {"guidance_scale": 20},
        {"num_inference_steps": 1},
        {"num_inference_steps": 50},
        {"num_images": 4},
        {"seed": 1},
        {"seed": 2**53 - 1},
        {"seed": None},
        {"image_size": {"width": 256, "height": 2048}},
        {"image_size": {"width": 2048, "height": 2048}},
        {"image_size": {"width": 512.0, "height": 512}},
        {"keep_size": True},
        {"output_format": "jpeg"},
    ],
)
def test_what_is_just_allowed(changes: dict[str, object]) -> None:
    Wire.model_validate(body(**changes))
