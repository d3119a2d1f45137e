"""Folders with small encoders in the Hugging Face layout, for the tests of conditioning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from uso_engine.embedded.build import FOLDER
from uso_engine.weights.recipe import draw

TINY = FOLDER


def copied(name: str, folder: Path) -> Path:
    """A copy of one of uso-tiny's encoder folders, to be spoilt."""
    target = folder / name
    shutil.copytree(TINY / name, target)
    return target


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder's weight file in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def fill(module: nn.Module, salt: str) -> None:
    """Give a module the reference recipe's weights."""
    state = {key: draw(key, tuple(value.shape), salt) for key, value in module.state_dict().items()}
    module.load_state_dict(state)
