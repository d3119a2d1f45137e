"""The hosted API's dialect over HTTP: its request, its answer, its errors, events, and what a caller may not do."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from PIL import Image
from serving_process import HTTP, Served, double_server, serving, wait_ready

from uso_engine.api.response import GenerationResponse

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("hosted")
    with serving(double_server(folder, 0, "most_at_once=3", "max_steps=30"), folder / "log") as running:
        wait_ready(running)
        yield running


def body(**fields: object) -> dict[str, Any]:
    small = {"width": 64, "height": 64}
    return {"model": "bytedance/uso", "prompt": "a house", "image_urls": [None], "image_size": small, "seed": 3, **fields}


def data_uri(colour: str = "red") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_the_documented_call_with_requests(served: Served) -> None:
    response = requests.post(
        f"{served.url}{PATH}",
        headers={"Authorization": "Bearer <YOUR_API_KEY>", "Content-Type": "application/json"},
        json=body(image_urls=[data_uri(), data_uri("blue")], num_images=2),
        timeout=60,
    )
    assert response.status_code == 201
    answer = GenerationResponse.model_validate_json(response.content)
    assert (answer.seed, answer.has_nsfw_concepts, answer.prompt) == (3, (False, False), "a house")
    assert list(response.json()) == ["images", "seed", "has_nsfw_concepts", "prompt", "timings", "data", "meta"]
    for image, seed in zip(answer.images, (3, 4), strict=True):
        assert image.url.startswith(f"{served.url}/files/")
        found = requests.get(image.url, timeout=60)
        assert found.headers["content-type"] == image.content_type == "image/png"
        assert found.headers["cache-control"].startswith("private, max-age=86")
        assert found.headers["x-content-type-options"] == "nosniff"
        assert Image.open(io.BytesIO(found.content)).getpixel((5, 5)) == (seed, 0, 7)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_documented_call_with_fetch(served: Served) -> None:
    script = """
    const response = await fetch(process.argv[1] + '/v1/images/generations', {
      method: 'POST',
      headers: { 'Authorization': 'Bearer <YOUR_API_KEY>', 'Content-Type': 'application/json' },
      body: process.argv[2],
    });
    const data = await response.json();
    const image = await fetch(data.images[0].url);
    console.log(JSON.stringify([response.status, data.seed, image.headers.get('content-type'),
                                (await image.arrayBuffer()).byteLength > 50]));
    """
    command = ["node", "--input-type=module", "-e", script, served.url, json.dumps(body())]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(answer.stdout) == [201, 3, "image/png", True]


def test_sync_mode_brings_the_image_itself(served: Served) -> None:
    answer = HTTP.post(f"{served.url}{PATH}", json=body(sync_mode=True, output_format="jpeg")).json()
    assert answer["data"][0]["url"] == "data:image/jpeg;base64," + answer["data"][0]["b64_json"] == answer["images"][0]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).format == "JPEG"


@pytest.mark.parametrize(
    ("change", "field", "part"),
    [
        ({"prompt": 3}, "prompt", "prompt must be a string, got 3"),
        ({"promt": "x"}, "promt", "did you mean 'prompt'"),
        ({"model": "bytedance/other"}, "model", "model must be 'bytedance/uso', got 'bytedance/other'"),
        ({"num_images": 5}, "num_images", "from 1 to 4, got 5"),
        ({"num_inference_steps": 31}, "num_inference_steps", "from 1 to 30, got 31"),
        ({"image_urls": ["/etc/passwd"]}, "image_urls", "image_urls[0] must be an http(s) URL or a data URI"),
        ({"image_urls": ["file:///etc/passwd"]}, "image_urls", "image_urls[0] must be an http(s) URL or a data URI"),
        ({"image_size": {"width": 4096, "height": 64}}, "image_size", "image_size.width must be from 64 to 1024"),
        ({"seed": 0}, "seed", "seed must be a whole number from 1 to"),
        ({"num_images": True}, "num_images", "got true"),
        ({"image_urls": ["data:image/png;base64,AAAA"]}, "image_urls", "image_urls[0] (data URI of"),
        ({"image_urls": ["http://127.0.0.1:9/a.png"]}, "image_urls", "http://127.0.0.1:9/a.png: could not be fetched"),
    ],
)
def test_what_breaks_the_schema_is_named(served: Served, change: dict[str, object], field: str, part: str) -> None:
    response = HTTP.post(f"{served.url}{PATH}", json=body(**change))
    answer = response.json()
    assert response.status_code == answer["statusCode"] == 400
    assert list(answer) == ["message", "path", "requestId", "statusCode", "timestamp", "errors", "fields"]
    assert (answer["message"], answer["path"], answer["fields"]) == ("Body validation error!", PATH, [field])
    assert part in answer["errors"][0]
    assert answer["requestId"] == response.headers["x-request-id"]
    assert datetime.fromisoformat(answer["timestamp"]).tzinfo is not None


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is not JSON"),
        (b"[]", "must be a JSON object, got a list"),
        (b"null", "got null"),
        (b"{" * 3000, "is not JSON"),
        (b'{"prompt": NaN}', "is not JSON"),
        (b'{"prompt": "\xff"}', "is not JSON"),
        (b'{"model": "bytedance/uso", "image_urls": [], "prompt": ' + b"9" * 4000 + b"}", "prompt must be a string"),
        (b'{"model": "bytedance/uso", "image_urls": [], "prompt": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
def test_what_is_no_request_is_refused(served: Served, content: bytes, part: str) -> None:
    response = HTTP.post(f"{served.url}{PATH}", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert part in response.json()["errors"][0]


def test_other_refusals_have_the_same_body(served: Served) -> None:
    calls = {
        404: HTTP.get(f"{served.url}/v1/nothing"),
        405: HTTP.get(f"{served.url}{PATH}"),
        415: HTTP.post(f"{served.url}{PATH}", content=b"{}", headers={"content-type": "text/plain"}),
    }
    for status, response in calls.items():
        assert response.status_code == response.json()["statusCode"] == status
        assert response.headers["content-type"] == "application/json"
    query = HTTP.post(f"{served.url}{PATH}?stream=1", json=body())
    assert (query.status_code, query.json()["fields"]) == (400, ["stream"])


@pytest.mark.parametrize(
    ("name", "status", "told"),
    [
        ("image", 400, ["image_urls[0] (a file): not a picture"]),
        ("fetch", 400, ["https://pictures.example/a.png: could not be fetched"]),
        ("draining", 503, ["it finishes what it has and accepts no more"]),
        ("dead", 503, ["it has failed"]),
        ("safety", 500, []),
        ("output", 503, []),
        ("bug", 500, []),
    ],
)
def test_what_the_engine_raises_becomes_a_status(served: Served, name: str, status: int, told: list[str]) -> None:
    response = HTTP.post(f"{served.url}{PATH}", json=body(prompt=f"raise:{name}"))
    assert (response.status_code, response.json()["errors"]) == (status, told)
    assert "secret" not in response.text
    assert ("retry-after" in response.headers) == (status == 503)


def test_a_full_queue_is_429_with_the_time_to_come_again(served: Served) -> None:
    response = HTTP.post(f"{served.url}{PATH}", json=body(prompt="raise:full"))
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert "queue.max_requests is 4" in response.json()["errors"][0]


def test_the_deadline_ends_a_request(tmp_path: Path) -> None:
    with serving(double_server(tmp_path, 0, "deadline_s=0.5"), tmp_path / "log") as hurried:
        wait_ready(hurried)
        response = HTTP.post(f"{hurried.url}{PATH}", json=body(prompt="steps:100000"), timeout=30)
    assert (response.status_code, response.json()["message"]) == (504, "The request was not done in time.")


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, object]]]:
    name = ""
    for line in response.iter_lines():
        kind, _, text = line.partition(": ")
        if kind == "event":
            name = text
        elif kind == "data":
            yield name, json.loads(text)


def test_progress_comes_as_events(served: Served) -> None:
    url = f"{served.url}{PATH}?stream=true&previews=true"
    with HTTP.stream("POST", url, json=body(prompt="steps:3")) as response:
        assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        found = list(events(response))
    assert [name for name, _ in found] == ["queued", "conditioning", "step", "step", "step", "decoding", "done"]
    assert [(data["index"], data["steps"]) for name, data in found if name == "step"] == [(0, 3), (1, 3), (2, 3)]
    preview = str(found[2][1]["preview"])
    assert Image.open(io.BytesIO(base64.b64decode(preview.removeprefix("data:image/jpeg;base64,")))).size == (16, 16)
    assert GenerationResponse.model_validate_json(json.dumps(found[-1][1])).seed == 3


def test_an_error_among_the_events_has_the_same_body(served: Served) -> None:
    with HTTP.stream("POST", f"{served.url}{PATH}?stream=true", json=body(prompt="raise:bug")) as response:
        name, data = list(events(response))[-1]
    assert (name, data["statusCode"], data["message"]) == ("error", 500, "Internal server error")


def gauge(served: Served, name: str) -> float:
    text = HTTP.get(f"{served.url}/metrics").text
    return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[-1])


def test_a_client_that_leaves_ends_its_request(served: Served) -> None:
    with closing(HTTPConnection("127.0.0.1", served.port)) as connection:
        connection.request("POST", PATH, json.dumps(body(prompt="steps:100000")), {"content-type": "application/json"})
        while gauge(served, "uso_engine_running") == 0:
            pass
    with HTTP.stream("POST", f"{served.url}{PATH}?stream=true", json=body(prompt="steps:100000")) as response:
        assert next(events(response))[0] == "queued"
        left = response.headers["x-request-id"]
    while gauge(served, "uso_engine_running") > 0:
        pass  # No deadline ends them: only that their clients have left.
    assert served.line_of(left)["outcome"] == "cancelled"
    assert [line["outcome"] for line in served.lines()].count("cancelled") == 2


def test_health_readiness_and_metrics(served: Served) -> None:
    assert HTTP.get(f"{served.url}/healthz").json() == {"status": "ok"}
    assert HTTP.get(f"{served.url}/readyz").json() == {"status": "ready"}
    HTTP.post(f"{served.url}{PATH}", json=body())
    text = HTTP.get(f"{served.url}/metrics").text
    for name in (
        'uso_requests_total{dialect="hosted",outcome="ok"}',
        'uso_request_seconds_bucket{dialect="hosted",le="0.01"}',
        'uso_stage_seconds_count{stage="denoise"}',
        "uso_ready 1.0",
        "uso_engine_steps_total 5.0",
        "uso_body_bytes 0.0",
    ):
        assert name in text


def test_models_are_listed_as_openai_does(served: Served) -> None:
    answer = HTTP.get(f"{served.url}/v1/models").json()
    assert [model["id"] for model in answer["data"]] == ["bytedance/uso", "uso"]
    assert answer["object"] == "list" and answer["data"][0]["object"] == "model"


def test_log_lines_have_identifiers_and_no_prompts(served: Served) -> None:
    given = "proxy-17-abcdef"
    HTTP.post(f"{served.url}{PATH}", json=body(prompt="hush hush"), headers={"x-request-id": given})
    line = served.line_of(given)
    assert (line["path"], line["status"], line["dialect"], line["images"]) == (PATH, 201, "hosted", 1)
    hostile = HTTP.post(f"{served.url}{PATH}", json=body(), headers={"x-request-id": 'a" {} b, long enough'})
    assert len(hostile.headers["x-request-id"]) == 32
    text = served.log.read_text()
    assert "hush" not in text and "YOUR_API_KEY" not in text
    name = HTTP.post(f"{served.url}{PATH}", json=body()).json()["images"][0]["url"].rpartition("/")[2]
    assert HTTP.get(f"{served.url}/files/{name}").status_code == 200
    assert name not in served.log.read_text()


def test_no_name_leads_out_of_the_files(served: Served, tmp_path: Path) -> None:
    for name in ("..%2f..%2fetc%2fpasswd", "../queue/x", ".writable", "%00", "a" * 300, "6b0a23fc-" + "0" * 32 + ".png"):
        assert HTTP.get(f"{served.url}/files/{name}").status_code in (400, 404)
