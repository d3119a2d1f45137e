"""``uso-engine serve`` and ``uso-engine new-key``."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import fail, reports_errors, say

if TYPE_CHECKING:
    from uso_engine.config import EngineConfig
    from uso_engine.serving.auth import KeyRing
    from uso_engine.serving.engine_state import OpenEngine
    from uso_engine.serving.served_engine import ServedEngine

_HTTP = "HTTP"
_LIMITS = "Limits"
_ENGINE = "Engine"


@reports_errors
def serve(
    config: Annotated[str, typer.Option(help="A configuration's name or TOML file.")] = "uso-tiny",
    host: Annotated[str, typer.Option(help="Address to bind to.", rich_help_panel=_HTTP)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.", rich_help_panel=_HTTP)] = 8000,
    keys: Annotated[
        Path | None,
        typer.Option(
            help="File of keys: a line name:key or name:sha256:HASH each (`uso-engine new-key`). Read again when it changes. "
            "USO_API_KEYS holds further ones, separated by commas.",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let everybody in, also where others reach the address.", rich_help_panel=_HTTP)
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option(help="Where images and the queue are kept: file:///folder or s3://bucket/prefix.", rich_help_panel=_HTTP),
    ] = None,
    signed_urls: Annotated[
        bool, typer.Option("--signed-urls", help="Answer with URLs that the object store signs.", rich_help_panel=_HTTP)
    ] = False,
    expiry: Annotated[
        float, typer.Option(min=1, help="Seconds that images and answers are kept.", rich_help_panel=_HTTP)
    ] = 86_400.0,
    public_url: Annotated[
        str | None, typer.Option(help="What clients call this server, behind a proxy.", rich_help_panel=_HTTP)
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Name that the Host header may have. Repeat.", rich_help_panel=_HTTP)
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may use this server. Repeat.", rich_help_panel=_HTTP)
    ] = None,
    alias: Annotated[list[str] | None, typer.Option(help="Further name of the model. Repeat.", rich_help_panel=_HTTP)] = None,
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Serve no page at /.", rich_help_panel=_HTTP)] = False,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts into the log.", rich_help_panel=_HTTP)
    ] = False,
    max_steps: Annotated[int, typer.Option(min=1, max=50, help="The most steps.", rich_help_panel=_LIMITS)] = 50,
    max_images: Annotated[int, typer.Option(min=1, max=4, help="The most images.", rich_help_panel=_LIMITS)] = 4,
    max_pixels: Annotated[
        int | None, typer.Option(min=256, help="The most pixels of an image.", rich_help_panel=_LIMITS)
    ] = None,
    deadline: Annotated[
        float, typer.Option(min=0.1, help="Seconds until a request is given up.", rich_help_panel=_LIMITS)
    ] = 600.0,
    max_body: Annotated[int, typer.Option(min=1, help="The most MiB of a request.", rich_help_panel=_LIMITS)] = 64,
    rate: Annotated[
        float | None, typer.Option(min=0.01, help="Requests per minute of each key.", rich_help_panel=_LIMITS)
    ] = None,
    concurrent: Annotated[
        int | None, typer.Option(min=1, help="Requests at once of each key.", rich_help_panel=_LIMITS)
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Requests that the durable queue holds.", rich_help_panel=_LIMITS)
    ] = 1000,
    drain: Annotated[float, typer.Option(min=0.1, help="Seconds to finish in after SIGTERM.", rich_help_panel=_LIMITS)] = 60.0,
    fetch_from: Annotated[
        list[str] | None, typer.Option(help="The only hosts that pictures are fetched from. Repeat.", rich_help_panel=_LIMITS)
    ] = None,
    private_host: Annotated[
        list[str] | None,
        typer.Option(help="Host of your own networks that pictures may come from. Repeat.", rich_help_panel=_LIMITS),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.", rich_help_panel=_ENGINE)] = None,
    attention: Annotated[str, typer.Option(help="Attention backend.", rich_help_panel=_ENGINE)] = "auto",
    memory_budget: Annotated[
        float | None, typer.Option(help="GPU memory in GiB that may be used.", rich_help_panel=_ENGINE)
    ] = None,
) -> None:
    """Serve the hosted API, OpenAI's images and fal's queue over HTTP. Without keys: to this machine alone."""
    _check_installed()
    from uso_engine.config import load_config
    from uso_engine.serving.app import make_application
    from uso_engine.serving.json_log import log_as_json
    from uso_engine.serving.process import serve as listen
    from uso_engine.serving.settings import RequestBounds, ServerSettings, Transport, default_storage
    from uso_engine.serving.storage import open_storage

    ring = _keys(keys)
    settings = ServerSettings(
        host=host,
        port=port,
        has_keys=ring is not None,
        allow_anonymous=no_auth,
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        public_url=public_url,
        aliases=tuple(alias or ("uso",)),
        bounds=RequestBounds(max_steps, max_images, max_pixels, deadline),
        transport=Transport(max_body_bytes=max_body * 2**20, max_held_bytes=max(1024, 4 * max_body) * 2**20),
        requests_per_minute=rate,
        concurrent=concurrent,
        expiry_s=expiry,
        signed_urls=signed_urls,
        max_waiting=max_waiting,
        drain_s=drain,
        page=not no_ui,
        log_prompts=log_prompts,
    )
    loaded = load_config(config)
    kept = storage or default_storage(os.environ.get("XDG_STATE_HOME"), Path.home())
    opened = _engine_opener(loaded, device, attention, memory_budget, fetch_from, private_host or [])
    application = make_application(
        loaded, settings, opened, open_storage(kept), ring, gpu_memory=_gpu_memory, host_name=socket.gethostname()
    )
    log_as_json()
    listen(application, settings)


@reports_errors
def new_key(name: Annotated[str, typer.Argument(help="Whose key it is: for logs and limits.")]) -> None:
    """Make a key: printed once, and the line for the file of keys, which holds its hash alone."""
    from uso_engine.serving import auth

    key, line = auth.new_key(name)
    say(f"key:  {key}")
    say(f"line: {line}")


def _check_installed() -> None:
    from importlib.util import find_spec

    needed = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client", "h11": "h11"}
    needed["python_multipart"] = "python-multipart"
    missing = [package for module, package in needed.items() if find_spec(module) is None]
    if missing:
        raise fail(f"serve needs {', '.join(missing)}: pip install 'uso-engine[serve]'")


def _keys(file: Path | None) -> KeyRing | None:
    """The configured keys; None where there are none."""
    from uso_engine.serving.auth import KeyRing

    environment = os.environ.get("USO_API_KEYS")
    return KeyRing(file, environment) if file is not None or environment else None


def _engine_opener(
    config: EngineConfig,
    device: str | None,
    attention: str,
    memory_budget_gib: float | None,
    fetch_from: list[str] | None,
    private_hosts: list[str],
) -> OpenEngine:
    """What loads the engine, warms it up, and closes it at the end."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[ServedEngine]:
        # In a thread: importing PyTorch takes seconds, and the server answers meanwhile.
        await asyncio.to_thread(import_module, "uso_engine.async_engine")
        from uso_engine.async_engine import AsyncUSOEngine
        from uso_engine.imaging.decode_pool import DecodePool
        from uso_engine.imaging.open import ImageLimits

        with DecodePool() as pool:
            limits = ImageLimits(
                allow_private_addresses=False,
                allow_paths=False,
                private_hosts=tuple(private_hosts),
                allowed_hosts=None if fetch_from is None else tuple(fetch_from),
                decode_pool=pool,
            )
            loading = AsyncUSOEngine.from_config(
                config, device=device, attention=attention, memory_budget_gib=memory_budget_gib, image_limits=limits
            )
            async with loading as engine:
                await asyncio.to_thread(engine.engine.warmup)
                yield engine

    return opened


def _gpu_memory() -> dict[str, int]:
    """Bytes of the GPU's memory: taken by tensors, held by the allocator, free, in all; nothing where there is no GPU."""
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "free": free,
        "total": total,
    }
