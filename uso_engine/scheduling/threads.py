"""An engine's threads: starting them, and their work on a GPU beside a caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def start_daemon(run: Callable[..., None], name: str, *arguments: Any) -> threading.Thread | None:
    """Start a thread that does not keep the process alive: whoever waits for a result does, an idle engine must not.

    Args:
        run: what it does.
        name: of the thread.
        arguments: of `run`.

    Returns:
        The thread; None where Python starts none any more, which is from 3.12 on so once the main thread has ended.

    Raises:
        RuntimeError: the process may have no more threads.
    """
    thread = threading.Thread(target=run, args=arguments, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        if "shutdown" not in str(error):
            raise
        return None
    return thread


def use_device(device: torch.device) -> None:
    """Make a GPU this thread's; it has a number (`uso_kernels.launch.numbered`), without which PyTorch refuses it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def callers_stream(device: torch.device) -> torch.cuda.Stream | None:
    """This thread's stream on a GPU, where it is not the default one, to which the engine's threads give all their work."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.current_stream(device)
    return None if stream == torch.cuda.default_stream(device) else stream


def lend(device: torch.device, *tensors: Tensor | None) -> None:
    """Give this thread tensors of the engine: their memory is not handed out again before this thread's stream has read them.

    Args:
        device: the engine's.
        tensors: computed there; None where there is none.
    """
    stream = callers_stream(device)
    for tensor in tensors:
        if stream is not None and tensor is not None and tensor.device == device:
            tensor.record_stream(stream)


def hand_over(device: torch.device) -> None:
    """Let the engine's threads' work on a GPU from now on come after all of this thread's: they read what it computed."""
    stream = callers_stream(device)
    if stream is not None:
        torch.cuda.default_stream(device).wait_stream(stream)


def take_over(device: torch.device, made: Result) -> Result:
    """Let this thread's work on a GPU come after all that the engine's threads gave it: it reads what they computed.

    Args:
        device: the engine's.
        made: a tensor, or what has tensors for fields; they are lent to this thread.
    """
    stream = callers_stream(device)
    if stream is not None:
        stream.wait_stream(torch.cuda.default_stream(device))
        found = [made, *vars(made).values()] if is_dataclass(made) else [made]
        lend(device, *(tensor for tensor in found if isinstance(tensor, Tensor)))
    return made


@contextmanager
def in_order(device: torch.device) -> Iterator[None]:
    """Within it, this thread's work on a GPU comes after all that the engine's threads gave it before, and before all later."""
    take_over(device, None)
    try:
        yield
    finally:
        hand_over(device)
