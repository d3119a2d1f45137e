"""``uso-engine compare``: two configurations on the same requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, errors, reports_errors, say
from .arguments import read_batch
from .progress import LoadingProgress

_PROMPT = "a house by the sea, at night"


@app.command()
@reports_errors
def compare(
    a: Annotated[str, typer.Argument(help="A configuration's name or TOML file.")],
    b: Annotated[str, typer.Argument(help="Another; errors are relative to this one.")],
    out: Annotated[Path, typer.Option(help="Folder for comparison.json, .txt and .png.")] = Path("comparison"),
    requests: Annotated[Path | None, typer.Option(help="A file of requests, one JSON object per line.")] = None,
    tier_a: Annotated[str | None, typer.Option(help="Precision tier of the first, instead of its configuration's.")] = None,
    tier_b: Annotated[str | None, typer.Option(help="Precision tier of the second.")] = None,
    floor: Annotated[bool, typer.Option(help="Also run the second in bf16 and float32: the noise floor.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
) -> None:
    """Run two configurations on the same requests: latent error per step, PSNR and SSIM of the images, and one picture."""
    asked = [{"prompt": _PROMPT, "images": [], "seed": 7}] if requests is None else read_batch(requests)
    with LoadingProgress(errors) as progress:
        from uso_engine.comparison.compare import compare as hold_against
        from uso_engine.comparison.recording import Recording, record
        from uso_engine.comparison.report import table, write_report
        from uso_engine.config import Tier, load_config
        from uso_engine.engine import USOEngine

        def recorded(config: str, tier: Tier | str | None) -> Recording:
            settings = load_config(config)
            if tier is not None:
                precision = type(settings.precision).model_validate({**settings.precision.model_dump(), "tier": tier})
                settings = settings.model_copy(update={"precision": precision})
            with USOEngine.from_config(settings, device=device, progress=progress) as engine:
                progress(f"done; running {config} in {settings.precision.tier}", 0, 0)
                return record(f"{config} in {settings.precision.tier}", engine, asked)

        first, second = recorded(a, tier_a), recorded(b, tier_b)
        beside = (recorded(b, "bf16"), recorded(b, "float32")) if floor else None
    comparison = hold_against(first, second, floor=beside)
    say(table(comparison))
    for path in write_report(comparison, out):
        say(path)
