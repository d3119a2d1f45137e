"""What every command prints with and ends by: lines on the console, errors as one line, Ctrl-C, exit codes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from uso_engine.errors import GenerationCancelled, USOError

from .exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE

P = ParamSpec("P")
R = TypeVar("R")

# What is printed is mostly paths and prompts: brackets, colons and numbers in them are theirs, not instructions to the console.
console = Console(markup=False, emoji=False, highlight=False)
errors = Console(stderr=True, markup=False, emoji=False, highlight=False)


@dataclass
class Interrupts:
    """Whether Ctrl-C was pressed: a library that is being imported may turn it into its own error, or pass over it."""

    seen: bool = False

    def check(self) -> None:
        """Interrupt what has not noticed."""
        if self.seen:
            raise KeyboardInterrupt


interrupts = Interrupts()


def say(message: object, *, label: str = "", style: str = "", to: Console = console) -> None:
    """Print one line as it is, however long, after a label in colour."""
    to.print(Text.assemble((label, style), " " if label else "", str(message)), soft_wrap=True)


def fail(message: str, code: int = EXIT_FAILED) -> typer.Exit:
    """Print an error and make the exception that ends the command."""
    say(message, label="error:", style="bold red", to=errors)
    return typer.Exit(code)


def warn(message: str, label: str = "warning:") -> None:
    """Print a warning."""
    say(message, label=label, style="yellow", to=errors)


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what can go wrong in the world into one line and an exit code: 1 failed, 2 wrong arguments, 130 interrupted."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (KeyboardInterrupt, GenerationCancelled):
            raise _interrupted() from None
        except USOError as error:
            raise (_interrupted() if interrupts.seen else fail(str(error))) from error
        except OSError as error:
            raise (_interrupted() if interrupts.seen else fail(said_by_the_system(error))) from error
        except ValueError as error:
            raise (_interrupted() if interrupts.seen else fail(sentence(error), EXIT_USAGE)) from error

    return wrapped


def _interrupted() -> typer.Exit:
    say("nothing half-written is left behind", label="interrupted;", style="yellow", to=errors)
    return typer.Exit(EXIT_INTERRUPTED)


def said_by_the_system(error: OSError) -> str:
    """An operating system's error in one line; one without a file's name comes from what the command prints."""
    reason = error.strerror or str(error)
    return f"cannot write the output: {reason}" if error.filename is None else f"{error.filename}: {reason}"


def sentence(error: Exception) -> str:
    """An error's message in one line; pydantic's own are many lines, one sentence per problem is enough."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    problems = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        message = str(item["msg"]).removeprefix("Value error, ")
        problems.append(message if not field or message.startswith((field, repr(field))) else f"{field}: {message}")
    return "; ".join(problems)


def be_verbose() -> None:
    """Say what is chosen and loaded, and what ran, from now on."""
    logging.getLogger("uso_engine").setLevel(logging.INFO)


def is_verbose() -> bool:
    """Whether that was asked for."""
    return logging.getLogger("uso_engine").isEnabledFor(logging.INFO)
