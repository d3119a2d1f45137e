"""``uso-engine serve`` and ``uso-engine new-key``."""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import fail, reports_errors, say
from .torchrun import follows, is_torchrun

if TYPE_CHECKING:
    from uso_engine.config import EngineConfig
    from uso_engine.serving.auth import KeyRing
    from uso_engine.serving.engine_opening import EngineOptions
    from uso_engine.serving.settings import ServerSettings

_HTTP = "HTTP"
_LIMITS = "Limits"
_ENGINE = "Engine"
_RAY = "Several machines or GPUs, with Ray"


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
        typer.Option(
            help="Where images and the queue are kept: file:///folder, file://~/folder or s3://bucket/prefix.",
            rich_help_panel=_HTTP,
        ),
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
    ray: Annotated[
        bool, typer.Option("--ray", help="Serve by replicas of the engine on Ray Serve.", rich_help_panel=_RAY)
    ] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of a Ray cluster, or auto for this machine's; by default a Ray that ends with the server.",
            rich_help_panel=_RAY,
        ),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="The fewest replicas; by default 1.", rich_help_panel=_RAY)
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="The most replicas; by default as many as the fewest.", rich_help_panel=_RAY)
    ] = None,
    gpus_per_replica: Annotated[
        float | None, typer.Option(min=0, help="GPUs of each replica, or a part of one.", rich_help_panel=_RAY)
    ] = None,
) -> None:
    """Serve the hosted API, OpenAI's images and fal's queue over HTTP. Without keys: to this machine alone."""
    if not ray:
        _refuse_without_ray(
            {
                "--replicas": replicas,
                "--max-replicas": max_replicas,
                "--gpus-per-replica": gpus_per_replica,
                "--ray-address": ray_address,
            }
        )
    _check_possible(with_ray=ray)
    if follows(config, device, attention):
        return
    from uso_engine.config import load_config
    from uso_engine.serving.engine_opening import EngineOptions
    from uso_engine.serving.json_log import log_as_json
    from uso_engine.serving.settings import RequestBounds, ServerSettings, Transport, default_storage

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
    hosts = None if fetch_from is None else tuple(fetch_from)
    options = EngineOptions(device, attention, memory_budget, hosts, tuple(private_host or ()))
    log_as_json()
    if ray:
        least = replicas or 1
        bounds = least, max_replicas or least, gpus_per_replica
        _listen_on_ray(loaded, settings, kept, keys, options, bounds, ray_address)
    else:
        _listen(loaded, settings, kept, ring, options)


@reports_errors
def new_key(name: Annotated[str, typer.Argument(help="Whose key it is: for logs and limits.")]) -> None:
    """Make a key: printed once, and the line for the file of keys, which holds its hash alone."""
    from uso_engine.serving import auth

    key, line = auth.new_key(name)
    say(f"key:  {key}")
    say(f"line: {line}")


def _listen(config: EngineConfig, settings: ServerSettings, storage: str, keys: KeyRing | None, options: EngineOptions) -> None:
    """Serve by an engine of this process."""
    from uso_engine.serving.app import make_application
    from uso_engine.serving.engine_opening import opened_engine
    from uso_engine.serving.process import serve as listen
    from uso_engine.serving.storage import open_storage

    application = make_application(
        config,
        settings,
        lambda: opened_engine(config, options),
        open_storage(storage),
        keys,
        gpu_memory=partial(_gpu_memory, options.device),
        host_name=socket.gethostname(),
    )
    listen(application, settings)


def _listen_on_ray(
    config: EngineConfig,
    settings: ServerSettings,
    storage: str,
    keys: Path | None,
    options: EngineOptions,
    replicas: tuple[int, int, float | None],
    address: str | None,
) -> None:
    """Serve by replicas: the fewest and the most of them, and the GPUs of each."""
    from uso_engine.serving.ray.arguments import application_arguments
    from uso_engine.serving.ray.start import serve_on_ray
    from uso_engine.serving.storage import open_storage

    open_storage(storage)  # It may refuse: before minutes of loading.
    arguments = application_arguments(config, settings, storage, keys, options, replicas)
    serve_on_ray(arguments, config, has_keys=settings.has_keys, address=address)


def _refuse_without_ray(given: dict[str, object]) -> None:
    for name, value in given.items():
        if value is not None:
            raise typer.BadParameter(f"{name} is for --ray; give both or neither", param_hint=name)


def _check_possible(*, with_ray: bool) -> None:
    """Whether what it takes is installed, and one launcher has started it."""
    from importlib.util import find_spec

    needed = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client", "h11": "h11"}
    needed["python_multipart"] = "python-multipart"
    missing = [package for module, package in needed.items() if find_spec(module) is None]
    if missing:
        raise fail(f"serve needs {', '.join(missing)}: pip install 'uso-engine[serve]'")
    if with_ray and is_torchrun():
        raise fail("serve --ray starts its processes itself: leave out torchrun", 2)
    if with_ray and find_spec("ray") is None:
        raise fail("serve --ray needs ray: pip install 'uso-engine[serve,ray]'")


def _keys(file: Path | None) -> KeyRing | None:
    """The configured keys; None where there are none."""
    from uso_engine.serving.auth import KeyRing

    environment = os.environ.get("USO_API_KEYS")
    return KeyRing(file, environment) if file is not None or environment else None


def _gpu_memory(device: str | None) -> dict[str, int]:
    """Bytes of the engine's GPU: taken by tensors, held by the allocator, free, in all; nothing where it has none."""
    import torch

    gpu = torch.device(device or "cuda")
    if gpu.type != "cuda" or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    free, total = torch.cuda.mem_get_info(gpu)
    return {
        "allocated": torch.cuda.memory_allocated(gpu),
        "reserved": torch.cuda.memory_reserved(gpu),
        "free": free,
        "total": total,
    }
