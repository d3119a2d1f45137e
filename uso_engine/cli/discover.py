"""``uso-engine check``, ``config from-comfyui`` and ``config from-diffusers``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uso_engine.config import EngineConfig, load_config

from .console import reports_errors, say, warn

if TYPE_CHECKING:
    from uso_engine.loading.comfyui_folder import FoundParts

Out = Annotated[Path | None, typer.Option(help="Where to write the configuration; it is printed if left out.")]
Base = Annotated[str, typer.Option(help="The configuration whose sizes, defaults and missing parts are taken.")]


@reports_errors
def check(config: Annotated[str, typer.Argument(help="A name, or a path to a TOML file.")]) -> None:
    """Open every file of a configuration and check keys and shapes, in seconds; list all that is missing or does not fit."""
    from uso_engine.loading.examination import examine

    loaded = load_config(config)
    failed = 0
    for found in examine(loaded):
        if found.facts is None:
            failed += 1
            warn(f"{found.part.text}: {found.problem}", label=f"{found.part.what}:")
        else:
            say(f"{found.part.what}: {found.part.text}: {found.facts.form}{_size(found.facts.loaded_bytes)}")
    if failed:
        warn(f"{failed} parts of {loaded.name} are missing or do not fit", label="not ready:")
        raise typer.Exit(1)
    say(f"{loaded.name} is complete")


@reports_errors
def from_comfyui(
    folder: Annotated[Path, typer.Argument(help="A ComfyUI installation, or its models folder.")],
    out: Out = None,
    base: Base = "uso-flux-dev",
) -> None:
    """Write a configuration for the files of a ComfyUI installation."""
    from uso_engine.loading.comfyui_folder import find_in_comfyui

    _write(folder, out, base, find_in_comfyui)


@reports_errors
def from_diffusers(
    folder: Annotated[Path, typer.Argument(help="A pipeline of diffusers, such as a FLUX.1-dev repository.")],
    out: Out = None,
    base: Base = "uso-flux-dev",
) -> None:
    """Write a configuration for a pipeline of diffusers; LoRA, projector and vision encoder are the base's."""
    from uso_engine.loading.comfyui_folder import find_in_diffusers

    _write(folder, out, base, find_in_diffusers)


def _write(folder: Path, out: Path | None, base: str, find: Callable[[Path, EngineConfig], FoundParts]) -> None:
    from uso_engine.imaging.atomic import write_atomically
    from uso_engine.loading.comfyui_folder import configuration_from
    from uso_engine.loading.configuration_text import configuration_text

    template = load_config(base)
    found = find(folder.expanduser().absolute(), template)
    for what, candidate in found.chosen.items():
        say(f"{what}: {candidate.path}: {candidate.facts.form}{_size(candidate.facts.loaded_bytes)}")
        for other in found.others.get(what, ()):
            say(f"  instead: {other}")
    for lora in found.loras:
        say(f"another LoRA, not merged: {lora}")
    for what, reasons in found.missing.items():
        warn("; ".join(["none found, the base's stays", *reasons[:5]]), label=f"{what}:")
    made = configuration_from(found, template).model_copy(update={"name": out.stem if out else "my-models"})
    text = configuration_text(made, f"Made by `uso-engine config` from {folder}; sizes and what was not found are {base}'s.")
    if out is None:
        typer.echo(text)
        return
    write_atomically(out, text.encode())
    say(f"wrote {out}; `uso-engine check {out}` looks at all of it, `uso-engine download {out}` gets what is missing")


def _size(loaded_bytes: int) -> str:
    return f", {loaded_bytes / 2**30:.3g} GiB in memory" if loaded_bytes else ""
