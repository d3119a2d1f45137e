"""``uso-engine quantize``: a configuration's transformer in fewer bits, as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import errors, fail, reports_errors, say
from .outputs import make_folder
from .progress import LoadingProgress
from .tiers import QuantizedTierChoice, chosen_tier


@reports_errors
def quantize(
    config: Annotated[str, typer.Argument(help="A name, or a path to a TOML file.")],
    tier: Annotated[QuantizedTierChoice, typer.Option(help="Precision of the weights.")],
    out: Annotated[Path, typer.Option(help="Folder that the file goes to; made if it is not there.")],
) -> None:
    """Merge a configuration's LoRAs, quantise its transformer one layer at a time, and write it to one file."""
    from uso_engine.config import config_folder, list_configs, load_config

    toml = config_folder() / f"{config}.toml" if config in list_configs() else Path(config)

    settings = load_config(config)
    with LoadingProgress(errors) as progress:
        from uso_engine.loading.presence import QUANTIZED_FROM, require_parts
        from uso_engine.loading.transformer import save_quantized_transformer

        require_parts(settings, only=QUANTIZED_FROM)
        make_folder(out)
        path = out / f"{settings.name}-{tier}.safetensors"
        if path.exists():
            raise fail(f"{path} is there already; remove it, or name another folder")
        save_quantized_transformer(settings, chosen_tier(tier), path, progress=progress)
    say(f"{path}  {path.stat().st_size / 1e9:.3f} GB")
    say(
        f'To use it, write checkpoint = "{path.resolve()}" under [transformer] and tier = "{tier}" under [precision] '
        f"of a copy of {toml}, and give that copy as --config."
    )
