"""The command line, called in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from uso_engine.cli.app import app


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and everything printed, line breaks as spaces."""
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, " ".join((result.stdout + result.stderr).split())
