"""``uso-engine info``: what this machine has and what the engine will use of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

from rich.table import Table

from .app import app, console, reports_errors

_PACKAGES = (
    "uso-engine",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "optimum-quanto",
    "xformers",
    "onnxruntime-gpu",
    "onnxruntime",
)


@app.command()
@reports_errors
def info() -> None:
    """Show GPU, packages, kernels, attention backends and configurations of this machine."""
    import torch

    from uso_kernels.attention import available_backends

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("python", platform.python_version())
    for name in _PACKAGES:
        table.add_row(name, _version(name))
    table.add_row("device", _device(torch.cuda.is_available()))
    table.add_row("CPU", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    table.add_row("kernels", _kernels(torch.cuda.is_available()))
    for name, missing in available_backends("cuda" if torch.cuda.is_available() else "cpu").items():
        table.add_row(f"attention {name}", "can run" if missing is None else missing)
    console.print(table)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device(has_gpu: bool) -> str:
    import torch

    if not has_gpu:
        return "no CUDA GPU; the engine runs on the CPU"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        names.append(f"cuda:{index} {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    return "; ".join(names)


def _kernels(has_gpu: bool) -> str:
    if importlib.util.find_spec("triton") is None:
        return "PyTorch references (triton is not installed)"
    return "Triton" if has_gpu else "PyTorch references (Triton needs a GPU)"
