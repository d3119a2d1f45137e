"""fal's queue without a process: a storage that fails when a test says so, an engine that takes some turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

from uso_engine.config import load_config
from uso_engine.errors import OutputError
from uso_engine.serving.delivery import Delivery
from uso_engine.serving.files import ImageFiles
from uso_engine.serving.leases import Leases
from uso_engine.serving.queue_records import QueuedRequest, QueueRecords, new_id
from uso_engine.serving.queue_runner import QueueRunner
from uso_engine.serving.queue_upkeep import QueueUpkeep
from uso_engine.serving.service import Service
from uso_engine.serving.settings import RequestBounds
from uso_engine.serving.wire_request import wire_request

CONFIG = load_config("uso-tiny")


class MemoryStorage:
    """Files in a dictionary; writing those of a kind fails as often as a test says."""

    def __init__(self, fails: str = "", times: int = 0) -> None:
        self.files: dict[str, bytes] = {}
        self.fails, self.times = fails, times
        self.lost: list[bytes] = []

    def write(self, name: str, data: bytes, content_type: str) -> None:
        if self.fails and self.fails in name and self.times:
            self.times -= 1
            self.lost.append(data)
            raise OutputError(f"{name} cannot be written")
        self.files[name] = data

    def create(self, name: str, data: bytes, content_type: str) -> bool:
        if name in self.files:
            return False
        self.write(name, data, content_type)
        return True

    def read(self, name: str) -> bytes:
        try:
            return self.files[name]
        except KeyError:
            raise FileNotFoundError(name) from None

    def names(self, folder: str) -> list[str]:
        return sorted(name.removeprefix(f"{folder}/") for name in self.files if name.startswith(f"{folder}/"))

    def delete(self, name: str) -> None:
        self.files.pop(name, None)

    def signed_url(self, name: str, seconds: float) -> str:
        raise NotImplementedError


class Work:
    """What a queue asks of a service: an engine that takes some turns, and delivery."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(queue_width=1, max_waiting=4, expiry_s=60.0, bounds=RequestBounds())
        self.config, self.request_type = CONFIG, wire_request(CONFIG, RequestBounds())
        self.state = SimpleNamespace(phase="ready", ready=lambda: self)
        self.computing, self.times = 0, 0
        self.files = cast("ImageFiles", None)
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()
        self.may_end.set()

    async def generate(self, request: object, *, priority: int, timeout_s: float) -> str:
        self.computing += 1
        self.times += 1
        self.begun.set()
        try:
            for _ in range(4):
                await asyncio.sleep(0)
            await self.may_end.wait()
            return "result"
        finally:
            self.computing -= 1

    async def deliver(self, call: object, result: str, delivery: Delivery) -> bytes:
        await asyncio.to_thread(int)
        return b"answer"


@asynccontextmanager
async def queue(storage: MemoryStorage) -> AsyncIterator[tuple[QueueRunner, QueueRecords, Work]]:
    """A queue that works."""
    records, work = QueueRecords(storage), Work()
    runner = QueueRunner(cast("Service", work), records, "server")
    async with runner.running():
        yield runner, records, work


def queued() -> QueuedRequest:
    fields: dict[str, Any] = {"prompt": "a fish", "seed": 1, "image_urls": [], "model": "bytedance/uso"}
    return QueuedRequest(id=new_id(), model="fal-ai/uso", fields=fields, key="anonymous", base_url="http://127.0.0.1")


async def ended(runner: QueueRunner, identifier: str) -> None:
    """Wait until a queue does not answer for a request any more."""
    async with asyncio.timeout(20):
        while runner.has(identifier):
            await asyncio.sleep(0.001)


def upkeep_of(runner: QueueRunner, storage: MemoryStorage) -> QueueUpkeep:
    """The upkeep of a queue, whose rounds a test begins."""
    files = cast("ImageFiles", SimpleNamespace(sweep=lambda: None))
    return QueueUpkeep(runner, QueueRecords(storage), files, Leases(storage, "server", 30.0), expiry_s=60.0)
