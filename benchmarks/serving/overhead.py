"""What a request costs over HTTP beside what it costs the engine: processor time, in one process, in turn.

python -m benchmarks.serving.overhead

The client's own work is counted on the side of HTTP, so the difference is an upper bound. Both sides encode the image; over
HTTP it is stored besides.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import torch
import uvicorn

from benchmarks.arguments import BenchmarkParser
from benchmarks.measure import interleave, write_record
from uso_engine.async_engine import AsyncUSOEngine
from uso_engine.config import load_config
from uso_engine.engine import USOEngine
from uso_engine.serving.app import make_application
from uso_engine.serving.settings import ServerSettings
from uso_engine.serving.storage import open_storage
from uso_engine.serving.timed_protocol import timed_protocol

FIELDS = {"prompt": "a house", "image_urls": [], "image_size": {"width": 64, "height": 64}, "num_inference_steps": 1, "seed": 3}


def main(arguments: Sequence[str] | None = None) -> None:
    options = BenchmarkParser(__doc__, "rounds", "out", rounds="60").read(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, USOEngine.from_config("uso-tiny", device="cpu") as engine:

        @asynccontextmanager
        async def opened() -> AsyncIterator[AsyncUSOEngine]:
            yield AsyncUSOEngine(engine)

        settings = ServerSettings()
        application = make_application(load_config("uso-tiny"), settings, opened, open_storage(Path(folder).as_uri()))
        config = uvicorn.Config(
            application.asgi, port=0, http=timed_protocol(settings.transport), ws="none", log_config=None, access_log=False
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
        thread.start()
        while not server.started or application.state.phase != "ready":
            threading.Event().wait(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:

            def over_http() -> None:
                answer = client.post("/v1/images/generations", json={"model": "bytedance/uso", **FIELDS})
                assert answer.status_code == 201, answer.text

            def in_python() -> None:
                engine.generate(**FIELDS).to_response(sync_mode=True)  # type: ignore[arg-type]

            sides = {"engine": in_python, "HTTP": over_http}
            times = interleave(sides, rounds=options.rounds, device=torch.device("cpu"), clock="process")
        server.should_exit = True
        thread.join()
    overhead = times["HTTP"]["median_ms"] - times["engine"]["median_ms"]
    path = write_record(
        "serving overhead",
        {"clock": "process", "overhead_ms": overhead, "rounds": options.rounds, "sides": times},
        options.out,
    )
    print(f"{overhead:.2f} ms a request ({times}); recorded in {path}")


if __name__ == "__main__":
    main()
