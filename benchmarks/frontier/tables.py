"""Tables of the frontier: every setting, and the points that configurations call by a name."""

from __future__ import annotations

from benchmarks.documents import PENDING, Table, markdown
from benchmarks.records import Record, latest
from uso_engine.config import list_configs, load_config

from .judgement import ASPECTS
from .settings import Setting

HEADER = (
    "setting", "GFLOP of denoising", "of the reference's", "CPU ms", "content", "style", "place", "PSNR to the reference",
    "SSIM", "differ visibly", "PSNR to the flow's end",
)  # fmt: skip


def _interval(value: list[float], scale: float, digits: int, unit: str) -> str:
    mean, low, high = (scale * number for number in value)
    return f"{mean:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def _points(value: list[float]) -> str:
    mean, low, high = (100 * number for number in value)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _cells(row: Record, reference: Record) -> list[str]:
    is_reference = row is reference
    share = row["denoising_gflop"] / reference["denoising_gflop"]
    accuracy = [f"{100 * row[a][0]:.1f} %" if is_reference else _points(row[f"{a}_change"]) for a in ASPECTS]
    distance = [
        "" if is_reference else _interval(row["psnr_db"], 1, 1, " dB"),
        "" if is_reference else f"{row['ssim'][0]:.4f}",
        "" if is_reference else _interval(row["visible"], 100, 0, " %"),
    ]
    work = [row["name"], f"{row['denoising_gflop']:.2f}", f"{100 * share:.0f} %", f"{1000 * row['denoising_s']:.0f}"]
    return [*work, *accuracy, *distance, f"{row['psnr_to_exact_db'][0]:.1f} dB"]


def frontier(records: list[Record]) -> str:
    """Every setting, from the most work to the least; accuracies as changes in points against the reference."""
    blocks = []
    for record in latest(records, "config", by_machine=False):
        rows = record["rows"]
        reference = rows[0]
        ordered = [reference, *sorted(rows[1:], key=lambda row: -row["denoising_gflop"])]
        ends = reference["request_gflop"] - reference["denoising_gflop"]
        blocks.append(
            f"{record['config']}, {record['triplets']} held-out triplets, {record['pictures']} pictures a setting, 95 % "
            f"intervals in brackets. CPU: {record['machine']['cpu']}, processor time of a picture's denoising on one thread, "
            f"eight pictures in a step. Encoding and decoding take {ends:.2f} GFLOP more in every row.\n\n"
            + markdown(HEADER, [_cells(row, reference) for row in ordered])
        )
    return "\n\n".join(blocks) or PENDING


def points(records: list[Record]) -> str:
    """What stands for each name in each configuration that has points, with its measured loss."""
    found = {record["config"]: record["rows"] for record in latest(records, "config", by_machine=False)}
    rows = []
    for config in list_configs():
        for name, point in load_config(config).quality.named.items():
            setting = Setting(point.steps, point.sampler, point.shift, point.cosine, point.text_padding)
            measured = [row for row in found.get(config, ()) if row["name"] == setting.name]
            cells = _cells(measured[0], found[config][0]) if measured else [setting.name, *["not measured"] * (len(HEADER) - 1)]
            rows.append([config, name, *cells])
    return markdown(("configuration", "`quality`", *HEADER), rows)


TABLES = (
    Table("docs/quality.md", "frontier", ("frontier",), frontier),
    Table("docs/quality.md", "points", ("frontier",), points),
)
