"""The projector's file with USO's prefix and without it, as ComfyUI repackages it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from uso_engine.errors import CheckpointError
from uso_engine.model.projector import StyleProjector
from uso_engine.weights.files.safetensors_file import write_safetensors
from uso_engine.weights.loading import load_parameters
from uso_engine.weights.model_shapes import module_shapes
from uso_engine.weights.projector_checkpoint import open_projector_checkpoint
from uso_engine.weights.recipe import draw


def projector_on_meta(hidden_size: int = 32) -> StyleProjector:
    return StyleProjector(vision_tokens=16, vision_width=48, style_tokens=8, hidden_size=hidden_size, device="meta")


@pytest.mark.parametrize("prefix", ["feature_embedder.", ""])
def test_both_files_fill_the_projector(prefix: str, tmp_path: Path) -> None:
    projector = projector_on_meta()
    shapes = module_shapes(projector)
    write_safetensors(tmp_path / "p.safetensors", {prefix + key: draw(key, shape) for key, shape in shapes.items()})
    source = open_projector_checkpoint(tmp_path / "p.safetensors", projector)
    load_parameters(projector, source, device="cpu", dtype=torch.float32)
    state = projector.state_dict()
    assert set(state) == set(shapes)
    for key, shape in shapes.items():
        assert torch.equal(state[key], draw(key, shape))


def test_another_projector_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    shapes = module_shapes(projector_on_meta(hidden_size=64))
    weights = {f"feature_embedder.{key}": draw(key, shape) for key, shape in shapes.items()}
    write_safetensors(path, weights)
    with pytest.raises(CheckpointError, match=r"3 keys of shape \[64, 48\], expected \[32, 48\]: high_projection\.weight"):
        open_projector_checkpoint(path, projector_on_meta())
    write_safetensors(path, weights | {"extra": torch.ones(1)})
    with pytest.raises(CheckpointError, match="1 key left over beside"):
        open_projector_checkpoint(path, projector_on_meta())
