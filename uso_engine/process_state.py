"""The state of the process that PyTorch reads at every operation, held as the engine needs it while the engine works.

Notebooks and services set default types, autocast, TF32 and the like for their own code. Left alone, these would change what a
request computes, and, through the condition caches, what later requests get. `clean_process_state` replaces them around the
engine's work and gives the caller's back afterwards.

Two kinds: what belongs to a thread (autocast, inference mode, the default device) is entered for that thread; what
belongs to the process (default dtype, precision switches, deterministic algorithms) is replaced when the first thread enters
and given back when the last one leaves, so other threads of the process see the engine's values meanwhile. What another thread
sets meanwhile holds for the engine, too, until it is replaced by what was there before the engine's work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch

from .interrupt_lock import InterruptSafeLock

Value = TypeVar("Value")


@dataclass(frozen=True)
class Setting:
    """One switch of the process.

    Args:
        read: its value now.
        write: sets it.
        value: what the engine works with.
    """

    read: Callable[[], object]
    write: Callable[[object], None]
    value: object


def _attribute(owner: object, name: str, value: object) -> Setting:
    return Setting(lambda: getattr(owner, name), lambda new: setattr(owner, name, new), value)


def _functions(read: Callable[[], Value], write: Callable[[Value], object], value: Value) -> Setting:
    return Setting(read, cast("Callable[[object], None]", write), value)


def _float32_precision(backend: str, operation: str, value: str) -> Setting:
    """A precision switch of torch 2.9 and later: "ieee", "tf32", "bf16", or "none" to follow the more general one."""
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    return _functions(lambda: read(backend, operation), lambda new: write(backend, operation, new), value)


def _deterministic() -> object:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_deterministic(new: object) -> None:
    assert isinstance(new, tuple)
    torch.use_deterministic_algorithms(new[0], warn_only=new[1])


def _reduced_precision(kind: str) -> Setting:
    """Whether cuBLAS may add up in 16 bits. Split-k, the other half of the newer setting, gets torch's default."""
    read = getattr(torch._C, f"_get_cublas_allow_{kind}_reduced_precision_reduction")
    write = getattr(torch._C, f"_set_cublas_allow_{kind}_reduced_precision_reduction")

    def set_(new: object) -> None:
        # A pair in newer versions of torch, a single flag in older ones.
        write(*(new if isinstance(new, tuple) else (new,)))

    return Setting(read, set_, (False, True) if isinstance(read(), tuple) else False)


def _legacy_cudnn_tf32() -> bool:
    """`torch.backends.cudnn.allow_tf32`, which refuses to be read where it is true and the newer switches are not."""
    try:
        return bool(torch._C._get_cudnn_allow_tf32())
    except RuntimeError:
        return True


def _settings() -> list[Setting]:
    """Every switch, in the order in which it is read and written; given back in the opposite one.

    A particular precision switch that says "none" reads as the more general one's value, so the general ones are put to "none"
    first. The legacy switches write the newer ones and refuse to be read while those contradict them, so they come after them.
    """
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    particular = [("cuda", name) for name in ("matmul", "conv", "rnn")] + [("mkldnn", name) for name in ("matmul", "conv")]
    return [
        _functions(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        *(_float32_precision(backend, "all", "none") for backend in ("generic", "cuda", "mkldnn")),
        *(_float32_precision(backend, name, "ieee") for backend, name in particular),
        _functions(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        _functions(_legacy_cudnn_tf32, torch._C._set_cudnn_allow_tf32, False),
        _reduced_precision("bf16"),
        _reduced_precision("fp16"),
        _attribute(cuda.matmul, "allow_fp16_accumulation", False),
        _attribute(cudnn, "enabled", True),
        _attribute(cudnn, "benchmark", False),
        _attribute(mkldnn, "enabled", True),
        Setting(_deterministic, _set_deterministic, (False, False)),
        _functions(cuda.flash_sdp_enabled, cuda.enable_flash_sdp, True),
        _functions(cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, True),
        _functions(cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
        _functions(cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, True),
        _functions(cuda.fp16_bf16_reduction_math_sdp_allowed, cuda.allow_fp16_bf16_reduction_math_sdp, False),
    ]


class _ProcessSettings:
    """The settings of the process, replaced while at least one thread works."""

    def __init__(self) -> None:
        self._lock = InterruptSafeLock()
        self._settings = _settings()
        self._before: list[tuple[Setting, object]] = []
        self._workers: set[object] = set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the engine's values until the last of those who asked has left.

        An interrupt (Ctrl-C) may come between any two of these lines: a setting is remembered before it is replaced, leaving is
        the same whether entering was complete or not, and is done again where it was interrupted itself.
        """
        worker = object()
        try:
            self.enter(worker)
            yield
        finally:
            try:
                self.leave(worker)
            finally:
                self.leave(worker)

    def enter(self, worker: object) -> None:
        """Hold the engine's values for one more, from any thread."""
        self._lock.run(lambda: self._enter(worker))

    def leave(self, worker: object) -> None:
        """Let go for one of them, from any thread; the last one gives the caller's values back."""
        self._lock.run(lambda: self._leave(worker))

    def leave_behind(self) -> None:
        """In a forked child: those who asked stayed in the parent, and so did whoever holds the lock."""
        self._lock = InterruptSafeLock()
        self._workers.clear()
        self._leave(self)

    def _enter(self, worker: object) -> None:
        self._workers.add(worker)
        for setting in self._settings[len(self._before) :]:
            self._before.append((setting, setting.read()))
            setting.write(setting.value)

    def _leave(self, worker: object) -> None:
        self._workers.discard(worker)
        while self._before and not self._workers:
            setting, value = self._before[-1]
            setting.write(value)
            self._before.pop()


_process = _ProcessSettings()
if hasattr(os, "register_at_fork"):  # Windows forks nothing.
    os.register_at_fork(after_in_child=_process.leave_behind)


class ProcessHold:
    """Keeps the settings of the process as the engine needs them, from `enter` until it is released by whichever thread.

    Those of a thread (autocast, inference mode, the default device) are not part of it: threads of the engine's own have none.
    """

    def enter(self) -> None:
        """Begin."""
        _process.enter(self)

    def release(self) -> None:
        """Let go; a second call does nothing."""
        _process.leave(self)


@contextmanager
def clean_process_state() -> Iterator[None]:
    """Work in float32 by default, on the CPU by default, without autocast, inference mode, TF32, sums in 16 bits or an
    autotuner's choice of convolutions, whatever the caller has set; what was set is there again afterwards.

    Deterministic mode is switched off, too: what the engine runs is deterministic without it, and the mode makes some of
    PyTorch's operations refuse on a GPU.
    """
    with _process.held(), ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        if torch.is_inference_mode_enabled():
            # Tensors made in inference mode could never be changed in place outside it: caches and weights outlive a call.
            stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            # Only then: a default device is asked about at every operation.
            stack.enter_context(torch.device("cpu"))
        yield
