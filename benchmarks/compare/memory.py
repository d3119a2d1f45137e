"""How much more memory a request needs than what was resident before it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Rise:
    """GiB above what was there before.

    Args:
        host: of resident memory at its peak; None where the system does not say.
        device: of a GPU's allocations at their peak; None on a CPU.
    """

    host: float | None = None
    device: float | None = None


@contextmanager
def peak_rise(device: torch.device) -> Iterator[Rise]:
    """Measure what is needed within a `with` statement."""
    rise = Rise()
    _give_back()
    before = _resident_gib("VmRSS") if _reset_peak() else None
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
    yield rise
    if on_gpu:
        torch.cuda.synchronize(device)
        rise.device = (torch.cuda.max_memory_allocated(device) - allocated) / 2**30
    if before is not None:
        rise.host = max(0.0, _resident_gib("VmHWM") - before)


def _give_back() -> None:
    """Let the allocator return what is free in it, which a request would take again without a trace; glibc's can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_peak() -> bool:
    """Let the peak of resident memory begin anew; whether the system lets a process do that."""
    try:
        REFERENCES.write_text("5")
    except OSError:
        return False
    return True


def _resident_gib(entry: str) -> float:
    found = re.search(rf"{entry}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) / 2**20
