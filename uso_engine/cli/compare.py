"""``uso-engine compare``: two configurations on the same requests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uso_engine.precision.tiers import FLOAT_TIERS, QUANTIZED_TIERS, TierName

from .arguments import read_batch
from .console import errors, reports_errors, say
from .outputs import make_folder
from .progress import LoadingProgress
from .tiers import TierChoice, chosen_tier

if TYPE_CHECKING:
    from uso_engine.config import EngineConfig

_PROMPT = "a house by the sea, at night"
_FLOOR = (FLOAT_TIERS["bfloat16"], FLOAT_TIERS["float32"])


@reports_errors
def compare(
    a: Annotated[str, typer.Argument(help="A configuration's name or TOML file.")],
    b: Annotated[str, typer.Argument(help="Another; errors are relative to this one.")],
    out: Annotated[Path, typer.Option(help="Folder for comparison.json, .txt and .png.")] = Path("comparison"),
    requests: Annotated[Path | None, typer.Option(help="A file of requests, one JSON object per line.")] = None,
    tier_a: Annotated[
        TierChoice | None, typer.Option(help="Precision tier of the first, instead of its configuration's.")
    ] = None,
    tier_b: Annotated[TierChoice | None, typer.Option(help="Precision tier of the second.")] = None,
    floor: Annotated[bool, typer.Option(help="Also run the second in bf16 and float32: the noise floor.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
) -> None:
    """Run two configurations on the same requests: latent error per step, PSNR and SSIM of the images, and one picture."""
    asked = [{"prompt": _PROMPT, "images": [], "seed": 7}] if requests is None else read_batch(requests)
    with LoadingProgress(errors) as progress:
        from uso_engine.comparison.compare import compare as hold_against
        from uso_engine.comparison.recording import Recording, record
        from uso_engine.comparison.report import table, write_report
        from uso_engine.config import load_config
        from uso_engine.engine import USOEngine
        from uso_engine.loading.presence import require_parts

        require_parts(load_config(a), load_config(b))
        first_tier, second_tier = (None if tier is None else chosen_tier(tier) for tier in (tier_a, tier_b))
        settings_a, settings_b = _in_tier(a, first_tier, "--tier-a"), _in_tier(b, second_tier, "--tier-b")
        rounded = [_in_tier(b, tier, "--floor", "--no-floor") for tier in _FLOOR] if floor else []
        make_folder(out)

        def recorded(config: str, settings: EngineConfig) -> Recording:
            with USOEngine.from_config(settings, device=device, progress=progress) as engine:
                progress(f"done; running {config} in {settings.precision.tier}", 0, 0)
                return record(f"{config} in {settings.precision.tier}", engine, asked)

        first, second = recorded(a, settings_a), recorded(b, settings_b)
        beside = (recorded(b, rounded[0]), recorded(b, rounded[1])) if floor else None
    comparison = hold_against(first, second, floor=beside)
    say(table(comparison))
    for path in write_report(comparison, out):
        say(path)


def _in_tier(config: str, tier: TierName | None, flag: str, instead: str | None = None) -> EngineConfig:
    """A configuration in another tier; refused before anything runs where its transformer is a file in one tier only.

    Args:
        config: its name.
        tier: None for its own.
        flag: what asks for it.
        instead: the flag that helps; leaving `flag` out by default.
    """
    from uso_engine.config import load_config
    from uso_engine.loading.transformer import resolve
    from uso_engine.weights.files.quantized_file import is_quantized_file

    settings = load_config(config)
    if tier is None:
        return settings
    path = resolve(settings.transformer.checkpoint, "transformer checkpoint", settings)
    if tier not in QUANTIZED_TIERS and is_quantized_file(path):
        help_ = f"give {instead}" if instead else f"leave {flag} out"
        raise ValueError(f"{config}: {path} is quantised and cannot run in {tier}, which {flag} asks for; {help_}")
    precision = type(settings.precision).model_validate({**settings.precision.model_dump(), "tier": tier})
    return settings.model_copy(update={"precision": precision})
