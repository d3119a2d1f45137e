"""What an ingress and a replica say to each other. Everything here is pickled between processes."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass

from uso_engine.api.events import Event
from uso_engine.api.request import GenerationRequest
from uso_engine.errors import USOError

from .demand import Demand


@dataclass(frozen=True)
class Order:
    """A request on its way to a replica.

    Args:
        demand: for the router.
        ingress: which one sends it.
        fields: what the request sets, its seed among it, so that every run gives the same picture.
        priority: as for the engine.
        timeout_s: as for the engine.
        events: whether what happens on the way is told.
        previews: whether steps come with a small picture.
    """

    demand: Demand
    ingress: str
    fields: Mapping[str, object]
    priority: int = 0
    timeout_s: float | None = None
    events: bool = False
    previews: bool = False

    def request(self) -> GenerationRequest:
        """The request again, to be fitted to the replica's engine."""
        return GenerationRequest.model_validate(dict(self.fields))


@dataclass(frozen=True)
class Taken:
    """The first message of a replica: it has the request.

    Args:
        replica: which one.
        identity: digest of its engine.
    """

    replica: str
    identity: str


@dataclass(frozen=True)
class Refused:
    """The only message of a replica that computes with something else than the request's first run.

    Args:
        replica: which one.
        identity: digest of its engine.
    """

    replica: str
    identity: str


@dataclass(frozen=True)
class Failed:
    """The last message of a request that failed by itself.

    Args:
        error: as the engine raised it.
    """

    error: USOError


Message = Taken | Refused | Failed | Event


def fields_of(request: GenerationRequest) -> dict[str, object]:
    """What a request sets."""
    return {name: getattr(request, name) for name in request.model_fields_set}


def failed(error: USOError) -> Failed:
    """An error as a message: without its cause, which may hold what no other process can read."""
    try:
        copy: USOError = pickle.loads(pickle.dumps(error))  # noqa: S301 - what was pickled just now
    except (TypeError, AttributeError, pickle.PicklingError):
        copy = USOError(f"{type(error).__name__}: {error}")
    return Failed(copy)
