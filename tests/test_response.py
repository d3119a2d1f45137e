"""Response and error bodies as the hosted API writes them, from results with pictures."""

from __future__ import annotations

import base64
import io
import json
import re
from datetime import datetime
from pathlib import Path

import pytest
from PIL import ExifTags, Image
from pydantic import ValidationError

from uso_engine.api.messages import validation_messages
from uso_engine.api.request import request_model
from uso_engine.api.response import VALIDATION_MESSAGE, GenerationResponse, error_body
from uso_engine.api.result import GenerationResult
from uso_engine.errors import OutputError
from uso_engine.imaging.encode import Encoder
from uso_engine.imaging.store import FileStore


def result(count: int = 2) -> GenerationResult:
    colours = [(200, 10, 10), (0, 0, 0), (10, 10, 200)]
    return GenerationResult(
        images=tuple(Image.new("RGB", (64, 48), colour) for colour in colours[:count]),
        seed=7,
        seeds=tuple(range(7, 7 + count)),
        has_nsfw_concepts=(False, True, False)[:count],
        prompt="a prompt",
        width=64,
        height=48,
        timings={"text": 0.5, "denoise": 2.25},
        tokens_used=420_000,
        parameters={"prompt": "a prompt", "seed": 7},
        model="uso-tiny",
    )


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_response_with_urls_is_the_hosted_one(tmp_path: Path) -> None:
    response = result().to_response(FileStore(tmp_path, "https://host.example/files"))
    body = json.loads(response.model_dump_json())
    names = [image["url"].removeprefix("https://host.example/files/") for image in body["images"]]
    expected = [
        {
            "url": f"https://host.example/files/{name}",
            "content_type": "image/png",
            "file_name": None,
            "file_size": None,
            "width": 64,
            "height": 48,
        }
        for name in names
    ]
    assert body == {
        "images": expected,
        "seed": 7,
        "has_nsfw_concepts": [False, True],
        "prompt": "a prompt",
        "timings": {"inference": 2.75},
        "data": [{**image, "b64_json": None} for image in expected],
        "meta": {"usage": {"tokens_used": 420_000}},
    }
    assert list(body) == ["images", "seed", "has_nsfw_concepts", "prompt", "timings", "data", "meta"]
    assert len(set(names)) == 2
    assert all(re.fullmatch(r"[0-9a-f]{32}\.png", name) for name in names)
    pixels = [opened((tmp_path / name).read_bytes()).getpixel((5, 5)) for name in names]
    assert pixels == [(200, 10, 10), (0, 0, 0)]


def test_response_in_sync_mode_holds_the_images() -> None:
    response = result().to_response(sync_mode=True, output_format="jpeg")
    for image, data in zip(response.images, response.data, strict=True):
        assert image.content_type == "image/jpeg"
        assert data.b64_json is not None
        assert image.url == data.url == "data:image/jpeg;base64," + data.b64_json
        assert opened(base64.b64decode(data.b64_json)).format == "JPEG"


def test_hosted_responses_can_be_read() -> None:
    """The example of the hosted API's documentation."""
    image = {
        "url": "https://cdn.example.com/a.png",
        "content_type": "image/png",
        "file_name": None,
        "file_size": None,
        "width": 1024,
        "height": 1024,
    }
    body = {
        "images": [image],
        "seed": 351168504,
        "has_nsfw_concepts": [False],
        "prompt": "…",
        "timings": {"inference": 10.547778039996047},
        "data": [image],
        "meta": {"usage": {"tokens_used": 420000}},
    }
    assert GenerationResponse.model_validate_json(json.dumps(body)).data[0].b64_json is None


def test_urls_need_a_store() -> None:
    with pytest.raises(ValueError, match="URLs need a store"):
        result().to_response()


def test_a_store_that_fails_is_an_error_not_a_gap(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot write"):
        result().to_response(FileStore(tmp_path / "file"))


def test_saving_numbers_several_images(tmp_path: Path) -> None:
    assert result(1).save(tmp_path / "one.png") == [tmp_path / "one.png"]
    paths = result(3).save(str(tmp_path / "new" / "out.jpg"))
    assert paths == [tmp_path / "new" / f"out-{j}.jpg" for j in range(3)]
    assert [opened(path.read_bytes()).format for path in paths] == ["JPEG"] * 3
    with pytest.raises(ValueError, match=r"expected \.png, \.jpg, \.jpeg or \.webp"):
        result().save(tmp_path / "a.gif")


def test_each_file_says_its_own_seed_and_only_when_asked(tmp_path: Path) -> None:
    with Encoder() as encoder:
        told = result().save(tmp_path / "told.png", parameters=True, encoder=encoder)
        silent = result().save(tmp_path / "silent.png", encoder=encoder)
    seeds = [json.loads(Image.open(path).getexif()[ExifTags.Base.ImageDescription])["seed"] for path in told]
    assert seeds == [7, 8]
    for path in silent:
        exif = Image.open(path).getexif()
        assert ExifTags.Base.ImageDescription not in exif
        assert str(exif[ExifTags.Base.Software]).startswith("AI generated")
        assert exif[ExifTags.Base.Model] == "uso-tiny"


def test_one_file_that_cannot_be_written_does_not_cost_the_others(tmp_path: Path) -> None:
    (tmp_path / "out-0.png").mkdir()
    with pytest.raises(OutputError, match=r"out-0\.png"):
        result(3).save(tmp_path / "out.png")
    assert (tmp_path / "out-1.png").is_file()
    assert (tmp_path / "out-2.png").is_file()


def test_results_are_complete() -> None:
    with pytest.raises(ValueError, match="got 1 images, 2 seeds, 1 flags"):
        GenerationResult((Image.new("RGB", (1, 1)),), 1, (1, 2), (False,), "", 1, 1, {}, 0, {})


def test_error_bodies() -> None:
    with pytest.raises(ValidationError) as caught:
        request_model(wire=True).model_validate({"prompt": "a", "model": "bytedance/uso", "image_urls": [], "num_images": 9})
    body = error_body(
        VALIDATION_MESSAGE,
        path="/v1/images/generations",
        status_code=400,
        request_id="r-1",
        errors=validation_messages(caught.value),
    ).model_dump()
    stamp = body.pop("timestamp")
    assert body == {
        "message": "Body validation error!",
        "path": "/v1/images/generations",
        "requestId": "r-1",
        "statusCode": 400,
        "errors": ("num_images must be a whole number from 1 to 4, got 9",),
        "fields": (),
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", stamp)
    assert datetime.fromisoformat(stamp).tzinfo is not None
    first, second = (error_body("Not found", path="/x", status_code=404) for _ in range(2))
    assert first.requestId != second.requestId
