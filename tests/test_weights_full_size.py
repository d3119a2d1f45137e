"""The four published checkpoint files at full size: every key finds its place, and none is missing; without the weights."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from torch import Tensor

from uso_engine.model.params import TransformerParams
from uso_engine.model.projector import StyleProjector
from uso_engine.weights.autoencoder_checkpoint import load_autoencoder
from uso_engine.weights.autoencoder_keys import AutoencoderParams, autoencoder_shapes
from uso_engine.weights.diffusers_keys import FusedSource, diffusers_pieces, diffusers_shapes
from uso_engine.weights.files.safetensors_header import DTYPES
from uso_engine.weights.files.tensor_source import MemorySource, RecipeSource
from uso_engine.weights.lora import LoRA, LowRankUpdate, parse_lora
from uso_engine.weights.model_shapes import module_shapes, transformer_shapes
from uso_engine.weights.transformer_checkpoint import open_transformer_checkpoint

FULL = TransformerParams()
DATA = Path(__file__).parent / "data"


def _published(file: str) -> dict[str, tuple[int, ...]]:
    with gzip.open(DATA / "checkpoint_keys.json.gz") as stream:
        return {key: tuple(shape) for key, shape in json.load(stream)[file].items()}


def _sparse_file(path: Path, shapes: Mapping[str, tuple[int, ...]], type_name: str) -> Path:
    """A safetensors file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * DTYPES[type_name].itemsize
        header[key] = {"dtype": type_name, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def test_the_transformers_780_keys(tmp_path: Path) -> None:
    published = _published("flux1-dev.safetensors")
    assert len(published) == 780
    assert transformer_shapes(FULL) == published
    source = open_transformer_checkpoint(_sparse_file(tmp_path / "flux1-dev.safetensors", published, "BF16"), FULL)
    assert {key: source.shape(key) for key in source.keys()} == published  # noqa: SIM118 - a source is not a mapping
    assert source.read("final_layer.linear.bias").shape == (64,)
    source.close()


def test_schnell_lacks_the_four_guidance_keys() -> None:
    schnell = TransformerParams(guidance_embed=False)
    assert {key for key in transformer_shapes(FULL) if key not in transformer_shapes(schnell)} == {
        f"guidance_in.{layer}.{leaf}" for layer in ("in_layer", "out_layer") for leaf in ("weight", "bias")
    }


def test_diffusers_keys(tmp_path: Path) -> None:
    with torch.device("meta"):
        theirs = module_shapes(FluxTransformer2DModel(guidance_embeds=True))
    assert diffusers_shapes(FULL) == theirs
    source = open_transformer_checkpoint(_sparse_file(tmp_path / "d.safetensors", theirs, "BF16"), FULL)
    assert {key: source.shape(key) for key in source.keys()} == transformer_shapes(FULL)  # noqa: SIM118 - a source is not a mapping
    source.close()


def _zeros(key: str, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(1, dtype=torch.bfloat16).expand(shape)


def _assert_full_rank(lora: LoRA) -> None:
    shapes = transformer_shapes(FULL)
    assert len(lora.updates) == 19 * 4 + 38 * 2
    for key, (update,) in lora.updates.items():
        assert isinstance(update, LowRankUpdate)
        assert update.down.shape == (128, shapes[key][1])
        rows = 3 * 3072 if key.endswith("linear1.weight") else shapes[key][0]
        assert (update.up.shape, update.row_start, update.scale) == ((rows, 128), 0, 1.0)


def test_the_loras_304_keys() -> None:
    published = _published("uso_flux_v1.0/dit_lora.safetensors")
    assert len(published) == 304
    _assert_full_rank(parse_lora(RecipeSource(published, _zeros, dtype=torch.bfloat16), FULL))


def test_the_projectors_18_keys() -> None:
    published = _published("uso_flux_v1.0/projector.safetensors")
    shapes = module_shapes(StyleProjector(729, 1152, 64, 3072, device="meta"))
    assert {f"feature_embedder.{key}": shape for key, shape in shapes.items()} == published
    assert len(published) == 18


def test_the_autoencoders_244_keys(tmp_path: Path) -> None:
    published = _published("ae.safetensors")
    assert len(published) == 244
    assert autoencoder_shapes(AutoencoderParams()) == published
    module = load_autoencoder(
        _sparse_file(tmp_path / "ae.safetensors", published, "F8_E4M3"), AutoencoderParams(), dtype=torch.bfloat16
    )
    assert sum(parameter.numel() for parameter in module.parameters()) == sum(torch.Size(s).numel() for s in published.values())


ONE_OF_EACH = TransformerParams(depth=1, depth_single_blocks=1)


def _bytes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Distinct bytes for every tensor; moving rows about is the same for every type, and one byte is the smallest."""
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for key, shape in shapes.items()}


def test_what_diffusers_converter_takes_apart_we_put_together_again() -> None:
    """At hidden size 3072, which the converter takes for granted, with one block of each kind."""
    shapes = transformer_shapes(ONE_OF_EACH)
    original = _bytes(shapes)
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert {key: tuple(tensor.shape) for key, tensor in converted.items()} == diffusers_shapes(ONE_OF_EACH)
    fused = FusedSource(MemorySource(converted), diffusers_pieces(ONE_OF_EACH), shapes)
    for key, tensor in original.items():
        assert torch.equal(fused.read(key), tensor), key


def test_what_we_put_together_diffusers_converter_takes_apart_again() -> None:
    original = _bytes(diffusers_shapes(ONE_OF_EACH))
    fused = FusedSource(MemorySource(original), diffusers_pieces(ONE_OF_EACH), transformer_shapes(ONE_OF_EACH))
    converted = convert_flux_transformer_checkpoint_to_diffusers({key: fused.read(key) for key in fused.keys()})  # noqa: SIM118
    assert converted.keys() == original.keys()
    for key, tensor in original.items():
        assert torch.equal(converted[key], tensor), key


_MEASURE_PEAK = """
import sys, torch
from pathlib import Path
from torch import nn
from uso_engine.weights.loading import load_parameters
from uso_engine.weights.files.safetensors_file import SafetensorsSource
from uso_engine.weights.lora import LoRA, LowRankUpdate

def peak_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

with torch.device("meta"):
    module = nn.ModuleList(nn.Linear(2048, 4096, bias=False) for _ in range(24))
keys = [f"{i}.weight" for i in range(24)]
lora = LoRA("l", "test", {key: (LowRankUpdate(torch.zeros(4, 2048), torch.zeros(4096, 4)),) for key in keys})
torch.ones(64, 64) @ torch.ones(64, 64)
before = peak_mib()
load_parameters(module, SafetensorsSource(Path(sys.argv[1])), device="cpu", dtype=torch.bfloat16, loras=[(lora, 1.0)])
print(peak_mib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_loading_needs_little_more_memory_than_the_module(tmp_path: Path, repository: Path) -> None:
    """24 matrices of 16 MiB, with a LoRA: the module's 384 MiB and a few tensors; reading all first would take twice that."""
    path = _sparse_file(tmp_path / "f.safetensors", {f"{i}.weight": (4096, 2048) for i in range(24)}, "BF16")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE_PEAK, str(path)],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert 370 < float(done.stdout) < 384 + 4 * 32
