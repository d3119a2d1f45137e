"""The safety classifier on ONNX Runtime: PyTorch's answers, the same in any company, and no image where it fails."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from uso_engine import USOEngine
from uso_engine.cli.app import app
from uso_engine.config import EngineConfig, load_config, parse_config
from uso_engine.embedded.safety_classifier import FOLDER, flagged_pattern
from uso_engine.errors import BackendError, CheckpointError, ConfigError, MissingFileError, SafetyError
from uso_engine.loading.assembly import load_safety_checker
from uso_engine.loading.presence import require_parts
from uso_engine.safety import onnx_export
from uso_engine.safety.checker import SafetyChecker
from uso_engine.safety.onnx_classifier import OnnxClassifier

pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="neither the extra `cpu` nor `gpu` is installed")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "safety.onnx"
    answer = CliRunner().invoke(app, ["export-safety", "uso-tiny", "--output", str(path)])
    assert answer.exit_code == 0, answer.output
    assert "12 pictures: every probability within" in answer.output
    assert f'runtime = "onnx" and onnx_file = "{path}"' in answer.output.replace("\n", "")
    assert [found.name for found in path.parent.iterdir()] == ["safety.onnx"]  # the weights are in it
    return path


@pytest.fixture
def checker(exported: Path) -> SafetyChecker:
    return SafetyChecker.from_onnx(exported, FOLDER)


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(4)
    noise = [Image.fromarray(random.integers(0, 256, (64, 96, 3), dtype=np.uint8)) for _ in range(3)]
    return [*noise, flagged_pattern(256, 256), flagged_pattern(37, 91), Image.new("RGB", (16, 16), "white")]


def config_with(**safety: object) -> EngineConfig:
    tiny = load_config("uso-tiny")
    assert tiny.safety is not None
    table = {**tiny.model_dump(exclude_none=True), "safety": {"folder": tiny.safety.folder, **safety}}
    return parse_config(table)


def test_the_answers_are_pytorchs(checker: SafetyChecker) -> None:
    here, there = checker.scores(pictures()), SafetyChecker.from_folder(FOLDER).scores(pictures())
    assert here == pytest.approx(there, abs=onnx_export.MOST_DIFFERENCE)
    assert [score > 0.5 for score in here] == [False, False, False, True, True, False]


def test_company_and_session_do_not_matter(checker: SafetyChecker, exported: Path) -> None:
    """To the bit: one picture at a time, and every session has the same threads."""
    together = checker.scores(pictures())
    alone = [SafetyChecker.from_onnx(exported, FOLDER).scores([picture])[0] for picture in reversed(pictures())]
    assert alone == together[::-1]


def test_a_configuration_chooses_the_runtime(exported: Path) -> None:
    config = config_with(runtime="onnx", onnx_file=str(exported))
    require_parts(config)
    checker = load_safety_checker(config, device="cpu")
    assert checker is not None
    assert checker.part is None  # nothing for a memory plan to move
    images, flagged = checker.screen([pictures()[0], flagged_pattern(64, 48)])
    assert flagged == (False, True)
    assert images[1].getextrema() == ((0, 0), (0, 0), (0, 0))
    with pytest.raises(MissingFileError, match=r"safety checker's ONNX file.*nowhere\.onnx"):
        require_parts(config_with(runtime="onnx", onnx_file="/nowhere.onnx"))


def test_an_engine_screens_with_it_and_plans_without_it(exported: Path) -> None:
    config = config_with(runtime="onnx", onnx_file=str(exported), forbid_disabling=True)
    with USOEngine.from_config(config, device="cpu", memory_budget_gib=1.2) as engine:
        assert "safety classifier" not in str(engine.memory_plan)
        result = engine.generate(prompt="a house", num_inference_steps=1, seed=1)
        assert result.has_nsfw_concepts == (False,)
        with pytest.raises(ValueError, match="configuration forbids switching it off"):
            engine.generate(prompt="a house", num_inference_steps=1, enable_safety_checker=False)


@pytest.mark.parametrize(
    ("safety", "says"),
    [
        ({"runtime": "onnx"}, 'runtime "onnx" needs onnx_file'),
        ({"provider": "cuda"}, "provider 'cuda' is for runtime \"onnx\""),
        ({"runtime": "onnxruntime"}, "safety.runtime: Input should be 'torch' or 'onnx', got 'onnxruntime'"),
    ],
)
def test_settings_that_contradict_each_other(safety: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_with(**safety)


def test_a_file_of_another_classifier_is_refused(exported: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(FOLDER, tmp_path / "other"))
    SafetyChecker.from_onnx(exported, other)
    weights = load_file(other / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"is not made from the files in .*other \(SHA-256 \w{64}\): it was made from"):
        SafetyChecker.from_onnx(exported, other)


def test_what_is_no_model_is_refused(exported: Path, tmp_path: Path) -> None:
    for name, data in (("noise", b"no model"), ("empty", b""), ("cut", exported.read_bytes()[:-1000])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{name} is no model that ONNX Runtime takes"):
            SafetyChecker.from_onnx(tmp_path / name, FOLDER)
    with pytest.raises(MissingFileError, match=r"no file .*nowhere\.onnx; `uso-engine export-safety` makes it"):
        SafetyChecker.from_onnx(tmp_path / "nowhere.onnx", FOLDER)


def test_a_foreign_model_is_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("pixel_values", "logits")]
    graph = helper.make_graph([helper.make_node("Identity", ["pixel_values"], ["logits"])], "foreign", value[:1], value[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(made, str(tmp_path / "foreign.onnx"))
    with pytest.raises(CheckpointError, match="it does not say what it was made from"):
        SafetyChecker.from_onnx(tmp_path / "foreign.onnx", FOLDER)


def test_a_provider_that_is_not_here_is_an_error(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(BackendError, match=r"provider 'cuda' needs onnxruntime-gpu .*has .*CPUExecutionProvider"):
            SafetyChecker.from_onnx(exported, FOLDER, provider="cuda")
    # Offered, and left for the CPU without a word: what ONNX Runtime does where CUDA's libraries do not load.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"does not run .* on cuda, but on CPUExecutionProvider"):
        SafetyChecker.from_onnx(exported, FOLDER, provider="cuda")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"safety checker on ONNX Runtime: .*; install onnxruntime \(extra `cpu`\)"):
        SafetyChecker.from_onnx(exported, FOLDER)


class BrokenSession:
    """A session that fails in the way it is told."""

    def __init__(self, answer: Exception | np.ndarray) -> None:
        self.answer = answer

    def run(self, outputs: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        if isinstance(self.answer, Exception):
            raise self.answer
        return [self.answer]


@pytest.mark.parametrize(
    "answer", [RuntimeError("no memory"), np.zeros((1, 3), np.float32), np.full((1, 2), np.nan, np.float32), np.zeros(2)]
)
def test_a_classifier_that_fails_withholds_the_images(answer: Exception | np.ndarray) -> None:
    def prepare(images: list[Image.Image], *, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(1, 3, 4, 4)}

    classifier = OnnxClassifier(BrokenSession(answer), {0: "normal", 1: "nsfw"})
    with pytest.raises(SafetyError, match="its images are withheld"):
        SafetyChecker(classifier, prepare).screen([Image.new("RGB", (8, 8))])  # type: ignore[arg-type]


def test_an_export_that_answers_otherwise_is_not_written(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "_exported", lambda *arguments: exported.read_bytes())
    monkeypatch.setattr(onnx_export, "run", lambda session, pixels: torch.zeros(1, 2))
    with pytest.raises(CheckpointError, match=r"a probability is .* from PyTorch's, where at most 1e-04 is expected"):
        onnx_export.export_classifier(FOLDER, tmp_path / "safety.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_shell_says_what_is_in_the_way(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = CliRunner().invoke(app, ["export-safety", "uso-tiny", "-o", str(exported)])
    assert (answer.exit_code, "is there already" in answer.output) == (1, True)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    answer = CliRunner().invoke(app, ["export-safety", "uso-tiny", "-o", str(tmp_path / "new.onnx")])
    assert answer.exit_code == 1
    assert "exporting needs onnxscript" in answer.output
    assert "install the extra `export`" in answer.output.replace("\n", " ")
