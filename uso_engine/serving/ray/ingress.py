"""The ingress: the server's application in a replica of Ray Serve, with the engines behind it."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from ray import exceptions, serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from uso_engine.config import EngineConfig
from uso_engine.errors import EngineDeadError, QueueFullError
from uso_engine.serving.app import make_application
from uso_engine.serving.auth import KeyRing
from uso_engine.serving.engine_state import OpenEngine
from uso_engine.serving.json_log import log_as_json
from uso_engine.serving.served_engine import ServedEngine
from uso_engine.serving.storage import open_storage

from .arguments import ApplicationArguments, server_settings
from .fleet import fleet_of
from .messages import Message, Order
from .remote_engine import RemoteEngine, ReplicaLostError, Send

_LOST = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.ObjectLostError,
    exceptions.NodeDiedError,
    exceptions.TaskCancelledError,
    ReplicaUnavailableError,
)
_RETRY_S = 5.0


@serve.ingress()
class Ingress:
    """One process that answers HTTP.

    Args:
        arguments: of the application.
        config: of the engines.
        engines: reaches them.

    Raises:
        ConfigError: settings that do not fit, or a storage that cannot be written to.
    """

    def __init__(self, arguments: ApplicationArguments, config: EngineConfig, engines: DeploymentHandle) -> None:
        log_as_json()
        environment = os.environ.get("USO_API_KEYS")
        keys = KeyRing(arguments.keys, environment) if arguments.keys is not None or environment else None
        settings = server_settings(arguments.server, has_keys=keys is not None)
        name = f"{socket.gethostname()}-{serve.get_replica_context().replica_id.unique_id}"
        self._application = make_application(
            config,
            settings,
            engine_opener(config, engines, arguments),
            open_storage(arguments.storage),
            keys,
            host_name=name,
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._application.asgi


def engine_opener(config: EngineConfig, engines: DeploymentHandle, arguments: ApplicationArguments) -> OpenEngine:
    """What waits for the first replica and stands for all of them.

    Args:
        config: of the engines.
        engines: reaches them.
        arguments: of the application.
    """

    @asynccontextmanager
    async def opened() -> AsyncIterator[ServedEngine]:
        await engines.ping.remote()
        replicas, fleet = arguments.replicas, fleet_of(str(engines.deployment_id))
        send = sender(engines, replicas.most_unassigned(config))
        yield RemoteEngine(config, fleet, send, max_queued=replicas.max_queued, ingresses=arguments.ingresses)

    return opened


def sender(engines: DeploymentHandle, max_queued: int) -> Send:
    """What carries an order to a replica and its messages back."""
    streaming = engines.options(stream=True)

    @asynccontextmanager
    async def send(order: Order) -> AsyncIterator[AsyncIterator[Message]]:
        response = streaming.run.remote(order)
        messages = _translated(response, max_queued)
        try:
            yield messages
        except (QueueFullError, EngineDeadError, ReplicaLostError):
            raise  # It is over. Ray raises the same error again where it is asked to cancel such a call.
        except BaseException:
            response.cancel()
            raise
        finally:
            await messages.aclose()

    return send


async def _translated(response: AsyncIterator[Message], max_queued: int) -> AsyncGenerator[Message, None]:
    """The same messages, and Ray's errors in the engine's words."""
    try:
        async for message in response:
            yield message
    except BackPressureError as error:
        raise QueueFullError("max_queued", max_queued, max_queued + 1, _RETRY_S) from error
    except DeploymentUnavailableError as error:
        raise EngineDeadError(f"no replica could be started: {error.message}") from error
    except _LOST as error:
        raise ReplicaLostError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
