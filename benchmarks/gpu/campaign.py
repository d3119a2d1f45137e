"""Run the parts of a campaign one after another, each within its own limit, and write down what became of each at once.

    python -m benchmarks.gpu.campaign {first,second} OUT {full,tiny}

OUT gets NAME.json (state, seconds and results of every part), NAME.log (everything that parts print) and records.jsonl (what
`python -m benchmarks.report --records OUT` takes). A part that fails, hangs or dies stops no other, and the exit status is 1.
While a part runs, the next one's process is imported up to its first use of the device, and waits.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, get_args

from . import summary
from .plan import CAMPAIGNS, Part, Size

ROOT = Path(__file__).resolve().parents[2]
KILLED = "over its time limit, killed"
Report = dict[str, object]


class Running:
    """One process of a part, its output going to the log of the campaign when it is over."""

    def __init__(self, name: str, command: Sequence[str], output: Path, *, waits: bool = False) -> None:
        self.name = name
        self.output = output
        self._file: IO[bytes] = output.open("wb")
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE if waits else subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        )

    def go(self) -> None:
        """Let a process that waits begin; one that died meanwhile says so when it is waited for."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(b"go\n")
            self._process.stdin.close()

    def wait(self, until: float, is_interrupted: Callable[[], bool]) -> str:
        """Wait, and end it with everything it started when its time is over.

        Returns:
            "ok", or what happened instead.
        """
        while (code := self._poll()) is None:
            if is_interrupted() or time.monotonic() > until:
                # Python's fault handler answers this signal with what every thread is doing.
                self._process.send_signal(signal.SIGABRT)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(2)
                self.end()
                return "ended from outside" if is_interrupted() else KILLED
        self.end()
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return "ok" if code == 0 else f"exit status {code}"

    def _poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(0.2)
        return None

    def end(self) -> None:
        """Kill what is left of its process group."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._file.close()


class Campaign:
    """The parts that have run, and where their reports go.

    Args:
        name: "first" or "second".
        out: the folder.
        size: of the workloads.
        parts: what to run; by default the campaign's own.
    """

    def __init__(self, name: str, out: Path, size: Size, parts: Sequence[Part] | None = None) -> None:
        self.parts = tuple(CAMPAIGNS[name](size) if parts is None else parts)
        self.out, self.size, self.name = out.resolve(), size, name
        self._begin = time.monotonic()
        self._interrupted = False
        self.report: dict[str, Report] = {part.name: {"state": "not run"} for part in self.parts}
        self.out.mkdir(parents=True, exist_ok=True)
        self._scratch = Path(tempfile.mkdtemp(prefix="uso-gpu-"))
        self._log = self.out / f"{name}.log"
        self._log.write_bytes(b"")

    def run(self) -> bool:
        """Run every part.

        Returns:
            Whether all of them did what they should.
        """
        waiting: list[Running] = []
        try:
            for index, part in enumerate(self.parts):
                if self._interrupted:
                    break
                begin = time.monotonic()
                running, waiting = waiting or self._start(part), []
                waiting = self._start_next(index)
                if not part.commands:
                    running[0].go()
                until = begin + part.limit_s
                states = {process.name: process.wait(until, lambda: self._interrupted) for process in running}
                self._finish(part, running, states, time.monotonic() - begin)
        finally:
            for process in waiting:
                process.end()
            shutil.rmtree(self._scratch)
        return all(report["state"] == "ok" for report in self.report.values())

    def interrupt(self) -> None:
        """End the part that runs and start no other; what was found so far is written down."""
        self._interrupted = True

    def _start(self, part: Part) -> list[Running]:
        if part.commands:
            return [Running(name, command, self._output(name)) for name, command in part.commands]
        module = [sys.executable, "-m", "benchmarks.gpu.bench", *self._arguments(part)]
        return [Running(part.name, module, self._output(part.name), waits=True)]

    def _arguments(self, part: Part) -> list[str]:
        module = part.module or f"benchmarks.gpu.{part.name}"
        return [module, str(self.out), self.size, str(self._result(part))]

    def _start_next(self, index: int) -> list[Running]:
        following = self.parts[index + 1 : index + 2]
        return self._start(following[0]) if following and not following[0].commands else []

    def _output(self, name: str) -> Path:
        return self._scratch / f"{name.replace(' ', '_')}.txt"

    def _result(self, part: Part) -> Path:
        return self._scratch / f"{part.name}.json"

    def _finish(self, part: Part, running: Sequence[Running], states: dict[str, str], seconds: float) -> None:
        wrong = {name: state for name, state in states.items() if state != "ok"}
        report: Report = {"state": "ok" if not wrong else "; ".join(f"{name}: {state}" for name, state in wrong.items())}
        report["seconds"], report["limit_s"] = round(seconds, 1), part.limit_s
        texts = {process.name: process.output.read_text(errors="replace") for process in running}
        if part.commands:
            tell = {name: summary.last_lines if states[name] == KILLED else summary.telling_lines for name in texts}
            report["output"] = {name: tell[name](text) for name, text in texts.items()}
        elif wrong:
            report["output"] = {name: summary.last_lines(text) for name, text in texts.items()}
        result = self._result(part)
        if result.exists():
            report["results"] = json.loads(result.read_text())
        self.report[part.name] = report
        with self._log.open("a") as log:
            for name, text in texts.items():
                log.write(f"==== {part.name}: {name}: {states[name]} ({seconds:.1f} s)\n{text}\n")
        self._write()
        print(f"{part.name:14s} {seconds:6.1f} s of {part.limit_s:g}  {report['state']}", flush=True)

    def _write(self) -> None:
        target = self.out / f"{self.name}.json"
        partial = target.with_suffix(".partial")
        seconds = round(time.monotonic() - self._begin, 1)
        content = {"campaign": self.name, "size": self.size, "seconds": seconds, "parts": self.report}
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("out", type=Path)
    parser.add_argument("size", choices=get_args(Size), nargs="?", default="full")
    options = parser.parse_args()
    campaign = Campaign(options.campaign, options.out, options.size)
    signal.signal(signal.SIGTERM, lambda *_: campaign.interrupt())
    all_well = campaign.run()
    print(summary.campaign_text(campaign.name, campaign.report))
    sys.exit(0 if all_well else 1)


if __name__ == "__main__":
    main()
