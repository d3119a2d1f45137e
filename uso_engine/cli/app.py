"""The command line: its commands, and the options that stand before them."""

from __future__ import annotations

import logging
from typing import Annotated

import typer
from rich.logging import RichHandler

import uso_engine

from .compare import compare
from .configs import download, list_all, show
from .console import be_verbose, errors, say
from .discover import check, from_comfyui, from_diffusers
from .evaluate import evaluate
from .export_safety import export_safety
from .generate import generate
from .info import info
from .profile import profile
from .quantize import quantize
from .serve import new_key, serve
from .verify import verify

app = typer.Typer(
    name="uso-engine",
    help="Image generation with USO: a prompt, a content image and style images in; pictures out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


configurations = typer.Typer(help="Configurations: list them, show one.", no_args_is_help=True)
app.add_typer(configurations, name="config")
configurations.command("list")(list_all)
configurations.command()(show)
configurations.command()(from_comfyui)
configurations.command()(from_diffusers)
for command in (compare, download, check, evaluate, export_safety, generate, info, profile, quantize, serve, new_key, verify):
    app.command()(command)


def _show_version(asked: bool) -> None:
    if asked:
        say(f"uso-engine {uso_engine.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is chosen and loaded, and what ran.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    handler = RichHandler(console=errors, show_time=False, show_path=False)
    # A request's warnings are printed with its result.
    handler.addFilter(lambda record: not getattr(record, "in_result", False))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s")
    if verbose:
        be_verbose()
