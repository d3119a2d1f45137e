"""``uso-engine evaluate``: content, style and prompt accuracy on held-out drawings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import console, reports_errors, say
from .outputs import make_folder

if TYPE_CHECKING:
    from uso_engine.engine import USOEngine


@reports_errors
def evaluate(
    config: Annotated[str, typer.Argument(help="Name of a configuration or path to a TOML file.")] = "uso-tiny",
    count: Annotated[int, typer.Option(help="Held-out triplets, at least 2.")] = 48,
    seed: Annotated[int, typer.Option(help="Seed of the first triplet; training used seeds from a million on.")] = 0,
    tiers: Annotated[str, typer.Option(help="Precision tiers, separated by commas; the first one runs every row.")] = "bf16",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    changes: Annotated[bool, typer.Option(help="Also drop and exchange every input.")] = True,
    output: Annotated[Path | None, typer.Option(help="Folder for report.json, report.md and grid.jpg.")] = None,
) -> None:
    """Judge a configuration on drawings it was not trained on, by classifiers that only ever saw drawings.

    Everything given, each input dropped and exchanged, and fewer steps; content, style and prompt accuracy beside chance.
    """
    from uso_engine.config import PrecisionConfig, load_config
    from uso_engine.engine import USOEngine
    from uso_engine.evaluation.evaluate import draw_held_out, measure_autoencoder, standard_variations
    from uso_engine.evaluation.evaluate import evaluate as run

    draw_held_out(count, seed)
    if output is not None:
        make_folder(output)
    loaded = load_config(config)
    engines: list[tuple[str, USOEngine]] = []
    try:
        for name in dict.fromkeys(part.strip() for part in tiers.split(",")):
            precision = PrecisionConfig.model_validate({**loaded.precision.model_dump(), "tier": name})
            engines.append((name, USOEngine.from_config(loaded.model_copy(update={"precision": precision}), device=device)))
        with console.status("evaluating") as status:
            report = run(
                engines,
                count=count,
                seed=seed,
                variations=standard_variations(changes=changes),
                progress=lambda row, done, of: status.update(f"{row}: {done} of {of}"),
            )
            report = replace(report, autoencoder_psnr_db=measure_autoencoder(engines[0][1], report.drawings))
    finally:
        for _, engine in engines:
            engine.close()
    table = report.to_table()
    say(table)
    if output is not None:
        (output / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
        (output / "report.md").write_text(table + "\n", encoding="utf-8")
        report.to_grid().save(output / "grid.jpg", quality=90)
        say(f"written to {output}")
