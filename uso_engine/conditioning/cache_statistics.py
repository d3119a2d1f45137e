"""Counts of a cache; apart from the cache, so that who shows them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheStatistics:
    """What a cache has done since it was made or cleared.

    Args:
        hits: look-ups that found their entry.
        misses: look-ups that did not.
        evictions: entries dropped to make room.
        entries: entries held now.
        size_bytes: their bytes.
        limit_bytes: the bound.
    """

    hits: int
    misses: int
    evictions: int
    entries: int
    size_bytes: int
    limit_bytes: int
