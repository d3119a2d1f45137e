"""What an application on Ray is built from: plain values, as they stand in a Serve configuration file. Knows nothing of Ray."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from uso_engine.config import EngineConfig
from uso_engine.errors import ConfigError
from uso_engine.serving.engine_opening import EngineOptions
from uso_engine.serving.settings import ServerSettings

from .policy import RoutingSettings
from .scaling import ScalingSettings

_REFUSED_AT_ONCE = 250
"""Requests beyond its bound that an ingress is given: it answers each at once."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ReplicaArguments(_Table):
    """The replicas.

    `least` and `most` bound their number. `gpus` and `cpus` is what each takes of a machine; by default a GPU for each process
    of `parallel.ulysses`, and none where `options.device` is "cpu". `max_queued` is how many requests wait for one at each
    ingress before others are refused. `weights` is the digest that their weights must have. `upscale_s` and `downscale_s` is
    how long a need must last before replicas come or go; `report_s` how often they report.
    """

    least: int = Field(1, ge=1, le=10_000)
    most: int = Field(1, ge=1, le=10_000)
    gpus: float | None = Field(None, ge=0, le=64)
    cpus: float = Field(1, ge=0, le=1024)
    max_queued: int = Field(64, ge=1, le=1_000_000)
    weights: str | None = Field(None, pattern="^[0-9a-f]{16}$")
    upscale_s: float = Field(10, ge=0)
    downscale_s: float = Field(300, ge=0)
    report_s: float = Field(1, gt=0, le=60)
    options: EngineOptions = EngineOptions()
    routing: RoutingSettings = RoutingSettings()
    scaling: ScalingSettings = ScalingSettings()

    def gpus_of(self, config: EngineConfig) -> float:
        """GPUs of a replica."""
        if self.gpus is not None:
            return self.gpus
        return 0.0 if self.options.device == "cpu" else float(config.parallel.ulysses)

    def most_unassigned(self, config: EngineConfig) -> int:
        """Requests that Ray lets be without a replica at an ingress.

        Ray counts one that is only on its way to a replica with room as one that waits. So its bound is that of a burst that
        comes when all replicas are idle; how many may really wait, the ingress counts itself.
        """
        return self.most * config.queue.max_requests + self.max_queued


class ApplicationArguments(_Table):
    """The whole application.

    `config` names the engine's configuration, `storage` is shared by all ingresses, `keys` is a file of keys on the machines of
    the ingresses (USO_API_KEYS holds further ones), `ingresses` how many of them there are, `server` the fields of
    `ServerSettings`.
    """

    config: str
    storage: str
    keys: Path | None = None
    ingresses: int = Field(1, ge=1, le=1_000)
    server: dict[str, object] = Field(default_factory=dict)
    replicas: ReplicaArguments = ReplicaArguments()


def read_arguments(table: dict[str, object]) -> ApplicationArguments:
    """Check arguments.

    Raises:
        ConfigError: unknown or missing ones, or values out of bounds; all of them are listed.
    """
    try:
        arguments = ApplicationArguments.model_validate(table)
    except ValidationError as error:
        raise ConfigError(f"application on Ray: {_listed(error)}") from error
    if arguments.replicas.least > arguments.replicas.most:
        found = arguments.replicas
        raise ConfigError(f"application on Ray: replicas.least is {found.least}, more than replicas.most, {found.most}")
    return arguments


def server_settings(fields: dict[str, object], *, has_keys: bool) -> ServerSettings:
    """The server's settings from plain values.

    Args:
        fields: of `ServerSettings`.
        has_keys: whether callers must show a key.

    Raises:
        ConfigError: unknown fields, or settings that contradict each other.
    """
    unknown = sorted(fields.keys() - ServerSettings.__dataclass_fields__.keys() | fields.keys() & {"has_keys"})
    if unknown:
        known = sorted(ServerSettings.__dataclass_fields__.keys() - {"has_keys"})
        raise ConfigError(f"application on Ray: server has no settings {unknown}; it has {known}")
    try:
        return TypeAdapter(ServerSettings).validate_python({**fields, "has_keys": has_keys})
    except ValidationError as error:
        raise ConfigError(f"application on Ray: server.{_listed(error)}") from error


def ingress_bounds(settings: ServerSettings, ingresses: int) -> tuple[int, int]:
    """Requests that Ray gives to an ingress at once, and that one of its proxies holds meanwhile.

    An ingress itself refuses more than `Transport.max_connections`, in the server's words; it is given more, so that it can.
    Only beyond that a proxy holds requests, and refuses, with Ray's words, what is more than all ingresses may have. Ray counts
    a request that is only on its way to an ingress with room as one that is held.

    Args:
        settings: of the server.
        ingresses: how many of them there are.
    """
    most = settings.transport.max_connections + _REFUSED_AT_ONCE
    return most, ingresses * most


def application_arguments(
    config: EngineConfig,
    settings: ServerSettings,
    storage: str,
    keys: Path | None,
    options: EngineOptions,
    replicas: tuple[int, int, float | None],
) -> ApplicationArguments:
    """Arguments of an application that is started from a command line.

    Args:
        config: of the engines.
        settings: of the server.
        storage: its URL.
        keys: file of keys.
        options: of the engines.
        replicas: the fewest, the most, and the GPUs of each; None for the usual.

    Raises:
        ConfigError: as for `read_arguments`.
    """
    least, most, gpus = replicas
    server = {name: value for name, value in asdict(settings).items() if name != "has_keys"}
    made = ReplicaArguments(options=options).model_dump() | {"least": least, "most": most, "gpus": gpus}
    return read_arguments({"config": config.name, "storage": storage, "keys": keys, "server": server, "replicas": made})


def _listed(error: ValidationError) -> str:
    problems = []
    for item in error.errors(include_url=False, include_input=False):
        name = ".".join(str(part) for part in item["loc"])
        problems.append(f"{name}: {item['msg']}" if name else item["msg"])
    return "; ".join(problems)
