"""What is said where Python leaves out the docstrings that transformers reads, before anything is loaded."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import command_line
import pytest
import torch

from uso_engine import USOEngine, load_config
from uso_engine.conditioning import docstrings
from uso_engine.conditioning.style import load_vision_tower
from uso_engine.conditioning.text_models import load_clip, load_t5
from uso_engine.errors import BackendError
from uso_engine.loading.presence import check_interpreter
from uso_engine.safety.classifier import read_settings

FOUND = "No `Args` or `Parameters` section is found in the docstring of `Seq2SeqModelOutput`."
SAID = (
    "transformers' models cannot be imported without docstrings, which python -OO (or PYTHONOPTIMIZE=2) leaves out "
    f"({FOUND}); run python, or python -O"
)
NOWHERE = Path("nowhere")


@pytest.fixture
def stripped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under -OO: the flag, and what transformers' import raises then."""

    def refuse(name: str) -> None:
        raise ValueError(FOUND)

    monkeypatch.setattr(docstrings, "sys", SimpleNamespace(flags=SimpleNamespace(optimize=2)))
    monkeypatch.setattr(docstrings, "importlib", SimpleNamespace(import_module=refuse))


@pytest.mark.usefixtures("stripped")
@pytest.mark.parametrize(
    "load",
    [
        lambda: USOEngine.from_config("uso-tiny", device="cpu"),
        lambda: load_t5(NOWHERE, torch.float32, "cpu"),
        lambda: load_clip(NOWHERE, torch.float32, "cpu"),
        lambda: load_vision_tower(NOWHERE, device="cpu"),
        lambda: read_settings(NOWHERE),
    ],
    ids=["engine", "T5", "CLIP", "SigLIP", "classifier"],
)
def test_the_sentence_comes_before_anything_else(load: Callable[[], object]) -> None:
    with pytest.raises(BackendError, match=f"^{re.escape(SAID)}$") as caught:
        load()
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.usefixtures("stripped")
@pytest.mark.parametrize("arguments", [["generate", "--prompt", "x", "--device", "cpu"], ["check", "uso-tiny"]], ids=str)
def test_the_shell_says_it_once(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = command_line.run(*arguments)
    assert (code, said.count(SAID), said.count("missing")) == (1, 1, 0), said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("stripped")
def test_what_needs_no_transformers_is_not_refused() -> None:
    parts = {"t5": None, "clip": None, "projector": None, "safety": None}
    check_interpreter(load_config("uso-tiny").model_copy(update=parts))


@pytest.mark.parametrize("optimize", [0, 1, 2])
def test_transformers_that_can_be_imported_are_not_refused(optimize: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that does without docstrings, and every Python that keeps them, whatever the import would say."""
    asked: list[str] = []
    monkeypatch.setattr(docstrings, "sys", SimpleNamespace(flags=SimpleNamespace(optimize=optimize)))
    monkeypatch.setattr(docstrings, "importlib", SimpleNamespace(import_module=asked.append))
    docstrings.require_docstrings()
    assert len(asked) == (1 if optimize == 2 else 0)
