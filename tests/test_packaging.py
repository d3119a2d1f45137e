"""What the wheel and the source distribution hold, and that the installed wheel works by itself."""

import os
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest

import uso_engine

EXTRAS = {"gpu", "cpu", "export", "gguf", "heif", "otel", "quant", "ray", "s3", "serve", "bench", "test"}


def build(repository: Path, target: str, folder: Path) -> Path:
    """Build with the hatchling that is installed, so that nothing is downloaded."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    subprocess.run(command, cwd=repository, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    (built,) = folder.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(repository, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def tracked(repository: Path, *folders: str) -> set[str]:
    """The files under these folders that git knows: what a clone holds, whatever else lies about."""
    command = ["git", "ls-files", "-z", "--", *folders]
    listing = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip(f"not a git checkout: {listing.stderr.strip()}")
    return {name for name in listing.stdout.split("\0") if name and (repository / name).exists()}


def test_wheel_holds_the_packages_with_all_their_data(repository: Path, members: set[str]) -> None:
    expected = tracked(repository, "uso_engine")  # the code, py.typed, and uso_engine/embedded with weights and tokenizers
    expected |= {name.removeprefix("kernels/") for name in tracked(repository, "kernels")}
    expected |= {f"uso_engine/{name}" for name in tracked(repository, "configs")}
    assert {"uso_engine/__init__.py", "uso_engine/py.typed", "uso_kernels/__init__.py", "uso_kernels/py.typed"} <= expected
    assert expected - members == set()


def test_wheel_holds_the_demonstration_model(members: set[str]) -> None:
    assert "uso_engine/configs/uso-tiny.toml" in members
    assert any(name.startswith("uso_engine/embedded/uso-tiny/") for name in members)


def test_wheel_holds_nothing_else(members: set[str]) -> None:
    tops = {PurePosixPath(name).parts[0] for name in members}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"uso_engine", "uso_kernels"}
    assert not [name for name in members if "__pycache__" in name or name.endswith((".pyc", ".orig", ".lock"))]
    assert not [name for name in members if PurePosixPath(name).name.startswith(("test_", "conftest"))]


def test_wheel_holds_the_licence(repository: Path, wheel: Path, members: set[str], metadata: Message) -> None:
    (name,) = (name for name in members if name.endswith(".dist-info/licenses/LICENSE"))
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(name) == (repository / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"


def test_metadata_names_package_python_and_extras(repository: Path, wheel: Path, metadata: Message) -> None:
    assert metadata["Name"] == "uso-engine"
    assert metadata.get_payload() == (repository / "README.md").read_text()
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS
    required = metadata.get_all("Requires-Dist", [])
    assert not [line for line in required if line.startswith("torchvision")]
    # The two ONNX runtimes overwrite each other's files, so no extra may bring both, and the core neither.
    for line in required:
        if line.startswith("onnxruntime"):
            assert ("extra == 'gpu'" in line) == line.startswith("onnxruntime-gpu")
            assert ("extra == 'cpu'" in line) == (not line.startswith("onnxruntime-gpu"))
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        assert "uso-engine = uso_engine.cli:main" in archive.read(name).decode()


def test_wheel_works_alone_and_without_triton(wheel: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere, both packages and every public kernel module import where Triton cannot be."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = """
import importlib, pkgutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
sys.modules["triton"] = None  # from here on, importing it is an ImportError
import uso_engine, uso_kernels
for package in (uso_engine, uso_kernels):
    assert Path(package.__file__).is_relative_to(sys.argv[1]), package.__file__
for module in pkgutil.walk_packages(uso_kernels.__path__, "uso_kernels."):
    if not module.name.rpartition(".")[2].startswith("_"):
        importlib.import_module(module.name)
        print(module.name)
"""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "TRITON_INTERPRET"}}
    command = [sys.executable, "-c", script, str(tmp_path)]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "uso_kernels.attention" in answer.stdout.split()


def test_source_distribution_builds_the_same_wheel(repository: Path, members: set[str], tmp_path: Path) -> None:
    archive = build(repository, "sdist", tmp_path / "sdist")
    command = [sys.executable, "-m", "tarfile", "--extract", str(archive), str(tmp_path / "source")]
    subprocess.run(command, capture_output=True, check=True)
    (source,) = (tmp_path / "source").iterdir()
    rebuilt = build(source, "wheel", tmp_path / "rebuilt")
    with zipfile.ZipFile(rebuilt) as again:
        assert set(again.namelist()) == members


def test_constraints_pin_what_the_package_asks_for(repository: Path) -> None:
    """Every direct requirement has one exact, public version: no local label such as +cpu, which no registry has."""
    from packaging.requirements import Requirement

    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    lines = (repository / "constraints.txt").read_text().splitlines()
    pins = {pin.name.lower().replace("_", "-"): pin for pin in map(Requirement, (x for x in lines if x and x[0] != "#"))}
    for pin in pins.values():
        assert [specifier.operator for specifier in pin.specifier] == ["=="], str(pin)
        assert "+" not in str(pin) and "@" not in str(pin), str(pin)
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(line) for group in groups for line in group):
        if requirement.name == "uso-engine":
            continue
        assert requirement.name.lower().replace("_", "-") in pins, f"{requirement} is not pinned"
        (specifier,) = pins[requirement.name.lower().replace("_", "-")].specifier
        assert requirement.specifier.contains(specifier.version), f"{requirement} against {specifier}"


def test_a_checkout_knows_its_version_without_being_installed(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert uso_engine.__version__ == project["version"]
    asking = [path for path in (repository / "uso_engine").rglob("*.py") if 'version("uso-engine")' in path.read_text()]
    assert asking == []
