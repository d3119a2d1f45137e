"""A least-recently-used cache bounded in bytes, and the content hashes that are its keys."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from .cache_statistics import CacheStatistics

if TYPE_CHECKING:
    from PIL.Image import Image

V = TypeVar("V")

MIB = 1 << 20


@dataclass(frozen=True)
class CacheLimits:
    """Bounds of the three condition caches in bytes."""

    prompt_bytes: int = 256 * MIB
    style_bytes: int = 64 * MIB
    content_bytes: int = 64 * MIB


class ByteCache(Generic[V]):
    """Keeps the most recently used values within a number of bytes; safe to share between threads.

    Args:
        limit_bytes: bound on the sum of the entries' sizes; 0 keeps nothing.
        size_of: bytes of one value.

    Raises:
        ValueError: a negative bound.
    """

    def __init__(self, limit_bytes: int, size_of: Callable[[V], int]) -> None:
        if limit_bytes < 0:
            raise ValueError(f"limit_bytes must be at least 0, got {limit_bytes}")
        self._limit = limit_bytes
        self._size_of = size_of
        self._entries: OrderedDict[str, tuple[V, int]] = OrderedDict()
        self._flights: dict[str, Future[V | None]] = {}
        self._lock = threading.Lock()
        self._size = self._hits = self._misses = self._evictions = 0

    def get(self, key: str) -> V | None:
        """Look a value up and make it the most recently used; None where it is not held."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: str, value: V) -> bool:
        """Keep a value, dropping the least recently used ones to make room.

        Args:
            key: a content hash; a value already under it is replaced.
            value: what to keep; the caller must not change it afterwards.

        Returns:
            Whether it was kept: a value larger than the whole cache is not, and drops nothing else.
        """
        size = self._size_of(value)
        with self._lock:
            replaced = self._entries.pop(key, None)
            if replaced is not None:
                self._size -= replaced[1]
            if size > self._limit:
                return False
            while self._size + size > self._limit:
                _, (_, dropped) = self._entries.popitem(last=False)
                self._size -= dropped
                self._evictions += 1
            self._entries[key] = (value, size)
            self._size += size
            return True

    def get_or_compute(self, key: str, compute: Callable[[], V]) -> V:
        """Look a value up, or compute and keep it.

        Threads that ask for one that is being computed wait for it, and count as hits; an error reaches all of them, and
        whoever asks next computes anew. An interrupt (Ctrl-C) of the thread that computes is its own: another one computes.
        """
        while True:
            with self._lock:
                flight = self._flights.get(key)
                if flight is None:
                    mine: Future[V | None] = Future()
                    self._flights[key] = mine
                else:
                    self._hits += 1
            if flight is None:
                return self._computed(key, compute, mine)
            value = flight.result()
            if value is not None:
                return value

    def _computed(self, key: str, compute: Callable[[], V], flight: Future[V | None]) -> V:
        """The value of a flight that this thread has begun, from the cache or computed."""
        outcome: V | None = None
        try:
            outcome = self.get(key)
            if outcome is None:
                outcome = compute()
                self.put(key, outcome)
            return outcome
        except Exception as error:
            flight.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._flights[key]
            if not flight.done():
                flight.set_result(outcome)

    def clear(self) -> None:
        """Drop every entry and start the counts again."""
        with self._lock:
            self._entries.clear()
            self._size = self._hits = self._misses = self._evictions = 0

    def statistics(self) -> CacheStatistics:
        """Counts and sizes at one moment."""
        with self._lock:
            held = len(self._entries)
            return CacheStatistics(self._hits, self._misses, self._evictions, held, self._size, self._limit)


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor's values take."""
    return tensor.numel() * tensor.element_size()


def hash_text(text: str, identity: str = "") -> str:
    """Hash a prompt together with the identity of the encoders that read it."""
    return hashlib.sha256(f"{identity}\0".encode() + text.encode("utf-8", "surrogatepass")).hexdigest()


def hash_image(image: Image, identity: str = "") -> str:
    """Hash what an image shows (size, mode, pixels, palette), whatever file it came from, with an encoder's identity."""
    digest = hashlib.sha256(f"{identity}\0{image.mode}\0{image.width}x{image.height}\0".encode())
    if image.mode in ("P", "PA"):
        digest.update(repr((image.getpalette("RGB"), image.info.get("transparency"))).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def hash_tensor(tensor: Tensor, identity: str = "") -> str:
    """Hash a tensor's dtype, shape and values, with an encoder's identity."""
    digest = hashlib.sha256(f"{identity}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
