"""An engine for tests of the server: it obeys its prompt, makes pictures of one colour, and needs neither torch nor weights.

``python served_double.py PORT STORAGE [SETTING=VALUE …]`` serves it as a process.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from PIL import Image

from uso_engine.api.events import Conditioning, Decoding, Done, Event, Queued, Stepped
from uso_engine.api.fields import image_seeds
from uso_engine.api.request import GenerationRequest
from uso_engine.api.result import GenerationResult
from uso_engine.api.statistics import EngineStatistics
from uso_engine.config import EngineConfig, load_config
from uso_engine.errors import (
    EngineDeadError,
    EngineDrainingError,
    FetchError,
    ImageError,
    MissingFileError,
    OutputError,
    QueueFullError,
    RequestTimeoutError,
    SafetyError,
)
from uso_engine.imaging.open import ImageLimits, open_image
from uso_engine.sampling.graph_statistics import GraphStatistics

ERRORS = {
    "image": ImageError("image_urls[0] (a file): not a picture"),
    "fetch": FetchError("https://pictures.example/a.png: could not be fetched"),
    "full": QueueFullError("max_requests", 4, 5, 2.4),
    "draining": EngineDrainingError("draining /secret/path"),
    "dead": EngineDeadError("dead /secret/path"),
    "safety": SafetyError("no classifier in /secret/path"),
    "output": OutputError("cannot write /secret/path"),
    "bug": RuntimeError("a bug in /secret/path"),
}
STEP_S = 0.02


class DoubleEngine:
    """Obeys words of the prompt: ``steps:N`` takes N steps of 20 ms, ``raise:NAME`` fails, ``die`` is dead from then
    on, ``noise`` makes previews large."""

    def __init__(self, config: EngineConfig, most_at_once: int = 64) -> None:
        self.config, self.places = config, config.queue.max_requests
        self.failure: BaseException | None = None
        self.running = 0
        self.begun: list[str] = []
        self.ended: list[str] = []
        self._most = most_at_once
        self._draining = self._cut_off = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def generate(
        self, request: GenerationRequest, /, *, priority: int = 0, timeout_s: float | None = None
    ) -> GenerationResult:
        async for event in self.stream(request, priority=priority, timeout_s=timeout_s):
            if isinstance(event, Done):
                return event.result
        raise AssertionError("a stream that ends without its result")

    async def stream(
        self, request: GenerationRequest, /, *, previews: bool = False, priority: int = 0, timeout_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        if self._draining:
            raise EngineDrainingError("draining")
        if self.running >= self._most:
            raise QueueFullError("max_requests", self._most, self._most + 1, 0.2)
        self.running += 1
        self._idle.clear()
        self.begun.append(request.prompt)
        try:
            async with asyncio.timeout(timeout_s):
                async for event in self._events(request, previews):
                    yield event
            self.ended.append(request.prompt)
        except TimeoutError as error:
            raise RequestTimeoutError("queue.max_request_s") from error
        finally:
            self.running -= 1
            if self.running == 0:
                self._idle.set()

    async def _events(self, request: GenerationRequest, previews: bool) -> AsyncIterator[Event]:
        yield Queued(self.running - 1)
        yield Conditioning()
        word = re.search(r"raise:(\w+)", request.prompt)
        if word is not None:
            raise ERRORS[word[1]]
        if "die" in request.prompt.split():
            self.failure = RuntimeError("the loop is dead")
            raise EngineDeadError("the loop is dead")
        limits = ImageLimits(allow_paths=False, allow_private_addresses=False)
        for place, source in enumerate(request.image_urls):
            if source is not None:
                await asyncio.to_thread(open_image, source, limits=limits, name=f"image_urls[{place}]")
        asked = re.search(r"steps:(\d+)", request.prompt)
        steps = int(asked[1]) if asked else 1
        for index in range(steps):
            await asyncio.sleep(STEP_S if asked else 0)
            if self._cut_off:
                raise EngineDrainingError("drained")
            yield Stepped(index, steps, _preview("noise" in request.prompt) if previews else None)
        yield Decoding()
        yield Done(self._result(request))

    def _result(self, request: GenerationRequest) -> GenerationResult:
        width, height = request.resolved_size(None if not request.keep_size else (64, 64))
        seed = request.with_seed().seed
        assert seed is not None
        seeds = image_seeds(seed, request.num_images)
        images = [Image.new("RGB", (width, height), (one % 256, one // 256 % 256, 7)) for one in seeds]
        return GenerationResult(
            images=tuple(images),
            seed=seed,
            seeds=seeds,
            has_nsfw_concepts=(False,) * len(seeds),
            prompt=request.prompt,
            width=width,
            height=height,
            timings={"queue": 0.0, "denoise": 0.01},
            tokens_used=request.num_inference_steps * 100,
            parameters={"prompt": request.prompt},
            output_format=request.output_format,
            sync_mode=request.sync_mode,
        )

    async def drain(self, deadline_s: float) -> int:
        self._draining = True
        try:
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        except TimeoutError:
            self._cut_off = True  # At their next steps, as the engine does it.
            return self.running
        return 0

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            0,
            self.running,
            0,
            5,
            500,
            100,
            1,
            1.0,
            2,
            0,
            0,
            {"done": len(self.ended)},
            {},
            GraphStatistics("auto", None, replayed=3),
        )


def _preview(noise: bool) -> Image.Image:
    return Image.frombytes("RGB", (512, 512), os.urandom(3 * 512 * 512)) if noise else Image.new("RGB", (16, 16), "red")


def _main(port: int, storage: str, *words: str) -> None:
    from uso_engine.serving.app import make_application
    from uso_engine.serving.auth import KeyRing
    from uso_engine.serving.json_log import log_as_json
    from uso_engine.serving.process import serve
    from uso_engine.serving.settings import RequestBounds, ServerSettings, Transport
    from uso_engine.serving.storage import open_storage

    config = load_config("uso-tiny")
    given = dict(word.split("=", 1) for word in words)
    keys = KeyRing(Path(given.pop("keys")), None) if "keys" in given else None
    settings = ServerSettings(port=port, has_keys=keys is not None, page=bool(int(given.pop("page", "0"))))
    numbers = {name: float(value) if "." in value else int(value) for name, value in given.items()}
    for field, kind in (("bounds", RequestBounds), ("transport", Transport)):
        named = {name: numbers.pop(name) for name in list(numbers) if name in kind.__dataclass_fields__}
        settings = replace(settings, **{field: replace(getattr(settings, field), **named)})
    most, load_s = int(numbers.pop("most_at_once", 64)), numbers.pop("load_s", 0)
    settings = replace(settings, **numbers)  # type: ignore[arg-type]

    @asynccontextmanager
    async def opened() -> AsyncIterator[DoubleEngine]:
        if load_s < 0:
            raise MissingFileError("no weights")
        await asyncio.sleep(load_s)
        yield DoubleEngine(config, most)

    log_as_json()
    serve(make_application(config, settings, opened, open_storage(storage), keys), settings)


if __name__ == "__main__":
    _main(int(sys.argv[1]), *sys.argv[2:])
