"""The table of an evaluation's report, made from the plain data that is written to report.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ASPECTS = ("content", "style", "prompt")
REFERENCES = {"the true drawings": "true_drawings", "chance": "chance"}
"""Name of a row -> the report's entry that it shows."""


def report_table(report: Mapping[str, Any]) -> str:
    """A Markdown table of `Report.to_json()`, and a line for the autoencoder where it was measured."""
    lines = ["| run | tier | steps | content | style | prompt | PSNR to the first row |", "|---|---|---|---|---|---|---|"]
    for row in report["rows"]:
        psnr = "" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
        lines.append(f"| {row['name']} | {row['tier']} | {row['steps']} | {_shares(row)} | {psnr} |")
    lines += [f"| {name} | | | {_shares(report[key])} | |" for name, key in REFERENCES.items()]
    if report["autoencoder_psnr_db"]:
        values = ", ".join(f"{value:.1f} dB on {name} drawings" for name, value in report["autoencoder_psnr_db"].items())
        lines += ["", f"Autoencoder, encoding and decoding: {values}."]
    return "\n".join(lines)


def _shares(row: Mapping[str, Any]) -> str:
    return " | ".join(f"{100 * row[aspect]:.0f} %" for aspect in ASPECTS)
