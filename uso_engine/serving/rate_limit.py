"""Limits of each caller: requests per minute, by a bucket of tokens, and requests at once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .auth import Key
from .refusal import Refusal


@dataclass
class _Bucket:
    tokens: float
    at: float


class CallerLimits:
    """What each caller may ask for; counted in this process alone.

    Args:
        requests_per_minute: of a caller whose key does not say otherwise; a minute's worth may come at once. None does not
            count.
        concurrent: requests at once of such a caller. None does not count.
        clock: seconds that only grow.
    """

    def __init__(
        self, requests_per_minute: float | None, concurrent: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._concurrent, self._clock = requests_per_minute, concurrent, clock
        # Callers are as many as there are keys, so nothing needs to be forgotten.
        self._buckets: dict[str, _Bucket] = {}
        self._running: Counter[str] = Counter()

    def admit(self, key: Key) -> None:
        """Count one request.

        Raises:
            Refusal: 429, with the seconds until the next may come.
        """
        rate = self._rate if key.requests_per_minute is None else key.requests_per_minute
        if rate is None:
            return
        most, now = max(1.0, rate), self._clock()
        bucket = self._buckets.setdefault(key.name, _Bucket(most, now))
        bucket.tokens = min(most, bucket.tokens + (now - bucket.at) * rate / 60)
        bucket.at = now
        if bucket.tokens < 1:
            raise Refusal(
                429,
                "Too many requests.",
                errors=[f"{rate:g} requests per minute are accepted with this key"],
                retry_after_s=(1 - bucket.tokens) * 60 / rate,
            )
        bucket.tokens -= 1

    @contextmanager
    def running(self, key: Key) -> Iterator[None]:
        """Count one request while it runs.

        Raises:
            Refusal: 429 where as many run as may.
        """
        most = self._concurrent if key.concurrent is None else key.concurrent
        if most is not None and self._running[key.name] >= most:
            raise Refusal(
                429, "Too many requests at once.", errors=[f"{most} at once are accepted with this key"], retry_after_s=1
            )
        self._running[key.name] += 1
        try:
            yield
        finally:
            self._running[key.name] -= 1
