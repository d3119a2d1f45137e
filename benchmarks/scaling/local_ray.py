"""What the server on a real local Ray was seen to do: runs its tests, which are marked slow, and keeps what each says.

python -m benchmarks.scaling.local_ray
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.arguments import BenchmarkParser
from benchmarks.measure import write_record

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/test_serving_ray.py"


def observations(report: Path) -> list[tuple[str, str, float]]:
    """From pytest's report: what was done, what was seen, seconds.

    Raises:
        SystemExit: a test failed or was left out.
    """
    found = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = case.get("name", "").removeprefix("test_").replace("_", " ")
        wrong = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        if wrong:
            raise SystemExit(f"{name}: {wrong[0]}; nothing is recorded")
        said = [item.get("value", "") for item in case.iter("property") if item.get("name") == "found"]
        found.append((name, "; ".join(said), float(case.get("time", 0))))
    if not found:
        raise SystemExit(f"no test ran: expected those of {TESTS}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = BenchmarkParser(__doc__, "out").read(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "slow",
            TESTS,
            f"--junitxml={report}",
            "-o",
            "junit_family=xunit1",
        ]
        ran = subprocess.run(command, cwd=ROOT, check=False)
        if not report.exists():
            raise SystemExit(f"pytest ended with {ran.returncode} and without its report")
        seen = observations(report)
        if ran.returncode:
            raise SystemExit(f"pytest ended with {ran.returncode} before all tests had run; nothing is recorded")
        for check, found, seconds in seen:
            record = {"check": check, "found": found, "wall_s": seconds, "ray": version("ray"), "config": "uso-tiny"}
            write_record("scaling_local_ray", {"device": "cpu", "replicas": "1 to 2 replicas", **record}, options.out)
            print(f"{check}: {found} ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
