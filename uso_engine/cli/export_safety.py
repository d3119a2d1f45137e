"""``uso-engine export-safety``: a configuration's safety classifier as a file for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import fail, reports_errors, say


@reports_errors
def export_safety(
    config: Annotated[str, typer.Argument(help="A name, or a path to a TOML file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file, for example safety.onnx.")],
) -> None:
    """Export a configuration's safety classifier to ONNX, compare its answers with PyTorch's, and write it to one file."""
    from uso_engine.config import load_config

    settings = load_config(config)
    if settings.safety is None:
        raise fail(f"{settings.name} has no [safety]: there is no classifier to export")
    if output.exists():
        raise fail(f"{output} is there already; remove it, or name another file")
    from uso_engine.loading.transformer import resolve
    from uso_engine.safety.onnx_export import export_classifier

    made = export_classifier(resolve(settings.safety.folder, "safety checker", settings), output)
    say(f"{output}  {output.stat().st_size / 1e6:.1f} MB")
    say(f"{made.pictures} pictures: every probability within {made.largest_difference:.1e} of PyTorch's")
    say(f'To use it, write runtime = "onnx" and onnx_file = "{output.resolve()}" under [safety] of the configuration.')
