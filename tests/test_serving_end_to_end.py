"""The real server with the embedded model, as ``uso-engine serve`` starts it: same bytes as Python, keys, drain, limits."""

from __future__ import annotations

import base64
import io
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from PIL import Image
from serving_process import HTTP, Served, serving, wait_ready

from uso_engine.engine import USOEngine
from uso_engine.imaging.encode import ImageMetadata, encode_image
from uso_engine.imaging.open import ImageLimits

KEY = "a-key-of-this-test"
PATH = "/v1/images/generations"
SIZE = {"width": 64, "height": 64}


def command(folder: Path, *options: str) -> list[str]:
    common = ["--port", "0", "--device", "cpu", "--storage", (folder / "storage").as_uri()]
    return [sys.executable, "-c", "from uso_engine.cli import main; main()", "serve", *common, *options]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("real")
    keys = folder / "keys"
    keys.write_text(f"# tests\nalice:{KEY}\n")
    options = ["--keys", str(keys), "--max-steps", "8", "--max-images", "2", "--max-pixels", "16384", "--alias", "tiny"]
    with serving(command(folder, *options), folder / "log") as running:
        wait_ready(running)
        yield running


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(buffer, format="PNG")
    return buffer.getvalue()


def fields() -> dict[str, Any]:
    picture = "data:image/png;base64," + base64.b64encode(png("red")).decode()
    return {
        "prompt": "a house",
        "image_urls": [picture, picture],
        "image_size": SIZE,
        "num_inference_steps": 3,
        "num_images": 2,
        "seed": 11,
    }


def test_an_image_over_http_is_the_one_from_python(served: Served) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "bytedance/uso", **fields()}
    answers: list[requests.Response] = []

    def ask(extra: dict[str, Any]) -> None:
        answers.append(requests.post(f"{served.url}{PATH}", json={**body, **extra}, headers=headers, timeout=120))

    # Two at once, so that company would show.
    beside = threading.Thread(target=ask, args=({"seed": 500, "prompt": "another"},))
    beside.start()
    ask({})
    beside.join()
    assert [answer.status_code for answer in answers] == [201, 201]
    (answer,) = (one.json() for one in answers if one.json()["seed"] == 11)
    assert answer["has_nsfw_concepts"] == [False, False]
    with USOEngine.from_config("uso-tiny", device="cpu", image_limits=ImageLimits()) as engine:
        alone = engine.generate(**fields())
    for image, picture in zip(answer["images"], alone.images, strict=True):
        assert requests.get(image["url"], timeout=60).content == encode_image(picture, "png", ImageMetadata(alone.model))


def test_the_configured_limits_hold_and_are_published(served: Served) -> None:
    schema = HTTP.get(f"{served.url}/openapi.json").json()["components"]["schemas"]["GenerationRequest"]["properties"]
    assert schema["num_inference_steps"]["maximum"] == 8 and schema["num_images"]["maximum"] == 2
    headers = {"Authorization": f"Bearer {KEY}"}
    for change in ({"num_inference_steps": 9}, {"num_images": 3}, {"image_size": {"width": 144, "height": 128}}):
        answer = HTTP.post(f"{served.url}{PATH}", json={"model": "bytedance/uso", **fields(), **change}, headers=headers)
        assert answer.status_code == 400


def test_openais_client_with_files_and_an_alias(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
        answer = client.images.edit(
            model="tiny", image=[png("red"), png("blue")], prompt="a boat", size="64x64", extra_body={"num_inference_steps": 2}
        )
    assert answer.data is not None and answer.data[0].url is not None
    assert Image.open(io.BytesIO(HTTP.get(answer.data[0].url).content)).size == (64, 64)


def test_without_a_key_there_is_nothing(served: Served) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}, {"Authorization": KEY}):
        answer = HTTP.post(f"{served.url}{PATH}", json=fields(), headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert HTTP.get(f"{served.url}/metrics", headers=headers).status_code == 401
    assert KEY not in served.log.read_text()


def test_paths_and_private_addresses_are_not_opened(served: Served) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for url in (f"{served.url}/healthz", "http://169.254.169.254/latest", "http://[::1]/", "file:///etc/passwd", "/etc/passwd"):
        body = {"model": "bytedance/uso", "prompt": "", "image_urls": [url]}
        assert HTTP.post(f"{served.url}{PATH}", json=body, headers=headers).status_code == 400


def test_the_engines_counters_are_metrics(served: Served) -> None:
    text = HTTP.get(f"{served.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    names = ("uso_engine_steps_total", "uso_engine_occupancy", "uso_cache_lookups_total", "uso_ready 1.0", "uso_stage_seconds")
    assert all(name in text for name in names)


def test_a_signal_lets_what_runs_finish(served: Served) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    lasting = {"model": "bytedance/uso", **fields(), "image_size": {"width": 128, "height": 128}, "num_inference_steps": 8}
    answers: list[int] = []

    def ask() -> None:
        answers.append(HTTP.post(f"{served.url}{PATH}", json=lasting, headers=headers).status_code)

    with HTTP.stream("POST", f"{served.url}{PATH}?stream=true", json=lasting, headers=headers) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: queued"
        served.process.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert "event: done" in rest
    assert served.process.wait(60) == 0


def test_others_reach_nothing_without_keys(tmp_path: Path) -> None:
    options = ("--host", "0.0.0.0")
    answer = subprocess.run(command(tmp_path, *options), capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 2 and "no keys are configured" in answer.stderr
