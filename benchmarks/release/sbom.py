"""What the package and each of its extras bring along, with versions and licences, from the metadata of what is installed.

    python -m benchmarks.release.sbom       writes docs/sbom.cdx.json (CycloneDX 1.6); `python -m benchmarks.report` its table

Run it where every extra but `gpu` is installed (`make test` makes such an environment). Packages that are declared and not
installed are listed without version and licence.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "docs" / "sbom.cdx.json"
CORE = "uso-engine"
DEVELOPMENT = ("test", "bench")
"""Extras that only work on the repository needs."""
UNKNOWN = "not stated in its metadata"


@dataclass
class Package:
    """A package that something brings.

    Args:
        name: canonical.
        extras: which bring it; `CORE` for the package itself.
        found: its metadata; None where it is not installed.
        needs: canonical names of what it needs in turn.
    """

    name: str
    extras: set[str]
    found: Distribution | None
    needs: set[str]


def declared() -> dict[str, list[Requirement]]:
    """Requirements of the package and of every extra that a user may install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {CORE: project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in lists.items() if name not in DEVELOPMENT}


def packages() -> dict[str, Package]:
    """Everything that the package and its extras bring, by canonical name in order."""
    known: dict[str, Package] = {}
    for extra, requirements in declared().items():
        for requirement in requirements:
            _add(known, requirement, extra)
    return {name: known[name] for name in sorted(known)}


def _add(known: dict[str, Package], requirement: Requirement, extra: str) -> None:
    """Add a package and what it needs in turn, once for every extra that brings it."""
    name = canonicalize_name(requirement.name)
    package = known.get(name)
    if package is None:
        try:
            package = Package(name, set(), distribution(name), set())
        except PackageNotFoundError:
            package = Package(name, set(), None, set())
        known[name] = package
    if extra in package.extras or (package.extras and CORE in package.extras):
        return
    package.extras.add(extra)
    for needed in _needed(package.found, requirement.extras):
        package.needs.add(canonicalize_name(needed.name))
        _add(known, needed, extra)


def _needed(found: Distribution | None, extras: set[str]) -> Iterator[Requirement]:
    """What an installed package requires here, with some of its extras."""
    for line in (found.requires or ()) if found is not None else ():
        requirement = Requirement(line)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def licence_of(found: Distribution) -> str:
    """A package's licence, as its metadata states it: an expression, else its classifiers, else the field's first line."""
    metadata = found.metadata
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    classifiers = metadata.get_all("Classifier") or []
    named = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License :: ")]
    stated = [name for name in named if name != "OSI Approved"]
    if stated:
        return " / ".join(stated)
    text = [metadata["License"]] if "License" in metadata else []
    lines = [line.strip() for line in "".join(text).splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[0])[:60] if lines else UNKNOWN


def component(package: Package) -> dict[str, object]:
    """A package as CycloneDX describes it."""
    entry: dict[str, object] = {"type": "library", "bom-ref": package.name, "name": package.name}
    if package.found is not None:
        version = package.found.version.partition("+")[0]
        licence = {"license": {"name": licence_of(package.found)}}
        entry |= {"version": version, "purl": f"pkg:pypi/{package.name}@{version}", "licenses": [licence]}
    return {**entry, "properties": [{"name": "extra", "value": extra} for extra in sorted(package.extras)]}


def document() -> dict[str, object]:
    """The whole bill of materials."""
    found = packages()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = {"type": "application", "bom-ref": CORE, "name": CORE, "version": project["version"]}
    graph = [{"ref": package.name, "dependsOn": sorted(package.needs)} for package in found.values()]
    direct = sorted({canonicalize_name(entry.name) for entry in declared()[CORE]})
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {**own, "licenses": [{"license": {"id": project["license"]}}]}},
        "components": [component(package) for package in found.values()],
        "dependencies": [{"ref": CORE, "dependsOn": direct}, *graph],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=PATH, help="by default docs/sbom.cdx.json")
    options = parser.parse_args(arguments)
    options.out.write_text(json.dumps(document(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
