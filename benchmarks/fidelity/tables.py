"""Tables of the differences from the authors' code, of the embedded model's quality and of its training."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from benchmarks.documents import Table, markdown
from benchmarks.records import Record, latest
from uso_engine.evaluation.report_table import report_table

QUALITY = Path(__file__).resolve().parents[2] / "docs" / "quality"
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


def differences(records: list[Record]) -> str:
    """What each deliberate difference from the authors' code does to the answer."""
    found = latest(records, "difference", "compared", "on", by_machine=False)
    places = list(dict.fromkeys(r["on"] for r in found))
    cells = {(r["difference"], r["compared"], r["on"]): f"{r['relative_error']:.1e}" for r in found}
    cases = dict.fromkeys((r["difference"], r["compared"]) for r in found)
    rows = [[*case, *(cells.get((*case, place), "") for place in places)] for case in cases]
    return markdown(["difference", "compared", *(f"relative error on {place}" for place in places)], rows)


def quality(records: list[Record]) -> str:
    """What `uso-engine evaluate … --output docs/quality` wrote."""
    return report_table(json.loads((QUALITY / "report.json").read_text(encoding="utf-8")))


def training(records: list[Record]) -> str:
    """Steps, minutes and result of every stage, from its log."""
    rows = []
    for stage, words in STAGES.items():
        path = QUALITY / "training" / f"{stage.replace(' ', '_')}.jsonl"
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        values = {key: entry[key] for entry in entries for key in entry}
        values |= {key: statistics.mean([e[key] for e in entries if key in e][-10:]) for key in AVERAGED if key in values}
        result = words.format(**values).replace("%", " %")
        rows.append([stage, f"{entries[-1]['step']:,}", f"{entries[-1]['seconds'] / 60:.0f}", result])
    return markdown(["stage", "steps", "minutes", "result"], rows)


TABLES = (
    Table("docs/faithfulness.md", "faithfulness", ("faithfulness",), differences),
    Table("docs/quality.md", "quality", (), quality),
    Table("docs/quality.md", "training", (), training),
)
