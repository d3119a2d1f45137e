"""Tables of the Pythons and extras that `deploy/check_release.sh` tried, and of the packages that extras bring."""

from __future__ import annotations

import json

from benchmarks.documents import Table, markdown
from benchmarks.records import Record, latest

from .sbom import PATH


def release(records: list[Record]) -> str:
    """Packages that are there with every Python and extra, and whether the picture is the same."""
    found = latest(records, "python", "extra", by_machine=False)
    extras = list(dict.fromkeys(r["extra"] for r in found))
    pictures = {r["pixels"] for r in found}
    rows = []
    for python in dict.fromkeys(r["python"] for r in found):
        own = {r["extra"]: r for r in found if r["python"] == python}
        rows.append([python, *(f"{own[extra]['packages']}" if extra in own else "" for extra in extras)])
    if not rows:
        return markdown([], [])
    last = found[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    same = "Every picture has the same bits." if len(pictures) == 1 else f"There are {len(pictures)} different pictures."
    commit, taken = last["machine"]["commit"], last["machine"]["taken"][:10]
    note = f"\n\nPackages in the environment. {same} `deploy/check_release.sh OUT`; {versions}; commit {commit}, {taken}."
    return markdown(["Python", *(f"[{extra}]" if extra != "none" else "no extra" for extra in extras)], rows) + note


def licences(records: list[Record]) -> str:
    """Every package of docs/sbom.cdx.json."""
    rows = []
    for entry in json.loads(PATH.read_text(encoding="utf-8"))["components"]:
        extras = [item["value"] for item in entry["properties"]]
        brought = "always" if "uso-engine" in extras else ", ".join(f"[{extra}]" for extra in extras)
        stated = entry["licenses"][0]["license"]["name"] if "licenses" in entry else "not installed here"
        rows.append([entry["name"], entry.get("version", ""), stated.replace("|", "/"), brought])
    return markdown(["package", "version", "licence, as its metadata states it", "comes with"], rows)


TABLES = (
    Table("docs/licences.md", "release", ("release",), release),
    Table("docs/licences.md", "licences", (), licences),
)
