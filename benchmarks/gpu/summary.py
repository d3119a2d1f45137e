"""A campaign's results in few characters: the last 10,000 of an output are what can be counted on."""

from __future__ import annotations

import re
from collections.abc import Mapping

LENGTH = 9500
"""Characters of a whole summary."""
PART_LENGTH = 2400
"""Characters of one part's, before any is shortened further."""
LINE_LENGTH = 160
"""Characters of a result that stays on one line."""
_TELLING = re.compile(r"FAIL|ERROR|Error|passed|failed|error:|compared|collected|no tests|Killed|out of memory")
_TIMING = {"median_ms", "p20_ms", "p80_ms"}


def last_lines(text: str, count: int = 12) -> str:
    """The end of an output, where a traceback says what was wrong; where a killed process was, its innermost call first."""
    # The profiler's library writes where it starts and stops.
    lines = [line[:300] for line in text.splitlines() if line.strip() and not line.startswith("USDT:")]
    where = next((index for index, line in enumerate(lines) if line.startswith("Current thread")), None)
    return "\n".join(lines[-count:] if where is None else lines[where : where + count])


def telling_lines(text: str, count: int = 14) -> str:
    """The lines of a checking command that say what passed and what did not; its last lines where there are none."""
    lines = [line[:200] for line in text.splitlines() if _TELLING.search(line)]
    return "\n".join(lines[-count:]) if lines else last_lines(text, 4)


def number(value: float) -> str:
    """Four digits that count."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def compact(value: object) -> str:
    """A result in one line: a timing as median and range, a mapping as its entries."""
    if isinstance(value, Mapping):
        if set(value) == _TIMING:
            return f"{number(value['median_ms'])} ({number(value['p20_ms'])} to {number(value['p80_ms'])})"
        return "{" + ", ".join(f"{name}: {compact(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(compact(entry) for entry in value) + "]"
    return number(value) if isinstance(value, float) else str(value)


def part_text(name: str, report: Mapping[str, object]) -> str:
    """One part: its state, its results, one line for each entry of the first level, and what it printed where that tells."""
    lines = [f"== {name}: {report['state']}, {report.get('seconds', 0)} s"]
    results = report.get("results")
    for key, value in results.items() if isinstance(results, Mapping) else ():
        line = f"{key}: {compact(value)}"
        if isinstance(value, Mapping) and len(line) > LINE_LENGTH:
            lines += [f"{key}:", *(f"  {entry}: {compact(inner)}" for entry, inner in value.items())]
        else:
            lines.append(line)
    output = report.get("output")
    for command, text in output.items() if isinstance(output, Mapping) else ():
        lines += [f"-- {command}", str(text)]
    return "\n".join(lines)


def shortened(text: str, length: int) -> str:
    """A text whose middle is left out where it is longer."""
    if len(text) <= length:
        return text
    half = max(0, (length - 40) // 2)
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[len(text) - half :]}"


def campaign_text(name: str, reports: Mapping[str, Mapping[str, object]]) -> str:
    """Every part's results, then one line that says which parts failed."""
    texts = [shortened(part_text(part, report), PART_LENGTH) for part, report in reports.items()]
    longest = PART_LENGTH
    while sum(map(len, texts)) + len(texts) > LENGTH - 300 and longest > 200:
        longest -= 100
        texts = [shortened(text, longest) for text in texts]
    wrong = [part for part, report in reports.items() if report["state"] != "ok"]
    verdict = "every part ran" if not wrong else f"FAILED: {', '.join(wrong)}"
    return "\n".join([*texts, f"== {name}: {verdict}"])
