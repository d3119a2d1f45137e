"""What a replica says of itself: which engine it is, what it has in flight and encoded, how fast it computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Identity:
    """What decides the bits of a picture.

    Args:
        configuration: digest of the engine's configuration; two that differ are meant to, as while a new one is rolled out.
        version: of uso-engine and torch.
        weights: digest of names, shapes and sampled numbers of the transformer's weights.
    """

    configuration: str
    version: str
    weights: str

    @property
    def digest(self) -> str:
        """All of it in 16 letters."""
        return digest_of(asdict(self))


@dataclass(frozen=True)
class Report:
    """One replica at one moment.

    Args:
        identity: of its engine.
        started_s: when it was loaded, in seconds since 1970.
        work: tokens of its requests in flight, by the ingress that sent them.
        keys: of prompts and pictures that it has encoded lately.
        loras: key of those in its weights beside the configuration's; empty for none.
        tokens_per_s: transformer tokens computed in a second of computing, since the last report; None where it was idle.
        busy: share of the time since the last report in which it had a request; from 0 to 1.
        engine: counters of the engine, for metrics.
    """

    identity: Identity
    started_s: float
    work: Mapping[str, int] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()
    loras: str = ""
    tokens_per_s: float | None = None
    busy: float = 0.0
    engine: Mapping[str, object] = field(default_factory=dict)

    def plain(self) -> dict[str, object]:
        """The same as what JSON has, for Ray's controller."""
        return {**asdict(self), "keys": sorted(self.keys)}


def read_report(plain: Mapping[str, object]) -> Report:
    """A report from what `Report.plain` made.

    Raises:
        ValueError: something else, such as that of a replica of another version.
    """
    fields = dict(plain)
    identity, keys, counters = fields.pop("identity", None), fields.pop("keys", None), fields.get("engine", {})
    cause = None
    if isinstance(identity, Mapping) and isinstance(keys, list) and isinstance(counters, Mapping):
        try:
            return Report(Identity(**identity), keys=frozenset(keys), **fields)  # type: ignore[arg-type]
        except TypeError as error:
            cause = error
    raise ValueError(f"expected a replica's report, got {str(plain)[:200]}") from cause


def digest_of(value: object) -> str:
    """16 letters for plain JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
