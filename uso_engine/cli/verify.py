"""``uso-engine verify``: reference cases through the engine."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .console import fail, reports_errors, say
from .tiers import TierChoice, chosen_tier


class KernelChoice(StrEnum):
    """Which implementation of the kernels."""

    REFERENCE = "reference"
    TRITON = "triton"


@reports_errors
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of reference cases (*.safetensors, tables.json).")],
    tier: Annotated[TierChoice | None, typer.Option(help="Precision of the weights; default: what each case is in.")] = None,
    attention: Annotated[str, typer.Option(help="Attention backend; see `uso-engine info`.")] = "auto",
    kernels: Annotated[KernelChoice | None, typer.Option(help="Default: triton on a GPU, reference on a CPU.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    ulysses: Annotated[int, typer.Option(min=1, help="Processes that compute every step together.")] = 1,
) -> None:
    """Rebuild reference cases through the engine's own loaders, model and sampler, and compare every tensor.

    Exits with 1 if any error is over its bound.
    """
    if kernels is KernelChoice.TRITON and device == "cpu":
        # Triton decides when a kernel is defined whether it is interpreted, so this stands before anything imports it.
        os.environ["TRITON_INTERPRET"] = "1"
    if kernels is KernelChoice.TRITON and ulysses > 1 and device == "cpu":
        raise fail("--kernels triton on a CPU interprets kernels in this process only; leave out --ulysses", 2)
    if kernels is KernelChoice.REFERENCE and device != "cpu":
        raise fail(f"--kernels reference runs on the CPU, not on {device}", 2)

    from uso_engine.verification.run import VerifyOptions
    from uso_engine.verification.run import verify as run
    from uso_kernels.launch import TritonUnavailable

    if kernels is KernelChoice.TRITON and device == "cpu":
        from uso_kernels.interpret import register_cpu_launches

        try:
            register_cpu_launches()
        except TritonUnavailable as error:
            raise fail(f"--kernels triton: {error}") from error
    checked = failed = 0
    for check in run(folder, VerifyOptions(None if tier is None else chosen_tier(tier), device, attention, ulysses)):
        checked += 1
        failed += not check.is_within
        bound = "no bound" if check.bound is None else f"<= {check.bound:.1e}"
        verdict, style = ("ok  ", "green") if check.is_within else ("FAIL", "bold red")
        note = f"  {check.note}" if check.note else ""
        say(f"{check.case}  {check.name}  {check.error:.2e} {bound}{note}", label=verdict, style=style)
    if checked == 0:
        raise fail(f"no case in {folder} can be checked with tier {tier.value if tier else 'float32'}")
    say(f"{checked} tensors compared, {failed} over their bound")
    if failed:
        raise typer.Exit(1)
