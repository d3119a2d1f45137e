"""``uso-engine serve --ray``: a Ray of this machine's own or a cluster, the application on it, and its end by a signal."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from uso_engine.config import EngineConfig
from uso_engine.errors import USOError
from uso_engine.serving.settings import ServerSettings

from .application import application
from .arguments import ApplicationArguments, server_settings

logger = logging.getLogger(__name__)

NAME = "uso-engine"
_CONNECT_S = 5.0
_PROXIES_S = 300.0


def serve_on_ray(arguments: ApplicationArguments, config: EngineConfig, *, has_keys: bool, address: str | None = None) -> None:
    """Serve until a signal comes.

    Args:
        arguments: of the application.
        config: of its engines.
        has_keys: whether callers must show a key.
        address: HOST:PORT of a cluster, "auto" for that of this machine, None for a Ray that starts and ends with this process.

    Raises:
        USOError: no cluster there, no room for the replicas, or they cannot be started; says which and why.
    """
    settings = server_settings(arguments.server, has_keys=has_keys)
    if settings.port == 0:
        raise USOError("Ray Serve takes no free port by itself; give --port another number than 0")
    made = application(arguments, config)
    listening, ended = threading.Event(), threading.Event()

    def end(*_: object) -> None:
        if not listening.is_set():
            raise KeyboardInterrupt  # Loading takes minutes.
        ended.set()

    connect(address)
    for number in (signal.SIGTERM, signal.SIGINT):  # Ray has just put its own in place.
        signal.signal(number, end)
    try:
        check_room(arguments, config, may_grow=address is not None)
        _start(made, settings)
        listening.set()
        logger.info("listening", extra={"fields": {"url": f"http://{settings.host}:{settings.port}"}})
        ended.wait()
        logger.info("finishing what runs")
        # What runs is finished by Ray; a cluster goes on with it when this process has ended.
        deleting = threading.Thread(target=serve.delete, args=(NAME,), name="delete", daemon=True)
        deleting.start()
        deleting.join(settings.drain_s)
    finally:
        if address is None:
            serve.shutdown()
        ray.shutdown()


def _start(made: serve.Application, settings: ServerSettings) -> None:
    """Run the application and wait until it can be reached."""
    http = HTTPOptions(
        host=settings.host, port=settings.port, keep_alive_timeout_s=settings.transport.keep_alive_s, request_timeout_s=None
    )
    try:
        serve.start(http_options=http)
    except TimeoutError:
        # Ray goes on starting its proxies. On a busy machine they take longer than the minute for which it waits.
        logger.warning("Ray Serve's HTTP proxies have not started within a minute; waiting for them")
    try:
        serve.run(made, name=NAME, route_prefix="/")
    except RuntimeError as error:
        raise USOError(f"the replicas could not be started: {error}") from error
    host = "127.0.0.1" if settings.host == "0.0.0.0" else settings.host
    end_s = time.monotonic() + _PROXIES_S
    while True:
        try:
            socket.create_connection((host, settings.port), timeout=_CONNECT_S).close()
            return
        except OSError as error:
            if time.monotonic() > end_s:
                raise USOError(f"nothing listens on {host}, port {settings.port}, after {_PROXIES_S:g} s: {error}") from error
            time.sleep(0.5)


def connect(address: str | None) -> None:
    """Begin a Ray of this process's own, or join a cluster.

    Raises:
        USOError: no cluster there, or none could be started.
    """
    if address not in (None, "auto"):
        _check_reachable(address)
    own = address is None
    try:
        dashboard = False if own else None
        ray.init("local" if own else address, include_dashboard=dashboard, configure_logging=False, log_to_driver=own)
    except Exception as error:  # Ray raises a plain one where its processes do not start in time
        what = "start Ray on this machine" if own else f"join the Ray cluster {address!r}"
        raise USOError(f"cannot {what}: {error}") from error


def check_room(arguments: ApplicationArguments, config: EngineConfig, *, may_grow: bool) -> None:
    """Whether there is room for the fewest replicas there are to be; without it they would be waited for without end.

    Args:
        arguments: of the application.
        config: of its engines.
        may_grow: whether machines may join, as where a cluster has an autoscaler: then it is only said.

    Raises:
        USOError: there is none, and there will be none.
    """
    found, replicas = ray.cluster_resources(), arguments.replicas
    for resource, each in (("GPU", replicas.gpus_of(config)), ("CPU", replicas.cpus)):
        there = float(found.get(resource, 0))
        if each * replicas.least > there:
            missing = f"{replicas.least} replicas need {each * replicas.least:g} {resource}s, and the cluster has {there:g}"
            if not may_grow:
                raise USOError(f"{missing}; give fewer replicas, or a smaller share of a {resource} to each")
            logger.warning("%s; waiting for it to grow", missing)


def _check_reachable(address: str) -> None:
    """Whether anybody listens there: Ray itself tries for a minute, and then ends the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise USOError(f"a Ray cluster's address is HOST:PORT or auto, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise USOError(f"cannot reach a Ray cluster at {address}: {error.strerror or error}") from error
