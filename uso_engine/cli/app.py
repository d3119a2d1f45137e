"""The commands and what happens around each: errors as one line, Ctrl-C, exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.logging import RichHandler

from uso_engine.errors import GenerationCancelled, USOError

P = ParamSpec("P")
R = TypeVar("R")

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

console = Console()
errors = Console(stderr=True)
app = typer.Typer(
    name="uso-engine",
    help="Image generation with USO: a prompt, a content image and style images in; pictures out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def fail(message: str, code: int = EXIT_FAILED) -> typer.Exit:
    """Print an error and make the exception that ends the command."""
    errors.print(f"[bold red]error:[/] {escaped(message)}", soft_wrap=True, highlight=False)
    return typer.Exit(code)


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what can go wrong in the world into one line and an exit code: 1 failed, 2 wrong arguments, 130 interrupted."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (KeyboardInterrupt, GenerationCancelled):
            errors.print("[yellow]interrupted[/]; nothing half-written is left behind")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except USOError as error:
            raise fail(str(error)) from error
        except ValueError as error:
            raise fail(sentence(error), EXIT_USAGE) from error

    return wrapped


def sentence(error: Exception) -> str:
    """An error's message in one line; pydantic's own are many lines, one sentence per problem is enough."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    problems = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        message = str(item["msg"]).removeprefix("Value error, ")
        problems.append(message if not field or message.startswith(field) else f"{field}: {message}")
    return "; ".join(problems)


def escaped(text: str) -> str:
    """Text that rich prints as it is."""
    return text.replace("[", r"\[")


@app.callback()
def _options(verbose: bool = typer.Option(False, "--verbose", "-v", help="Say what is chosen and loaded.")) -> None:
    handler = RichHandler(console=errors, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s")
    if verbose:
        logging.getLogger("uso_engine").setLevel(logging.INFO)


def main() -> None:
    """Entry point of ``uso-engine``."""
    from . import compare, configs, evaluate, generate, info, quantize, verify  # noqa: F401  each adds its commands

    app(prog_name="uso-engine")
    sys.exit(0)
