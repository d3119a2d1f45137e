"""Which device an engine runs on: whether it is there, whether the engine's kernels run on it, and who holds its memory."""

from __future__ import annotations

import logging
import traceback

import torch

from uso_engine.errors import BackendError, DeviceMemoryError
from uso_kernels.extension import one_line
from uso_kernels.launch import kernels_missing, numbered

logger = logging.getLogger(__name__)

GIB = 2**30
_WORTH_NAMING_BYTES = GIB
"""CUDA itself takes some hundred MiB for each process."""


def cuda_missing() -> str | None:
    """Why torch finds no GPU, in one sentence; None where it finds one."""
    if torch.cuda.is_available():
        return None
    seen = f"torch {torch.__version__} sees no CUDA GPU"
    if torch.version.cuda is None:
        return f"{seen}: it is built without CUDA"
    try:
        # Only this says which: no driver, one that is too old for this torch, or none visible.
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{seen}: {one_line(error)}"
    return seen


def default_device() -> torch.device:
    """The first GPU, or the CPU where there is none; if torch was built for one, a warning says why it is not used."""
    reason = cuda_missing()
    if reason is None:
        return torch.device("cuda")
    if torch.version.cuda is not None:
        logger.warning("%s; the engine runs on the CPU, which is a hundred times slower", reason)
    return torch.device("cpu")


def check_device(device: torch.device | str) -> torch.device:
    """Check that a device exists, answers, and is one that the engine's kernels run on.

    Returns:
        The device, a GPU by its number: the engine's threads and processes have to mean the same one.

    Raises:
        BackendError: it is not; says why, and what would do.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise BackendError(f"{device!r} is not a device: expected 'cpu', 'cuda' or 'cuda:0'") from error
    if found.type not in ("cpu", "cuda"):
        raise BackendError(f"device {device!r} was asked for; the engine runs on 'cpu', 'cuda' or 'cuda:0'")
    if found.type == "cuda":
        _check_gpu(found, f"device {str(device)!r} was asked for, but")
    return numbered(found)


def _check_gpu(device: torch.device, asked: str) -> None:
    reason = cuda_missing()
    if reason is not None:
        raise BackendError(f"{asked} {reason}; device 'cpu' works without")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise BackendError(f"{asked} there are only {torch.cuda.device_count()} GPUs")
    try:
        torch.cuda.mem_get_info(device)
        reason = kernels_missing(device)
    except RuntimeError as error:
        raise BackendError(
            f"{asked} it does not answer: {one_line(error)}; another process may hold it for itself (nvidia-smi lists them)"
        ) from error
    if reason is not None:
        raise BackendError(f"{asked} the engine's kernels do not run on it: {reason}; device 'cpu' works without them")


def memory_note(device: torch.device) -> str:
    """How much of a GPU's memory is free, and how much others hold where that is worth naming; empty for a CPU."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    note = f"{free / GIB:.2f} of {total / GIB:.2f} GiB are free"
    if others > _WORTH_NAMING_BYTES:
        note += f", {others / GIB:.2f} are held outside this process's allocator: by other processes, or other libraries"
    return note


def out_of_memory(error: BaseException, where: str, device: torch.device, advice: str) -> DeviceMemoryError:
    """What a caller gets for memory that did not do; whoever keeps it keeps nothing of what was being computed.

    Args:
        error: of PyTorch's.
        where: what was being done.
        device: whose memory it was.
        advice: what would help.
    """
    let_go(error)
    parts = [f"memory ran out in {where}: {str(error).splitlines()[0]}", memory_note(device), advice]
    made = DeviceMemoryError("; ".join(part for part in parts if part))
    made.__cause__ = error
    return made


def let_go(error: BaseException) -> None:
    """Let the functions that an error came through forget what they hold: their tensors otherwise live as long as it does.

    So do those of the errors that it was raised from or during, which have functions of their own.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        left += (one.__cause__, one.__context__)
