"""How a server loads its engine: pictures are opened for strangers, and the first request finds everything warm."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from uso_engine.config import EngineConfig

if TYPE_CHECKING:
    from uso_engine.async_engine import AsyncUSOEngine


@dataclass(frozen=True)
class EngineOptions:
    """What an operator says of the engine beside its configuration.

    Args:
        device: where it computes; None chooses.
        attention: attention backend.
        memory_budget_gib: GPU memory that may be used.
        fetch_from: the only hosts that pictures are fetched from; None for all public ones.
        private_hosts: hosts of the operator's own networks that pictures may come from.
    """

    device: str | None = None
    attention: str = "auto"
    memory_budget_gib: float | None = None
    fetch_from: tuple[str, ...] | None = None
    private_hosts: tuple[str, ...] = ()


@asynccontextmanager
async def opened_engine(config: EngineConfig, options: EngineOptions) -> AsyncIterator[AsyncUSOEngine]:
    """Load an engine, warm it up, and close it at the end."""
    # In a thread: importing PyTorch takes seconds, and the server answers meanwhile.
    await asyncio.to_thread(import_module, "uso_engine.async_engine")
    from uso_engine.async_engine import AsyncUSOEngine
    from uso_engine.imaging.decode_pool import DecodePool
    from uso_engine.imaging.open import ImageLimits

    with DecodePool() as pool:
        limits = ImageLimits(
            allow_private_addresses=False,
            allow_paths=False,
            private_hosts=options.private_hosts,
            allowed_hosts=options.fetch_from,
            decode_pool=pool,
        )
        loading = AsyncUSOEngine.from_config(
            config,
            device=options.device,
            attention=options.attention,
            memory_budget_gib=options.memory_budget_gib,
            image_limits=limits,
        )
        async with loading as engine:
            await asyncio.to_thread(engine.engine.warmup)
            yield engine
