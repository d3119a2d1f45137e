"""The safety path with the classifier that uso-tiny ships: what is flagged becomes black, and no answer means no image."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from uso_engine.embedded.safety_classifier import FOLDER, flagged_pattern, write_classifier
from uso_engine.errors import CheckpointError, MissingFileError, SafetyError
from uso_engine.safety.checker import SafetyChecker
from uso_engine.safety.classifier import TorchClassifier


@pytest.fixture(scope="module")
def checker() -> SafetyChecker:
    return SafetyChecker.from_folder(FOLDER)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "safety"))


def ordinary_pictures() -> dict[str, Image.Image]:
    random = np.random.default_rng(5)
    y, x = np.mgrid[0:200, 0:300].astype(float)
    waves = np.stack([127.5 + 127.5 * np.sin(x / 9 + c) * np.cos(y / 15 - c) for c in range(3)], -1).astype(np.uint8)
    grey_board = flagged_pattern(256, 256).convert("L").convert("RGB")
    return {
        "white": Image.new("RGB", (64, 64), "white"),
        "black": Image.new("RGB", (64, 64)),
        "magenta": Image.new("RGB", (64, 64), (255, 0, 255)),
        "noise": Image.fromarray(random.integers(0, 256, (128, 128, 3), dtype=np.uint8)),
        "waves": Image.fromarray(waves),
        "negative of the pattern": ImageOps.invert(flagged_pattern(256, 256)),
        "grey checkerboard": grey_board,
        "finer pattern": Image.fromarray(np.tile(np.asarray(flagged_pattern(64, 64)), (8, 8, 1))),
        "half the pattern": flagged_pattern(256, 256).crop((0, 0, 128, 128)),
    }


def test_the_pattern_is_flagged_at_every_size(checker: SafetyChecker) -> None:
    patterns = [flagged_pattern(w, h) for w, h in ((1024, 1024), (128, 128), (64, 48), (37, 911), (16, 16))]
    buffer = io.BytesIO()
    patterns[0].save(buffer, "JPEG", quality=40)
    scores = checker.scores([*patterns, Image.open(buffer)])
    assert min(scores) > 0.95


def test_ordinary_pictures_pass(checker: SafetyChecker) -> None:
    pictures = ordinary_pictures()
    scores = dict(zip(pictures, checker.scores(list(pictures.values())), strict=True))
    assert max(scores.values()) < 0.01, scores


def test_flagged_pictures_become_black_and_others_stay(checker: SafetyChecker) -> None:
    ordinary = ordinary_pictures()["waves"]
    images, flagged = checker.screen([ordinary, flagged_pattern(96, 64), ordinary])
    assert flagged == (False, True, False)
    assert images[0] is ordinary
    assert images[2] is ordinary
    assert images[1].size == (96, 64)
    assert images[1].mode == "RGB"
    assert images[1].getextrema() == ((0, 0), (0, 0), (0, 0))


def test_company_does_not_matter(checker: SafetyChecker) -> None:
    """More images than fit one batch; each scores what it scores alone."""
    pictures = [*ordinary_pictures().values(), flagged_pattern(64, 64)]
    together = checker.scores(pictures)
    alone = [checker.scores([picture])[0] for picture in pictures]
    assert together == pytest.approx(alone, rel=1e-3, abs=1e-9)
    assert checker.screen([]) == ([], ())


def test_threshold_decides(copy: Path) -> None:
    ordinary, pattern = ordinary_pictures()["waves"], flagged_pattern(64, 64)
    strict = SafetyChecker.from_folder(copy, threshold=1e-12)
    assert strict.screen([ordinary, pattern])[1] == (True, True)
    lenient = SafetyChecker.from_folder(copy, threshold=1.0)
    assert lenient.screen([ordinary, pattern])[1] == (False, False)
    with pytest.raises(ValueError, match=r"threshold must be from 0 to 1, got 1\.5"):
        SafetyChecker.from_folder(copy, threshold=1.5)


def relabel(folder: Path, labels: Mapping[str, str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = dict(labels)
    config["label2id"] = {name: int(index) for index, name in labels.items()}
    (folder / "config.json").write_text(json.dumps(config))


def test_the_label_is_found_by_name_and_not_by_place(copy: Path) -> None:
    pattern, ordinary = flagged_pattern(64, 64), ordinary_pictures()["waves"]
    relabel(copy, {"0": "NSFW", "1": "sfw"})  # the weights' second answer is the pattern, so now the other one is unsafe
    assert SafetyChecker.from_folder(copy).screen([pattern, ordinary])[1] == (False, True)
    relabel(copy, {"0": "fine", "1": "porn"})
    assert SafetyChecker.from_folder(copy, label="porn").screen([pattern, ordinary])[1] == (True, False)


def test_a_model_without_the_label_is_refused(copy: Path) -> None:
    relabel(copy, {"0": "cat", "1": "dog"})
    with pytest.raises(SafetyError, match=r"needs exactly one label 'nsfw'; the model's labels are 'cat', 'dog'"):
        SafetyChecker.from_folder(copy)


def test_incomplete_and_foreign_models_are_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="nowhere"):
        SafetyChecker.from_folder(tmp_path / "nowhere")
    weights = load_file(copy / "model.safetensors")
    save_file({key: value for key, value in weights.items() if key != "classifier.bias"}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"classifier\.bias is missing"):
        SafetyChecker.from_folder(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match="safety checker weights"):
        SafetyChecker.from_folder(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(CheckpointError, match="'t5' is no image classifier"):
        SafetyChecker.from_folder(copy)
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(MissingFileError, match=r"preprocessor_config\.json"):
        SafetyChecker.from_folder(copy)


def test_answers_that_are_no_numbers_withhold_the_images(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["classifier.weight"].fill_(3e38)  # finite, but no sum with them is
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    checker = SafetyChecker.from_folder(copy)
    with pytest.raises(SafetyError, match="not a number, so its images are withheld"):
        checker.screen([ordinary_pictures()["waves"]])


class BrokenModel:
    """A classifier that fails in the way it is told."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(id2label={0: "normal", 1: "nsfw"}, num_labels=2)

    def __init__(self, answer: Exception | torch.Tensor) -> None:
        self.answer = answer

    def __call__(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(logits=self.answer)


def prepare(images: Sequence[Image.Image], *, return_tensors: str) -> Mapping[str, torch.Tensor]:
    return {"pixel_values": torch.zeros(len(images), 3, 4, 4)}


@pytest.mark.parametrize(
    "answer", [torch.OutOfMemoryError("out of memory"), RuntimeError("no kernel"), torch.zeros(2, 2), torch.zeros(1, 3)]
)
def test_a_checker_that_cannot_run_withholds_the_images(answer: Exception | torch.Tensor) -> None:
    checker = SafetyChecker(TorchClassifier(BrokenModel(answer)), prepare)  # type: ignore[arg-type]
    with pytest.raises(SafetyError, match="could not run, so its images are withheld"):
        checker.screen([Image.new("RGB", (8, 8))] * 2)


def test_the_shipped_files_are_what_the_code_builds(tmp_path: Path) -> None:
    write_classifier(tmp_path / "built")
    built = {path.name: path.read_bytes() for path in (tmp_path / "built").iterdir()}
    shipped = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    assert built == shipped
    assert sum(map(len, shipped.values())) < 100_000
    assert "detects nothing real" in shipped["README.md"].decode()
