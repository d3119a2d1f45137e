"""The server as a process: its event loop, its signals, and its end. A signal drains; a second one does not wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn

from uso_engine.errors import USOError

from .app import Application
from .settings import ServerSettings
from .timed_protocol import timed_protocol

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_CLOSING_S = 10
_HEADER_BYTES = 32 * 1024


def serve(application: Application, settings: ServerSettings) -> None:
    """Listen until a signal comes.

    Args:
        application: from `make_application`.
        settings: of the server.

    Raises:
        USOError: the address cannot be bound to, or the engine could not be loaded.
    """
    bound = bind(settings.host, settings.port)
    config = uvicorn.Config(
        application.asgi,
        http=timed_protocol(settings.transport),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.transport.keep_alive_s,
        timeout_graceful_shutdown=_CLOSING_S,
        h11_max_incomplete_event_size=_HEADER_BYTES,
    )
    server = _DrainingServer(config, application, settings, bound)
    try:
        asyncio.run(server.serve(sockets=[bound]))
    finally:
        bound.close()
    if server.failure is not None:
        raise server.failure


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        USOError: the address cannot be bound to.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise USOError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
    bound.setblocking(False)
    return bound


class _DrainingServer(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, application: Application, settings: ServerSettings, bound: socket.socket
    ) -> None:
        super().__init__(config)
        self.failure: BaseException | None = None
        self._application, self._settings, self._bound = application, settings, bound
        self._drain: asyncio.Task[None] | None = None
        application.state.on_failure = self._end_failed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self._bound.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        logger.info("listening", extra={"fields": {"url": url}})

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        if self._drain is not None:
            logger.info("ending now")
            self._drain.cancel()
            self.should_exit = self.force_exit = True
            return
        logger.info("%s: finishing what runs", signal.Signals(number).name)
        self._drain = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        """Until it is done the server answers: that it is not ready, and 503 to whoever comes now."""
        try:
            self._application.runner.stop()
            await self._application.state.drain(self._settings.drain_s)
        finally:
            self.should_exit = True

    def _end_failed(self, error: BaseException) -> None:
        self.failure = error
        self.should_exit = True
