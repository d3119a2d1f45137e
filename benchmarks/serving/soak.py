"""Keep a server busy for hours and watch what it holds: memory, descriptors, threads, answers by status.

A mixed load of small requests of all dialects, some of them bad or given up; samples and curves go to benchmarks/results/soak.

python -m benchmarks.serving.soak --hours 1 --clients 4
python -m benchmarks.serving.soak --minutes 1 --clients 64    nothing but 2xx, 400 that were meant, 429 and 503 may come back
"""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.arguments import BenchmarkParser, amount, whole_number
from benchmarks.measure import RESULTS, machine

from .curves import draw
from .real_server import RealServer, real_server

SIZES = ({"width": 64, "height": 64}, {"width": 128, "height": 64})
PATH = "/v1/images/generations"
_SAMPLES = 240


class Client(threading.Thread):
    """One client: asks, reads, sometimes errs or leaves, until it is told to end."""

    def __init__(self, server: RealServer, seed: int, ending: threading.Event) -> None:
        super().__init__(name=f"client {seed}")
        self._url, self._random, self._ending = server.url, random.Random(seed), ending
        self.statuses: Counter[str] = Counter()

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=300, trust_env=False) as http:
            while not self._ending.is_set():
                try:
                    self.statuses[self._once(http)] += 1
                except httpx.ReadTimeout:
                    self.statuses["left"] += 1
                except httpx.TransportError as error:
                    self.statuses[type(error).__name__] += 1

    def _once(self, http: httpx.Client) -> str:
        kind = self._random.choices(("hosted", "openai", "fal", "stream", "bad", "leaves"), (5, 2, 2, 2, 1, 1))[0]
        body = self._body()
        if kind == "openai":
            answer = http.post(PATH, json={"prompt": body["prompt"], "size": "64x64", "num_inference_steps": 1})
        elif kind == "fal":
            return self._queued(http, {name: value for name, value in body.items() if name != "model"})
        elif kind == "stream":
            answer = http.post(f"{PATH}?stream=true&previews=true", json=body)
        elif kind == "bad":
            answer = http.post(PATH, json={**body, "num_images": 9})
            return f"{answer.status_code} meant" if answer.status_code == 400 else str(answer.status_code)
        else:
            answer = http.post(PATH, json=body, timeout=0.05 if kind == "leaves" else 300)
        if answer.status_code == 201:
            return str(http.get(answer.json()["images"][0]["url"].removeprefix(self._url)).status_code)
        return self._waited(answer)

    def _queued(self, http: httpx.Client, body: dict[str, Any]) -> str:
        answer = http.post("/queue/fal-ai/uso", json=body)
        if answer.status_code != 200:
            return self._waited(answer)
        with http.stream("GET", answer.json()["status_url"].removeprefix(self._url) + "/stream") as events:
            for _ in events.iter_lines():
                continue
        return str(http.get(answer.json()["response_url"].removeprefix(self._url)).status_code)

    def _waited(self, answer: httpx.Response) -> str:
        if answer.status_code in (429, 503):
            self._ending.wait(min(2.0, float(answer.headers["retry-after"])))
        return str(answer.status_code)

    def _body(self) -> dict[str, Any]:
        return {
            "model": "bytedance/uso",
            "prompt": f"a house, number {self._random.randrange(10_000)}",
            "image_urls": [],
            "image_size": self._random.choice(SIZES),
            "num_inference_steps": self._random.choice((1, 2)),
            "output_format": self._random.choice(("png", "jpeg")),
        }


def run(seconds: float, clients: int, folder: Path) -> dict[str, Any]:
    """Put the load on a server; what it held over time, and how its answers were."""
    options = ("--expiry", "120", "--max-waiting", "200")
    with real_server(folder, *options) as server:
        ending = threading.Event()
        crowd = [Client(server, seed, ending) for seed in range(clients)]
        for client in crowd:
            client.start()
        began, samples = time.monotonic(), []
        while (passed := time.monotonic() - began) < seconds:
            answered = sum(sum(client.statuses.values()) for client in crowd)
            held = {"resident_mib": server.resident_mib(), "files": server.open_files(), "threads": server.threads()}
            samples.append({"seconds": round(passed, 1), "answers": answered, **held})
            ending.wait(min(seconds / _SAMPLES, 30))
        ending.set()
        for client in crowd:
            client.join()
    statuses: Counter[str] = sum((client.statuses for client in crowd), Counter())
    return {"seconds": seconds, "clients": clients, "statuses": dict(sorted(statuses.items())), "samples": samples}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__)
    parser.add_argument("--hours", type=amount, metavar="N")
    parser.add_argument("--minutes", type=amount, metavar="N")
    parser.add_argument("--clients", type=whole_number, default=4, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak", metavar="FOLDER")
    options = parser.read(arguments)
    seconds = (options.hours or 0.0) * 3600 + (options.minutes or 0.0) * 60
    if not seconds:
        parser.error("no time was given: expected --hours or --minutes")
    with tempfile.TemporaryDirectory() as folder:
        record = {"machine": machine(), **run(seconds, options.clients, Path(folder))}
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{options.clients}-clients-{seconds / 60:g}-minutes"
    (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / f"{name}.svg").write_text(draw(record["samples"], ("resident_mib", "files", "threads", "answers")))
    every = max(1, len(record["samples"]) // 8)
    print(json.dumps(record["statuses"]), "resident MiB:", *(round(one["resident_mib"]) for one in record["samples"][::every]))


if __name__ == "__main__":
    main()
