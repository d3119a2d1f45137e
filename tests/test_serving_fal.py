"""fal's queue: its client, its states, cancelling, and what is accepted outlives the server."""

from __future__ import annotations

import base64
import io
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import fal_client
import pytest
from PIL import Image
from serving_process import HTTP, Served, double_server, free_port, serving, wait_ready

MODEL = "fal-ai/uso"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("fal")
    command = double_server(folder, 0, "queue_width=1", "max_waiting=6", "deadline_s=20.0")
    with serving(command, folder / "log") as running:
        wait_ready(running)
        yield running


@pytest.fixture
def client(served: Served, monkeypatch: pytest.MonkeyPatch) -> fal_client.SyncClient:
    # Its addresses are https alone, with hosts from the environment; everything else is as it comes.
    monkeypatch.setattr("fal_client.client.QUEUE_URL_FORMAT", f"{served.url}/queue/")
    return fal_client.SyncClient(key="any")


def arguments(**fields: object) -> dict[str, object]:
    return {"prompt": "a house", "image_size": {"width": 64, "height": 64}, **fields}


def submit(url: str, **fields: object) -> dict[str, str]:
    answer = HTTP.post(f"{url}/queue/{MODEL}", json=arguments(**fields))
    assert answer.status_code == 200, answer.text
    ticket: dict[str, str] = answer.json()
    return ticket


def completed(status_url: str) -> dict[str, object]:
    """Follow a request to its end, by its events."""
    last: dict[str, object] = {}
    with HTTP.stream("GET", f"{status_url}/stream") as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                last = json.loads(line.removeprefix("data: "))
    assert last["status"] == "COMPLETED", last
    return last


def test_subscribe_with_fals_client(client: fal_client.SyncClient, served: Served) -> None:
    seen: list[fal_client.Status] = []
    picture = "data:image/png;base64," + base64.b64encode(png()).decode()
    fields = arguments(prompt="steps:10", input_image_urls=[picture], seed=5, num_images=2)
    answer = client.subscribe(MODEL, fields, on_queue_update=seen.append, with_logs=True, interval=0.05)
    assert answer["seed"] == 5 and len(answer["images"]) == 2
    assert isinstance(seen[-1], fal_client.Completed) and seen[-1].metrics["inference_time"] > 0
    assert any(isinstance(status, fal_client.InProgress) for status in seen)
    image = Image.open(io.BytesIO(HTTP.get(answer["images"][1]["url"]).content))
    assert image.getpixel((5, 5)) == (6, 0, 7)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, format="PNG")
    return buffer.getvalue()


def test_sync_mode_keeps_the_image_in_the_answer(client: fal_client.SyncClient) -> None:
    answer = client.subscribe(MODEL, arguments(sync_mode=True), interval=0.05)
    assert answer["images"][0]["url"].startswith("data:image/png;base64,")


def test_run_waits_for_the_answer(client: fal_client.SyncClient, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fal_client.client.RUN_URL_FORMAT", f"{served.url}/run/")
    fields = arguments(prompt="run steps:3", seed=5, num_images=2)
    answer = client.run(MODEL, fields)
    assert answer["seed"] == 5 and len(answer["images"]) == 2
    assert Image.open(io.BytesIO(HTTP.get(answer["images"][1]["url"]).content)).getpixel((5, 5)) == (6, 0, 7)
    queued = client.subscribe(MODEL, fields, interval=0.05)
    assert {**answer, "images": 0, "data": 0, "timings": 0, "meta": 0} == {
        **queued, "images": 0, "data": 0, "timings": 0, "meta": 0,
    }  # fmt: skip
    with pytest.raises(fal_client.FalClientHTTPError, match="X-Fal-Request-Timeout is for the queue"):
        client.run(MODEL, fields, start_timeout=5)
    with pytest.raises(fal_client.FalClientHTTPError, match="no such model"):
        client.run("fal-ai/flux", fields)


def test_states_positions_and_cancelling(client: fal_client.SyncClient, served: Served) -> None:
    first = client.submit(MODEL, arguments(prompt="steps:100000"))
    second = client.submit(MODEL, arguments(prompt="second"), priority="low")
    third = client.submit(MODEL, arguments(prompt="third"))
    wait_for(lambda: isinstance(first.status(), fal_client.InProgress))
    assert (second.status(), third.status()) == (fal_client.Queued(position=1), fal_client.Queued(position=0))
    unfinished = HTTP.get(third.response_url)
    assert (unfinished.status_code, unfinished.json()["errors"]) == (400, ["it is IN_QUEUE"])
    third.cancel()
    with pytest.raises(fal_client.FalClientHTTPError) as error:
        third.get(interval=0.05)
    assert error.value.status_code == 400 and "cancelled" in str(error.value)
    first.cancel()
    assert second.get(interval=0.05)["prompt"] == "second"
    done = HTTP.put(second.cancel_url)
    assert (done.status_code, done.json()["message"]) == (400, "ALREADY_COMPLETED")


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
    raise AssertionError("it did not happen")


def test_a_failure_is_the_answer(served: Served) -> None:
    ticket = submit(served.url, prompt="raise:image")
    status = completed(ticket["status_url"])
    assert "not a picture" in str(status["error"])
    answer = HTTP.get(ticket["response_url"])
    assert (answer.status_code, answer.json()["errors"]) == (400, ["image_urls[0] (a file): not a picture"])


def test_a_full_engine_is_waited_for_and_the_time_to_begin_counts(served: Served) -> None:
    blocking = submit(served.url, prompt="steps:60")
    late = HTTP.post(f"{served.url}/queue/{MODEL}", json=arguments(), headers={"X-Fal-Request-Timeout": "0.05"}).json()
    assert "not begun" in str(completed(late["status_url"])["error"])
    assert HTTP.get(late["response_url"]).status_code == 504
    assert completed(blocking["status_url"])["error"] is None


def test_the_queue_is_bounded(served: Served) -> None:
    tickets = [submit(served.url, prompt="steps:100000") for _ in range(6)]
    over = HTTP.post(f"{served.url}/queue/{MODEL}", json=arguments())
    assert (over.status_code, over.headers["retry-after"]) == (429, "10")
    for ticket in tickets:
        assert HTTP.put(ticket["cancel_url"]).json() == {"status": "CANCELLATION_REQUESTED"}
    for ticket in tickets:
        completed(ticket["status_url"])


@pytest.mark.parametrize(
    ("path", "fields", "headers", "status", "part"),
    [
        ("fal-ai/other", {}, {}, 404, "expected one of bytedance/uso, fal-ai/uso"),
        (MODEL, {"model": "bytedance/uso"}, {}, 400, "the path names the model"),
        (MODEL, {"image_urls": [], "input_image_urls": []}, {}, 400, "are the same field"),
        (MODEL, {"steps": 3}, {}, 400, "did you mean 'num_inference_steps'"),
        (MODEL + "?fal_webhook=http://127.0.0.1/x", {}, {}, 400, "fal_webhook is not supported"),
        (MODEL, {}, {"X-Fal-Queue-Priority": "high"}, 400, "must be normal or low"),
        (MODEL, {}, {"X-Fal-Request-Timeout": "soon"}, 400, "must be seconds from 0"),
    ],
)
def test_refusals(
    served: Served, path: str, fields: dict[str, object], headers: dict[str, str], status: int, part: str
) -> None:
    answer = HTTP.post(f"{served.url}/queue/{path}", json=arguments(**fields), headers=headers)
    assert (answer.status_code, part in answer.json()["errors"][0]) == (status, True)


def test_unknown_requests_are_404(served: Served) -> None:
    ticket = submit(served.url)
    completed(ticket["status_url"])
    other = ticket["status_url"].replace("fal-ai/uso", "bytedance/uso")
    for url in (other, f"{served.url}/queue/{MODEL}/requests/..%2f..%2fx/status", ticket["status_url"].replace("-7", "-4", 1)):
        assert HTTP.get(url).status_code == 404
    assert HTTP.put(f"{served.url}/queue/{MODEL}/requests/nothing/cancel").status_code == 404


def unfinished(folder: Path) -> list[Path]:
    return sorted((folder / "storage" / "queue").glob("*.request.json"))


def test_accepted_requests_survive_kill_9(tmp_path: Path) -> None:
    port = free_port()
    command = double_server(tmp_path, port, "queue_width=2")
    with serving(command, tmp_path / "first") as served:
        wait_ready(served)
        tickets = [submit(served.url, prompt="steps:100000", seed=1), submit(served.url, prompt="steps:5")]
        tickets += [submit(served.url, prompt=f"number {i}") for i in range(5)]
        completed(tickets[-1]["status_url"])
        tickets += [submit(served.url, prompt="steps:20") for _ in range(3)]
        served.end(signal.SIGKILL)
    assert unfinished(tmp_path)
    with serving(command, tmp_path / "second") as served:
        seeds = {completed(ticket["status_url"])["request_id"]: ticket for ticket in tickets[1:]}
        assert len(seeds) == 9
        for ticket in tickets[1:]:
            answer = HTTP.get(ticket["response_url"])
            assert answer.status_code == 200
            assert HTTP.get(answer.json()["images"][0]["url"]).status_code == 200
        HTTP.put(tickets[0]["cancel_url"])
        completed(tickets[0]["status_url"])
    assert unfinished(tmp_path) == []


def test_what_a_server_leaves_is_taken_up_by_another_and_cancelled_by_any(tmp_path: Path) -> None:
    first, second = (double_server(tmp_path, free_port(), "queue_width=1", "drain_s=0.1", "lease_s=1.5") for _ in range(2))
    with serving(second, tmp_path / "second") as other:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with serving(first, tmp_path / "first") as served:
                wait_ready(served)
                endless = submit(served.url, prompt="steps:100000")
                assert HTTP.put(endless["cancel_url"].replace(served.url, other.url)).status_code == 202
                assert "cancelled" in str(completed(endless["status_url"])["error"])
                long, short = submit(served.url, prompt="steps:50", seed=7), submit(served.url, prompt="short")
                url = long["status_url"].replace(served.url, other.url)
                assert HTTP.get(url).json()["status"] in ("IN_QUEUE", "IN_PROGRESS")
                served.end(number)
            assert completed(url)["error"] is None
            answer = HTTP.get(long["response_url"].replace(served.url, other.url)).json()
            assert HTTP.get(answer["images"][0]["url"].replace(served.url, other.url)).status_code == 200
            completed(short["status_url"].replace(served.url, other.url))
            assert len(other.lines(f"queue request {long['request_id']} is taken up")) == 1
