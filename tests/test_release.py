"""The bill of materials lists what is declared, with what installed packages say of themselves."""

import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from benchmarks.release import tables
from benchmarks.release.sbom import CORE, PATH, UNKNOWN, declared, document, licence_of, main
from benchmarks.report import ROOT


@pytest.fixture(scope="module")
def listed() -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in json.loads(PATH.read_text())["components"]}


def extras_of(entry: dict[str, Any]) -> set[str]:
    return {item["value"] for item in entry["properties"]}


def test_everything_that_is_declared_is_listed_with_what_brings_it(listed: dict[str, dict[str, Any]]) -> None:
    for extra, requirements in declared().items():
        for requirement in requirements:
            entry = listed[canonicalize_name(requirement.name)]
            assert {extra, CORE} & extras_of(entry), f"{requirement} of {extra}: run python -m benchmarks.release.sbom"
            if "version" in entry:
                assert requirement.specifier.contains(entry["version"])


def test_nothing_is_listed_that_nothing_brings(listed: dict[str, dict[str, Any]]) -> None:
    graph = {entry["ref"]: entry["dependsOn"] for entry in json.loads(PATH.read_text())["dependencies"]}
    direct = {canonicalize_name(requirement.name) for requirements in declared().values() for requirement in requirements}
    assert set(graph) - {CORE} == set(listed)
    assert set(listed) == direct | {name for needs in graph.values() for name in needs}


def test_only_what_needs_a_gpu_lacks_a_version_and_a_licence(listed: dict[str, dict[str, Any]]) -> None:
    without = {name for name, entry in listed.items() if "version" not in entry}
    assert all(extras_of(listed[name]) == {"gpu"} for name in without)
    licences = {entry["licenses"][0]["license"]["name"] for entry in listed.values() if "licenses" in entry}
    assert UNKNOWN not in licences


def test_versions_are_those_that_the_suite_is_run_with(listed: dict[str, dict[str, Any]]) -> None:
    pinned = pins("constraints.txt")
    differing = {
        name: (entry["version"], pinned[name])
        for name, entry in listed.items()
        if "version" in entry and entry["version"] != pinned.get(name, entry["version"])
    }
    assert differing == {}, "constraints.txt changed: run python -m benchmarks.release.sbom and python -m benchmarks.report"


def test_the_command_writes_what_is_installed_here(tmp_path: Path) -> None:
    main(["--out", str(tmp_path / "sbom.json")])
    written = json.loads((tmp_path / "sbom.json").read_text())
    assert written == json.loads(json.dumps(document()))
    torch = next(entry for entry in written["components"] if entry["name"] == "torch")
    assert torch["version"] == distribution("torch").version.partition("+")[0]
    assert extras_of(torch) == {CORE}
    assert torch["purl"] == f"pkg:pypi/torch@{torch['version']}"


def pins(name: str) -> dict[str, str]:
    """Versions of a file of constraints by canonical name."""
    lines = [line.partition("==") for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(package): version for package, equals, version in lines if equals}


def test_the_lowest_versions_are_those_that_are_declared() -> None:
    lowest = pins("constraints-lowest.txt")
    for extra, requirements in declared().items():
        for requirement in requirements if extra != "gpu" else ():
            version = lowest[canonicalize_name(requirement.name)]
            bound = next(entry.version for entry in requirement.specifier if entry.operator == ">=")
            assert requirement.specifier.contains(version)
            # A bound of 5 stands for the first 5.x that there is.
            assert version.startswith(bound), f"{requirement}: constraints-lowest.txt has {version}"


def test_the_oldest_torch_s_environment_has_what_the_suite_needs() -> None:
    oldest, newest = pins("constraints-torch-2.11.txt"), pins("constraints.txt")
    only_for_gpus = {"onnxruntime-gpu", "xformers"}
    assert set(newest) - set(oldest) == only_for_gpus
    assert set(oldest) <= set(newest)


class _Stated:
    """A distribution's metadata."""

    def __init__(self, **fields: Any) -> None:
        self._fields = {name.replace("_", "-"): value for name, value in fields.items()}
        self.metadata = self

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]

    def get_all(self, name: str) -> Any:
        return self._fields.get(name)


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ({"License_Expression": "MIT", "License": "other"}, "MIT"),
        ({"Classifier": ["License :: OSI Approved :: BSD License", "Topic :: Text"], "License": "x"}, "BSD License"),
        ({"Classifier": ["License :: OSI Approved"], "License": "\n Apache 2.0\n long text"}, "Apache 2.0"),
        ({}, UNKNOWN),
    ],
)
def test_a_licence_is_what_the_metadata_states_most_exactly(fields: dict[str, Any], licence: str) -> None:
    assert licence_of(_Stated(**fields)) == licence  # type: ignore[arg-type]


def test_the_release_table_says_whether_every_picture_is_the_same() -> None:
    def line(python: str, extra: str, pixels: str) -> dict[str, Any]:
        machine = {"cpu": "some CPU", "commit": "abc", "taken": "2026-11-27 00:00:00"}
        found = {"benchmark": "release", "python": python, "extra": extra, "pixels": pixels, "packages": 50}
        return {**found, "versions": {"torch": "2.13.0"}, "machine": machine}

    same = tables.release([line("3.11.7", "none", "a"), line("3.12.1", "s3", "a")])
    assert "| 3.12.1 |  | 50 |" in same and "Every picture has the same bits." in same
    assert "2 different pictures" in tables.release([line("3.11.7", "none", "a"), line("3.12.1", "none", "b")])
