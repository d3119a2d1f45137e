"""A process, named so that another one can tell whether it has certainly ended: by Linux, on the same running kernel alone."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_PROC = Path("/proc")


class ProcessMark(BaseModel):
    """A process of one kernel, from its start to the kernel's end.

    Args:
        host: name of its machine.
        boot: identifier of the kernel's run, drawn at every boot.
        namespace: of process identifiers; a container has its own.
        pid: its identifier there.
        started: when it began, in the kernel's ticks since the boot: identifiers are used again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    host: str
    boot: str
    namespace: str
    pid: int
    started: int


def this_process() -> ProcessMark | None:
    """This process; None where the kernel does not say."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = str((_PROC / "self/ns/pid").readlink())
        state = _state_of(os.getpid())
    except (OSError, ValueError):
        return None
    return ProcessMark(host=socket.gethostname(), boot=boot, namespace=namespace, pid=os.getpid(), started=state[1])


def has_certainly_ended(mark: ProcessMark) -> bool:
    """Whether a process has ended; false where that cannot be seen from here: on another machine, in another container."""
    here = this_process()
    if here is None or (mark.host, mark.boot, mark.namespace) != (here.host, here.boot, here.namespace):
        return False
    try:
        os.kill(mark.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # Another user's; it may have ended all the same, and its number be used again.
    try:
        letter, started = _state_of(mark.pid)
    except (OSError, ValueError):
        return False  # Hidden, or it ends just now.
    return started != mark.started or letter in ("Z", "X")


def _state_of(pid: int) -> tuple[str, int]:
    """The letter of a process's state, and when it began; OSError or ValueError where that cannot be read."""
    text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    # The second field is its name, in parentheses, and may have any character.
    fields = text.rpartition(")")[2].split()
    if len(fields) < 20:
        raise ValueError(f"expected the kernel's line of a process, got {len(fields)} fields")
    return fields[0], int(fields[19])
