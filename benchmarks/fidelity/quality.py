"""The tables of docs/quality.md: the report that `uso-engine evaluate` wrote, and the logs of the training that it judges."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from benchmarks.measure import RESULTS

QUALITY = RESULTS.parents[1] / "docs" / "quality"
STAGES = {
    "style tower": "style {accuracy-20:.1%} of 512 held-out drawings, from the level nearest to the pixels alone",
    "classifiers": "object {kind:.1%}, place {place:.1%}, style {style:.1%} of 512 held-out drawings",
    "autoencoder": "{held_out_psnr_db:.1f} dB on 64 held-out drawings",
    "transformer": "loss {loss:.3f}",
    "guidance": "loss {loss:.3f}",
}
"""Stage -> what its table row says of the last values in its log."""
AVERAGED = ("loss",)
"""Values that are noisy: the mean of the last ten counts."""


def quality_table(folder: Path = QUALITY) -> str:
    """What `uso-engine evaluate … --output` wrote."""
    return (folder / "report.md").read_text(encoding="utf-8").strip()


def training_table(folder: Path = QUALITY) -> str:
    """Steps, minutes and result of every logged stage."""
    lines = ["| stage | steps | minutes | result |", "| --- | --- | --- | --- |"]
    for stage, words in STAGES.items():
        path = folder / "training" / f"{stage.replace(' ', '_')}.jsonl"
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        values = {key: entry[key] for entry in entries for key in entry}
        values |= {key: statistics.mean([e[key] for e in entries if key in e][-10:]) for key in AVERAGED if key in values}
        result = words.format(**values).replace("%", " %")
        lines.append(f"| {stage} | {entries[-1]['step']:,} | {entries[-1]['seconds'] / 60:.0f} | {result} |")
    return "\n".join(lines)
