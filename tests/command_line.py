"""The command line, called in this process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from uso_engine.cli.app import app


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and everything printed, line breaks as spaces."""
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


def small_picture(path: Path) -> list[str]:
    """Arguments that make a small picture on a CPU."""
    return ["generate", "--prompt", "x", "--size", "64x64", "--steps", "4", "--seed", "3", "--device", "cpu", "-o", str(path)]
