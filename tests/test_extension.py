"""Optional packages that are absent, or were built for another machine: a reason in `info`, never a crash."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from uso_kernels.attention.xformers import _failure, xformers_attention_missing
from uso_kernels.extension import extension_failure

CUDA = torch.device("cuda")
# What a package built for another CUDA, another torch and another Python said on real machines.
FAULTS = {
    "OSError": "OSError('libcudart.so.12: cannot open shared object file: No such file or directory')",
    "RuntimeError": "RuntimeError('Tried to register an operator twice')",
    "ImportError": "ImportError('undefined symbol: _ZN3c104cuda')",
    "AttributeError": "AttributeError(\"module 'torch' has no attribute 'intX'\")",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages that comes before those installed."""
    known = set(sys.modules)
    for name in [name for name in sys.modules if name.partition(".")[0] in {"xformers", "brokenlib"}]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    _failure.cache_clear()
    yield tmp_path
    _failure.cache_clear()
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in {"xformers", "brokenlib"}:
            del sys.modules[name]


def write_package(site: Path, modules: dict[str, str]) -> None:
    for name, text in modules.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_package_that_does_not_load_has_a_reason(site: Path, fault: str) -> None:
    write_package(site, {"brokenlib/__init__.py": f"raise {FAULTS[fault]}"})
    reason = extension_failure("brokenlib")
    assert reason is not None
    assert reason.startswith("brokenlib cannot be loaded: ")
    assert len(reason.splitlines()) == 1


def test_a_package_that_is_not_there() -> None:
    assert extension_failure("no_such_package.part") == "no_such_package is not installed"
    assert extension_failure("json.decoder") is None


@pytest.mark.parametrize("fault", list(FAULTS))
def test_xformers_that_fails_is_a_reason(site: Path, fault: str) -> None:
    write_package(site, {"xformers/__init__.py": "", "xformers/ops.py": f"raise {FAULTS[fault]}"})
    reason = xformers_attention_missing(CUDA)
    assert reason is not None and "xformers cannot be loaded" in reason


def test_xformers_without_its_kernels_is_a_reason(site: Path) -> None:
    """0.0.35 beside CUDA 13 imports with a warning and keeps the exception."""
    kept = "_cpp_library_load_exception = RuntimeError('built for CUDA 1208\\nreinstall')"
    write_package(site, {"xformers/__init__.py": "", "xformers/_cpp_lib.py": kept, "xformers/ops.py": ""})
    assert xformers_attention_missing(CUDA) == "xformers cannot load its kernels: built for CUDA 1208 reinstall"
    _failure.cache_clear()
    sys.modules["xformers._cpp_lib"]._cpp_library_load_exception = None  # type: ignore[attr-defined]
    assert xformers_attention_missing(CUDA) is None


def test_xformers_that_is_not_there(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert xformers_attention_missing(CUDA) == "xformers is not installed"


PROGRAM = """
import sys, torch
from uso_kernels.attention import BackendUnavailable, attention, available_backends
from uso_kernels.ragged import Ragged
x, layout = torch.randn(16, 1, 64), Ragged.pack([16])
assert torch.isfinite(attention(x, x, x, layout, layout)).all()
assert "triton cannot be loaded: libcuda.so.1: broken" in available_backends("cpu")["triton"]
try:
    attention(x, x, x, layout, layout, backend="triton")
except BackendUnavailable as error:
    assert "libcuda.so.1: broken" in str(error)
from uso_engine.errors import BackendError
from uso_engine.precision.quanto_values import int8_values
try:
    int8_values(torch.ones(2, 16))
except BackendError as error:
    assert "optimum cannot be loaded: libcudart.so.12 (pip" in str(error)
from uso_engine.cli import main
sys.argv = ["uso-engine", "info"]
main()
"""


def test_info_prints_the_reason_and_everything_else_runs(repository: Path, tmp_path: Path) -> None:
    """A Triton, an xFormers and an ONNX Runtime that cannot be loaded, each with the metadata of an installed package."""
    write_package(
        tmp_path,
        {
            "triton/__init__.py": "raise OSError('libcuda.so.1: broken')",
            "xformers/__init__.py": "",
            "xformers/ops.py": "raise RuntimeError('no operator')",
            "xformers-0.0.35.dist-info/METADATA": "Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\n",
            "optimum/__init__.py": "",
            "optimum/quanto/__init__.py": "raise OSError('libcudart.so.12')",
            "onnxruntime/__init__.py": "raise ImportError('libcublas.so.12')",
        },
    )
    paths = f"{tmp_path}:{repository}:{repository / 'kernels'}"
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
    environment.pop("TRITON_INTERPRET", None)
    answer = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "0.0.35, but xformers cannot be loaded: no operator" in answer.stdout
    assert "but triton cannot be loaded: libcuda.so.1: broken" in answer.stdout
    assert "but onnxruntime cannot be loaded: libcublas.so.12" in answer.stdout
    assert "PyTorch references (triton cannot be loaded: libcuda.so.1: broken)" in answer.stdout
