"""Starting an engine's threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


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
