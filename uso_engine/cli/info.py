"""``uso-engine info``: what this machine has and what the engine will use of it."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import replace
from typing import Annotated

import typer

from .console import reports_errors, say

_PACKAGES = ("uso-engine", "torch", "diffusers", "transformers")
_OPTIONAL = {
    "triton": "triton",
    "optimum-quanto": "optimum.quanto",
    "xformers": "xformers.ops",
    "onnxruntime-gpu": "onnxruntime",
    "onnxruntime": "onnxruntime",
}
"""Packages that the engine works without, each with the module that shows whether it loads."""


@reports_errors
def info(
    config: Annotated[str | None, typer.Argument(help="A configuration: show what GPU memory each tier of it needs.")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="GPU memory in GiB to plan for; repeat.")] = None,
    width: Annotated[int, typer.Option(help="Width of the image to plan for.")] = 1024,
    height: Annotated[int, typer.Option(help="Height of the image to plan for.")] = 1024,
    num_images: Annotated[int, typer.Option(help="Images at once to plan for.")] = 1,
) -> None:
    """Show GPU, packages, kernels and attention backends of this machine; with a configuration, its memory plans."""
    if config is not None:
        _plans(config, budget or [24.0, 16.0, 12.0, 8.0], (width, height, num_images))
        return
    import torch

    from uso_kernels.attention import available_backends

    facts = {"python": platform.python_version()}
    facts |= {name: _version(name) or "not installed" for name in _PACKAGES}
    facts |= {name: _optional(name, module) for name, module in _OPTIONAL.items()}
    facts["device"] = _device(torch.cuda.is_available())
    facts["CPU"] = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    facts["kernels"] = _kernels(torch.cuda.is_available())
    for name, missing in available_backends("cuda" if torch.cuda.is_available() else "cpu").items():
        facts[f"attention {name}"] = "can run" if missing is None else missing
    facts["CUDA graphs"] = _graphs()
    facts |= {f"FLUX.1-dev in {tier}": need for tier, need in _tier_needs().items()}
    facts["memory plans"] = "uso-engine info CONFIG"
    # Not a table of the console's: at the width of a narrow terminal or of none it would cut what people send with a report.
    width = max(map(len, facts))
    for name, fact in facts.items():
        say(f"{name:<{width}}  {fact}")


def _graphs() -> str:
    """For which pictures `cuda_graphs = "auto"` makes them here."""
    import torch

    from uso_engine.model.params import TransformerParams
    from uso_engine.model.roofline import Tokens, step_flops
    from uso_engine.sampling.host_bound import gpu_ms, host_ms
    from uso_engine.sampling.step_graphs import why_no_graphs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = why_no_graphs("auto", device, has_plan=False)
    if reason is not None:
        return reason
    params, capability = TransformerParams(), torch.cuda.get_device_capability(device)
    flops = {side: step_flops(params, Tokens(image=(side // 16) ** 2)) for side in range(256, 2049, 64)}
    sides = [side for side in flops if gpu_ms(flops[side], capability) < host_ms(params, 1)]
    if not sides:
        return "never by themselves: every step of FLUX.1-dev is predicted to keep this GPU busier than the host"
    return f"for steps that are predicted to keep the host busier: FLUX.1-dev from text alone, up to {sides[-1]} x {sides[-1]}"


def _tier_needs() -> dict[str, str]:
    """GPU memory of the full-size transformer in every tier, from sizes alone."""
    from uso_engine.model.params import TransformerParams
    from uso_engine.offload.sizes import transformer_sizes
    from uso_engine.precision.tiers import TIERS
    from uso_engine.precision.transformer import DTYPES, layer_formats

    params = TransformerParams()
    found = {
        name: transformer_sizes(params, layer_formats(params, name), dtype=DTYPES[tier.dtype]) for name, tier in TIERS.items()
    }
    return {
        tier: f"transformer {sizes.total / 1e9:.1f} GB, {sizes.without_modulation / 1e9:.1f} without modulation linears"
        for tier, sizes in found.items()
    }


def _plans(config: str, budgets: list[float], size: tuple[int, int, int]) -> None:
    """Print a configuration's memory plans; computed from sizes alone, so that no weights are needed."""
    from uso_engine.config import load_config
    from uso_engine.offload.budget import budget_bytes, public_sizes, usual_request_size
    from uso_engine.offload.plan import describe_plans

    settings = load_config(config)
    for budget in budgets:
        budget_bytes(budget, "--budget")
    if min(size[:2]) < 16 or size[2] < 1:
        raise ValueError(
            f"--width and --height must be at least 16, --num-images at least 1, got {size[0]}, {size[1]}, {size[2]}"
        )
    workload = replace(usual_request_size(settings), width=size[0], height=size[1], images=size[2])
    tier = settings.precision.tier
    sizes = public_sizes(settings, tier)
    say(f"{settings.name}, tier {tier}, {size[2]} x {size[0]}x{size[1]}")
    say(describe_plans(sizes, budgets, workload))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _optional(package: str, module: str) -> str:
    """Version of a package that is installed, and why it cannot be used where it does not load."""
    from uso_kernels.extension import extension_failure

    version = _version(package)
    if version is None:
        return "not installed"
    reason = extension_failure(module)
    return version if reason is None else f"{version}, but {reason}"


def _device(has_gpu: bool) -> str:
    import torch

    from uso_engine.loading.device import cuda_missing, memory_note

    if not has_gpu:
        return f"{cuda_missing()}; the engine runs on the CPU"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        note = memory_note(torch.device("cuda", index))
        names.append(f"cuda:{index} {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB, {note}")
    return "; ".join(names)


def _kernels(has_gpu: bool) -> str:
    import torch

    from uso_kernels.launch import TRITON_MISSING, kernels_missing

    if has_gpu:
        reason = kernels_missing(torch.device("cuda"))
        return "Triton" if reason is None else f"none for this GPU, which the engine then refuses: {reason}"
    return f"PyTorch references ({TRITON_MISSING or 'Triton needs a GPU'})"
