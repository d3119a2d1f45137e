"""``uso-engine config`` and ``uso-engine download``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from uso_engine.config import config_folder, list_configs, load_config
from uso_engine.loading.download import download as fetch
from uso_engine.loading.download import download_tokenizers as fetch_tokenizers
from uso_engine.loading.download import missing_files

from .console import console, reports_errors, say, warn


@reports_errors
def list_all() -> None:
    """List the configurations that come with the engine."""
    for name in list_configs():
        config = load_config(name)
        missing = missing_files(config)
        state = "ready" if not missing else f"missing {len(missing)} parts: uso-engine download {name}"
        say(f"{name:24} {config.description} ({state})")
    say(f"files in {config_folder()}")


@reports_errors
def show(config: Annotated[str, typer.Argument(help="A name, or a path to a TOML file.")]) -> None:
    """Show a configuration with every default filled in, as JSON."""
    console.print_json(load_config(config).model_dump_json())


@reports_errors
def download(
    config: Annotated[str | None, typer.Argument(help="A name, or a path to a TOML file.")] = None,
    tokenizers: Annotated[
        bool, typer.Option("--tokenizers", help="Only the tokenizers, for text encoders that are single files (2 MB).")
    ] = False,
) -> None:
    """Download what a configuration names from the Hugging Face hub. Gated models need HF_TOKEN."""
    token = os.environ.get("HF_TOKEN")
    if tokenizers == (config is not None):
        raise ValueError("expected a configuration to download, or --tokenizers")
    if config is None:
        fetch_tokenizers(token=token, report=say)
        return
    loaded = load_config(config)
    fetch(loaded, token=token, report=say)
    missing = missing_files(loaded)
    if missing:
        names = ", ".join(f"{part.what} ({part.text})" for part in missing)
        warn(names, label="not on the hub, and not here:")
        raise typer.Exit(1)
    say(f"{loaded.name} is complete")
