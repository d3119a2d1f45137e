"""What a Triton launch is, which generation of GPU it is for, and where Triton may be missing.

Every kernel module describes its launch as data (`Launch`): the launcher runs it, and the ahead-of-time check compiles the very
same thing for other GPUs. Configurations come from tables keyed by generation and shape class; nothing is tuned at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from subprocess import CalledProcessError
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .extension import LOAD_ERRORS, extension_failure, one_line

TRITON_MISSING = extension_failure("triton.tools.tensor_descriptor")
"""Why there is no Triton, or None. The references need none; what does says so when it is called."""
if TRITON_MISSING is None:
    import triton
    from triton.tools import tensor_descriptor

    tl, TensorDescriptor = triton.language, tensor_descriptor.TensorDescriptor
else:
    triton = tl = TensorDescriptor = None

Generation = Literal["ampere", "ampere_consumer", "ada", "hopper", "blackwell", "blackwell_consumer"]

COMPUTE_CAPABILITIES: Mapping[Generation, int] = {
    "ampere": 80,
    "ampere_consumer": 86,
    "ada": 89,
    "hopper": 90,
    "blackwell": 100,
    "blackwell_consumer": 120,
}
SHARED_MEMORY_LIMIT_BYTES: Mapping[Generation, int] = {
    "ampere": 163 * 1024,
    "ampere_consumer": 99 * 1024,
    "ada": 99 * 1024,
    "hopper": 227 * 1024,
    "blackwell": 227 * 1024,
    "blackwell_consumer": 99 * 1024,
}
"""Shared memory one program may use. Source: CUDA C++ Programming Guide, technical specifications per compute capability."""

ALIGNMENT = 16
"""Triton compiles for addresses that are multiples of so many bytes apart from others."""

Function = TypeVar("Function", bound=Callable[..., Any])


class TritonUnavailable(RuntimeError):
    """A Triton kernel was asked for where Triton, or a GPU that it can compile for, is missing."""


def jit(function: Function) -> Function:
    """Mark a Triton kernel; without Triton the function stays as it is and is never called."""
    return function if triton is None else triton.jit(function)


def is_interpreting() -> bool:
    """Whether Triton was imported with its interpreter switched on, so that kernels run on CPU tensors."""
    return triton is not None and type(tl.sum).__name__ == "InterpretedFunction"


def current_device() -> int | None:
    """Index of the GPU that a launch goes to; None where there is none."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def numbered(device: torch.device) -> torch.device:
    """A device with its number: "cuda" alone is the GPU that is current where this is called, and may be another elsewhere."""
    is_unnumbered = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if is_unnumbered else device


@lru_cache
def _generation(index: int) -> Generation:
    major, minor = torch.cuda.get_device_capability(index)
    if major == 8:
        return {0: "ampere", 9: "ada"}.get(minor, "ampere_consumer")  # type: ignore[return-value]
    named: dict[int, Generation] = {9: "hopper", 10: "blackwell", 11: "blackwell", 12: "blackwell_consumer"}
    if major not in named:
        raise TritonUnavailable(f"kernels need a GPU of compute capability 8.0 or later, this one has {major}.{minor}")
    return named[major]


def kernels_missing(device: torch.device) -> str | None:
    """Why kernels do not run on a GPU, in one sentence; None where they do."""
    if TRITON_MISSING is not None:
        return f"{TRITON_MISSING} (the 'gpu' extra has it)"
    try:
        _generation(numbered(device).index)
    except TritonUnavailable as error:
        return str(error)
    return _driver_failure()


@lru_cache
def _driver_failure() -> str | None:
    """Why Triton cannot launch here; None where it can.

    Asked by beginning: what launches is a module in C, which Triton compiles where it has not kept it from another process.
    """
    try:
        _ = triton.runtime.driver.active.utils
    except (*LOAD_ERRORS, AssertionError, CalledProcessError) as error:
        return f"Triton cannot launch kernels: {one_line(error)}; it needs a C compiler and Python's headers (gcc, python3-dev)"
    return None


def generation_of(x: Tensor) -> Generation:
    """The generation whose configurations a tensor's device uses; the interpreter on a CPU goes by Hopper's.

    Raises:
        TritonUnavailable: Triton is not installed, or the device is neither a GPU nor interpreted.
        ValueError: the tensor is float64, for which there is no kernel.
    """
    if triton is None:
        raise TritonUnavailable(f"{TRITON_MISSING}; install the 'gpu' extra, or use the reference on a CPU")
    if x.dtype == torch.float64:
        raise ValueError("kernels take float32, bfloat16 or float16, got float64")
    if x.device.type == "cuda":
        return _generation(numbered(x.device).index)
    if x.device.type == "cpu" and is_interpreting():
        return "hopper"
    raise TritonUnavailable(f"Triton kernels run on CUDA, got a tensor on {x.device}")


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled for one generation and shape class.

    Args:
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
        blocks: tile sizes, passed to the kernel as constants.
    """

    num_warps: int
    num_stages: int
    blocks: Mapping[str, int]


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Args:
        name: what reports call it.
        kernel: the compiled or interpreted function.
        grid: programs along each axis.
        arguments: every argument but the tile sizes, by name: tensors, descriptors, numbers, constants.
        config: how it is compiled.
    """

    name: str
    kernel: Callable[..., Any]
    grid: tuple[int, ...]
    arguments: Mapping[str, object]
    config: Config

    def run(self) -> Any:
        """Launch on the current stream of the tensors' device.

        Returns:
            Triton's compiled kernel; None where there was nothing to launch or the interpreter ran it.
        """
        if 0 in self.grid:
            return None
        # Triton launches on the current device, whatever the tensors' is; on a CPU this does nothing.
        with torch.cuda.device_of(next(value for value in self.arguments.values() if isinstance(value, Tensor))):
            return self.kernel[self.grid](  # type: ignore[index]
                **self.arguments,
                **self.config.blocks,
                num_warps=self.config.num_warps,
                num_stages=self.config.num_stages,
                # Triton 3.10 changes the default; the checks were made with fused multiply-adds.
                enable_fp_fusion=True,
            )

    def prepared(self, compiled: Any, operands: tuple[object, ...]) -> PreparedLaunch | None:
        """The same launch for other operands of the same shapes, strides, types and alignments.

        Args:
            compiled: what `run` gave back.
            operands: those that this launch was described for.

        Returns:
            None where an argument is made from an operand's address, as a tensor descriptor is, or nothing was compiled.
        """
        if compiled is None:
            return None
        given = {**self.arguments, **self.config.blocks}
        template = [given[name] for name in self.kernel.arg_names]  # type: ignore[attr-defined]
        places = {id(operand): i for i, operand in enumerate(operands) if isinstance(operand, Tensor)}
        positions = []
        for i, value in enumerate(template):
            if isinstance(value, Tensor):
                if id(value) not in places:
                    return None
                positions.append((i, places[id(value)]))
                template[i] = None  # Keeps no memory alive.
            elif value is not None and not isinstance(value, (bool, int, float, str)):
                return None
        grid = (*self.grid, 1, 1)[:3]
        return PreparedLaunch(compiled[grid], template, tuple(positions))


@dataclass(frozen=True, eq=False)
class PreparedLaunch:
    """A compiled kernel, its grid and its arguments but for the operands: what is left of a launch is filling these in.

    Args:
        launch: takes all arguments in the kernel's order.
        template: the arguments, None where an operand goes.
        positions: where in the template, and which operand.
    """

    launch: Callable[..., object]
    template: list[object]
    positions: tuple[tuple[int, int], ...]

    def run(self, operands: tuple[object, ...]) -> None:
        """Launch on the current stream of the current device, which must be the operands'."""
        arguments = self.template.copy()
        for place, operand in self.positions:
            arguments[place] = operands[operand]
        self.launch(*arguments)

    def run_aligned(self, operands: tuple[Any, ...]) -> bool:
        """The same by the operands' addresses, for a launch that was prepared for multiples of `ALIGNMENT`.

        Returns:
            Whether they were, and it was launched.
        """
        arguments, all_addresses = self.template.copy(), 0
        for place, operand in self.positions:
            arguments[place] = address = operands[operand].data_ptr()
            all_addresses |= address
        if all_addresses % ALIGNMENT:
            return False
        self.launch(*arguments)
        return True


def strided(**tensors: Tensor | None) -> dict[str, object]:
    """A kernel's arguments NAME_ptr and NAME_stride of matrices; of a missing one None and 0."""
    arguments: dict[str, object] = {}
    for name, tensor in tensors.items():
        arguments[f"{name}_ptr"], arguments[f"{name}_stride"] = tensor, 0 if tensor is None else tensor.stride(0)
    return arguments


def head_strided(**tensors: Tensor | None) -> dict[str, object]:
    """A kernel's arguments NAME_ptr, NAME_stride and NAME_head_stride of [T, H, D] tensors; of a missing one None, 0 and 0."""
    arguments: dict[str, object] = {}
    for name, tensor in tensors.items():
        arguments[f"{name}_ptr"] = tensor
        strides = (0, 0) if tensor is None else tensor.stride()[:2]
        arguments[f"{name}_stride"], arguments[f"{name}_head_stride"] = strides
    return arguments


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors: then the differentiable reference must run."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
