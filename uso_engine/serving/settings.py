"""Settings of the HTTP server: what the command line hands over, checked on construction."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from uso_engine.api.fields import MODEL

MIB = 2**20
FAL_MODEL = "fal-ai/uso"
"""What fal's customers call the model."""


@dataclass(frozen=True)
class RequestBounds:
    """What the operator takes of each request; the narrower of these and the configuration's own limits counts.

    Args:
        max_steps: the most denoising steps.
        max_images: the most images.
        max_pixels: the most pixels of an image; None leaves it to the configuration.
        deadline_s: seconds until a request is given up, its wait in the queue included.

    Raises:
        ValueError: a bound outside the schema's own.
    """

    max_steps: int = 50
    max_images: int = 4
    max_pixels: int | None = None
    deadline_s: float = 600.0

    def __post_init__(self) -> None:
        for name, most in (("max_steps", 50), ("max_images", 4)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be from 1 to {most}, got {getattr(self, name)}")
        for name in ("max_pixels", "deadline_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")


@dataclass(frozen=True)
class Transport:
    """Bounds of connections and bodies, before anything is understood.

    Args:
        max_body_bytes: the most bytes of one request's body.
        max_held_bytes: the most bytes of all bodies that are held at once.
        header_timeout_s: seconds for a request's first line and headers.
        body_timeout_s: seconds for its body.
        idle_timeout_s: seconds between two chunks of a body, and for a client to take a chunk of an answer.
        keep_alive_s: seconds that a connection is kept without a request.
        max_connections: connections at once, and so requests at once; on Ray requests at once of each ingress.

    Raises:
        ValueError: a bound that is not positive, or no room for one whole body.
    """

    max_body_bytes: int = 64 * MIB
    max_held_bytes: int = 1024 * MIB
    header_timeout_s: float = 10.0
    body_timeout_s: float = 120.0
    idle_timeout_s: float = 20.0
    keep_alive_s: int = 75
    max_connections: int = 1000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.max_held_bytes < self.max_body_bytes:
            raise ValueError(f"max_held_bytes {self.max_held_bytes} is less than one body may have, {self.max_body_bytes}")


@dataclass(frozen=True)
class ServerSettings:
    """How the server runs.

    Args:
        host: address to bind to.
        port: port to bind to; 0 takes a free one.
        has_keys: whether callers must show a key.
        allow_anonymous: whether addresses that others reach may be bound to without keys.
        allowed_hosts: names that the Host header may have; bound to loopback, loopback's own names are added.
        cors_origins: origins whose pages may read answers.
        public_url: where clients reach this server; by default what their Host header says.
        aliases: further names of the model.
        bounds: of each request.
        transport: bounds of connections and bodies.
        requests_per_minute: of each key that does not say otherwise; None does not count.
        concurrent: requests at once of each key that does not say otherwise; None does not count.
        expiry_s: seconds that images and answers of the queue are kept.
        signed_urls: whether answers lead to the object store itself, by URLs that it signs.
        queue_width: requests of the queue that are given to the engine at once.
        max_waiting: requests that the queue holds.
        lease_s: seconds after which a server that says nothing has ended, by the watch of others, which take up what it left.
        drain_s: seconds that running requests get to finish when the server is told to end.
        page: whether the page at ``/`` is served.
        log_prompts: whether log lines hold prompts.

    Raises:
        ValueError: settings that contradict each other.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    has_keys: bool = False
    allow_anonymous: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    public_url: str | None = None
    aliases: tuple[str, ...] = ("uso",)
    bounds: RequestBounds = RequestBounds()
    transport: Transport = Transport()
    requests_per_minute: float | None = None
    concurrent: int | None = None
    expiry_s: float = 24 * 3600.0
    signed_urls: bool = False
    queue_width: int = 4
    max_waiting: int = 1000
    lease_s: float = 30.0
    drain_s: float = 60.0
    page: bool = True
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "concurrent", "expiry_s", "queue_width", "max_waiting", "lease_s", "drain_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not self.has_keys and not self.allow_anonymous and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host!r} can be reached by others, and no keys are configured; "
                "give --keys or USO_API_KEYS, bind to 127.0.0.1, or say --no-auth"
            )
        if self.public_url is not None:
            parts = urlsplit(self.public_url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError(f"public_url must be an http(s) URL without a query, got {self.public_url!r}")

    @property
    def models(self) -> tuple[str, ...]:
        """Every name that the model answers to; the hosted API's first."""
        return tuple(dict.fromkeys((MODEL, *self.aliases)))

    @property
    def queue_models(self) -> tuple[str, ...]:
        """Names in the paths of fal's dialect, of the form owner/name."""
        return tuple(dict.fromkeys((MODEL, FAL_MODEL, *(alias for alias in self.aliases if alias.count("/") == 1))))


def is_loopback(host: str) -> bool:
    """Whether an address to bind to is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def default_storage(state_folder: str | None, home: Path) -> str:
    """Where images and the queue are kept if nobody says: a folder of the user's state, as a URL.

    Args:
        state_folder: ``XDG_STATE_HOME``, if it is set.
        home: the user's folder.
    """
    base = Path(state_folder) if state_folder else home / ".local" / "state"
    return (base / "uso-engine" / "storage").absolute().as_uri()
