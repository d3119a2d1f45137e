"""The server on a real local Ray: replicas of the embedded model on a CPU. In order: one becomes two, one dies, two become one.

`python -m benchmarks.scaling.local_ray` runs this and keeps what was seen.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from served_by_ray import SLOW_MACHINE, replica_processes
from serving_process import TESTS, Served, free_port, serving, wait_ready

from uso_engine.config import load_config
from uso_engine.engine import USOEngine
from uso_engine.imaging.data_uri import decode_data_uri
from uso_engine.imaging.encode import ImageMetadata, encode_image

pytest.importorskip("ray", reason="Ray is not installed: pip install 'uso-engine[ray]' (310 MB)")
pytestmark = pytest.mark.slow

PATH = "/v1/images/generations"
WAIT_S = 600.0
HTTP = httpx.Client(trust_env=False, timeout=WAIT_S, limits=httpx.Limits(max_connections=64, max_keepalive_connections=0))
MAX_REQUESTS, MAX_QUEUED = 4, 4
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("ray")
    text = (repository / "configs" / "uso-tiny.toml").read_text()
    config = folder / "few.toml"
    config.write_text(text.replace("[queue]\n", f"[queue]\nmax_requests = {MAX_REQUESTS}\n"))
    assert load_config(config).queue.max_requests == MAX_REQUESTS
    table = {
        "config": str(config),
        "storage": (folder / "storage").as_uri(),
        "server": {"port": free_port()},
        "replicas": {
            "least": 1,
            "most": 2,
            "cpus": 0.5,
            "max_queued": MAX_QUEUED,
            "upscale_s": 0,
            "downscale_s": 20,
            "report_s": 0.5,
            "options": {"device": "cpu"},
            "scaling": {"queue_s": 0.3},
        },
    }
    command = [sys.executable, str(TESTS / "served_by_ray.py"), json.dumps(table)]
    # Ray may be elsewhere than this environment's packages.
    with serving(command, folder / "log", **SLOW_MACHINE, PYTHONPATH=os.pathsep.join(sys.path)) as running:
        wait_ready(running)
        yield running


@pytest.fixture(scope="module")
def alone() -> Iterator[USOEngine]:
    with USOEngine.from_config("uso-tiny", device="cpu") as engine:
        yield engine


def body(seed: int, steps: int = 4) -> dict[str, Any]:
    return {
        "model": "bytedance/uso",
        "prompt": f"a house, {seed}",
        "image_urls": [],
        "image_size": {"width": 64, "height": 64},
        "num_inference_steps": steps,
        "seed": seed,
        "sync_mode": True,
    }


def bytes_alone(engine: USOEngine, sent: dict[str, Any]) -> bytes:
    fields = {name: value for name, value in sent.items() if name not in ("model", "sync_mode")}
    made = engine.generate(**fields)
    return encode_image(made.images[0], "png", ImageMetadata(made.model))


def bytes_of(answer: httpx.Response) -> bytes:
    return decoded(answer.json()["images"][0]["url"])


def decoded(uri: str) -> bytes:
    return decode_data_uri(uri, max_bytes=10**6, label="answer")


def ask(served: Served, sent: dict[str, Any]) -> httpx.Response:
    """An answer; one that is refused for now is asked for again when the answer says."""
    while True:
        answer = HTTP.post(f"{served.url}{PATH}", json=sent)
        if answer.status_code not in (429, 503):
            return answer
        time.sleep(float(answer.headers["retry-after"]))


def until(condition: Callable[[], bool]) -> float:
    """Seconds until something is so."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < WAIT_S
        time.sleep(0.2)
    return time.monotonic() - began


def until_two(served: Served) -> list[tuple[int, httpx.Response]]:
    """Seeds and answers of requests, six at a time, until there are two replicas; a fast machine does many before that."""
    came = threading.Event()

    def asking(seed: int) -> list[tuple[int, httpx.Response]]:
        answers = []
        while not came.is_set():
            answers.append((seed, ask(served, body(seed, steps=40))))
        return answers

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(asking, seed) for seed in range(10, 16)]
        try:
            until(lambda: len(replica_processes(served.process.pid)) == 2)
        finally:
            came.set()
        return [answer for future in futures for answer in future.result()]


def test_pictures_are_the_single_engines(served: Served, alone: USOEngine, record_property: Record) -> None:
    sent = [body(seed) for seed in (1, 2, 3)]
    answers = [ask(served, one) for one in sent]
    assert [answer.status_code for answer in answers] == [201] * 3
    assert [bytes_of(answer) for answer in answers] == [bytes_alone(alone, one) for one in sent]
    record_property("found", "3 pictures, equal byte for byte")


def test_the_durable_queue_and_stored_images(served: Served, alone: USOEngine, record_property: Record) -> None:
    sent = {name: value for name, value in body(5).items() if name not in ("model", "sync_mode")}
    ticket = HTTP.post(f"{served.url}/queue/fal-ai/uso", json=sent).json()
    until(lambda: HTTP.get(ticket["status_url"]).json()["status"] == "COMPLETED")
    answer = HTTP.get(ticket["response_url"])
    assert answer.status_code == 200, answer.text
    picture = HTTP.get(answer.json()["images"][0]["url"])
    assert picture.content == bytes_alone(alone, body(5))
    record_property("found", "accepted, completed, and its stored image equal byte for byte")


def test_a_queue_brings_a_second_replica(served: Served, alone: USOEngine, record_property: Record) -> None:
    # On a busy machine the first requests have waited long enough for a second one, which goes again.
    until(lambda: len(replica_processes(served.process.pid)) == 1)
    answers = until_two(served)
    assert {answer.status_code for _, answer in answers} == {201}
    seed, answer = answers[-1]
    assert bytes_of(answer) == bytes_alone(alone, body(seed, steps=40))
    record_property("found", f"one became two under load; {len(answers)} of {len(answers)} answered")


def test_what_a_killed_replica_had_is_answered_all_the_same(served: Served, alone: USOEngine, record_property: Record) -> None:
    """Two replicas, each with requests that have begun; one of them is gone from one moment to the next."""
    sent = [body(seed, steps=40) for seed in range(50, 56)]
    # Both have to be known to the router, so that both get work.
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: ask(served, body(seed)), range(40, 48)))
    begun: set[int] = set()

    def watched(one: dict[str, Any]) -> list[str]:
        while True:
            with HTTP.stream("POST", f"{served.url}{PATH}?stream=true", json=one) as answer:
                if answer.status_code in (200, 201):
                    return list(read(answer, one["seed"]))
                # A replica whose process is there may still be loading.
                assert answer.status_code in (429, 503), answer.read()
            time.sleep(float(answer.headers["retry-after"]))

    def read(answer: httpx.Response, seed: int) -> Iterator[str]:
        for line in answer.iter_lines():
            yield line
            if line == "event: conditioning":
                begun.add(seed)

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(watched, one) for one in sent]
        # All have begun, which is more than one replica takes.
        until(lambda: len(begun) == len(sent) > MAX_REQUESTS)
        before = replica_processes(served.process.pid)
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        streams = [future.result() for future in futures]
    for lines, one in zip(streams, sent, strict=True):
        events = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        assert events == ["queued", "conditioning", *["step"] * 40, "decoding", "done"], events
        (done,) = (line for place, line in enumerate(lines) if place and lines[place - 1] == "event: done")
        picture = json.loads(done.removeprefix("data: "))["images"][0]["url"]
        assert decoded(picture) == bytes_alone(alone, one)
    again = [line for line in served.log.read_text().splitlines() if "is run again" in line]
    assert again
    seconds = until(lambda: len(set(replica_processes(served.process.pid)) - {before[0]}) >= 1)
    found = f"6 requests in flight on two, kill -9 of one: {len(again)} run again, 6 answered, bytes equal"
    record_property("found", found)
    assert seconds >= 0


def test_a_client_that_leaves_cancels_its_request(served: Served, record_property: Record) -> None:
    def cancelled() -> float:
        text = HTTP.get(f"{served.url}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith('uso_engine_outcomes_total{outcome="cancelled"}')]
        return float(lines[0].split()[-1]) if lines else 0.0

    before = cancelled()
    with HTTP.stream("POST", f"{served.url}{PATH}?stream=true", json=body(70, steps=50)) as answer:
        for line in answer.iter_lines():
            if line == "event: step":
                break
    until(lambda: cancelled() > before)
    record_property("found", "the engine of the replica counts it as cancelled")


def test_more_than_there_is_room_for_is_refused_at_once(served: Served, record_property: Record) -> None:
    count = 8 * (MAX_REQUESTS + MAX_QUEUED)
    with ThreadPoolExecutor(count) as pool:
        posts = [pool.submit(HTTP.post, f"{served.url}{PATH}", json=body(100 + n, steps=16)) for n in range(count)]
        answers = [post.result() for post in posts]
    by_status = {status: [a for a in answers if a.status_code == status] for status in {a.status_code for a in answers}}
    assert set(by_status) == {201, 429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in by_status[429])
    found = ", ".join(f"{len(by_status[status])} times {status}" for status in sorted(by_status))
    record_property("found", f"of {count} at once: {found}")


def test_without_load_one_replica_stays(served: Served, alone: USOEngine, record_property: Record) -> None:
    # Two again, whatever has become of them meanwhile.
    assert {answer.status_code for _, answer in until_two(served)} == {201}
    until(lambda: len(replica_processes(served.process.pid)) == 1)
    one = body(90)
    assert bytes_of(ask(served, one)) == bytes_alone(alone, one)
    record_property("found", "two became one; requests go on")


def test_a_new_configuration_is_rolled_out_without_a_failed_request(
    served: Served, alone: USOEngine, record_property: Record
) -> None:
    before, rolled = set(replica_processes(served.process.pid)), threading.Event()

    def until_rolled(first: int) -> list[tuple[int, httpx.Response]]:
        answers: list[tuple[int, httpx.Response]] = []
        while not rolled.is_set():
            seed = first + len(answers) % 3
            answers.append((seed, HTTP.post(f"{served.url}{PATH}", json=body(seed))))
        return answers

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(until_rolled, first) for first in (200, 300)]
        served.process.send_signal(signal.SIGUSR1)
        try:
            until(lambda: '"rolled out"' in served.log.read_text())
            until(lambda: not before & set(replica_processes(served.process.pid)))
        finally:
            rolled.set()
        answers = [answer for future in futures for answer in future.result()]
    assert {answer.status_code for _, answer in answers} == {201}
    expected = {seed: bytes_alone(alone, body(seed)) for seed, _ in answers}
    assert all(bytes_of(answer) == expected[seed] for seed, answer in answers)
    record_property("found", f"all replicas replaced meanwhile; {len(answers)} of {len(answers)} answered, bytes equal")
