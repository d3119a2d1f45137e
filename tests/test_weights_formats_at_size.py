"""GGUF, scaled fp8 and quanto files at FLUX's size without its weights, and what reading such files keeps in memory."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import gguf
import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor, nn

from uso_engine.model.params import TransformerParams
from uso_engine.model.transformer import Transformer
from uso_engine.weights.diffusers_keys import diffusers_shapes
from uso_engine.weights.files.gguf_file import GGUFSource
from uso_engine.weights.files.safetensors_file import SafetensorsSource, write_safetensors
from uso_engine.weights.files.safetensors_header import DTYPES
from uso_engine.weights.files.stored_scales import with_scales
from uso_engine.weights.files.tensor_source import TensorSource
from uso_engine.weights.loading import load_parameters
from uso_engine.weights.model_shapes import transformer_shapes
from uso_engine.weights.transformer_checkpoint import open_transformer_checkpoint

FULL = TransformerParams()
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Shape = tuple[int, ...]


def sparse_safetensors(path: Path, held: Mapping[str, Tensor], zeros: Mapping[str, tuple[torch.dtype, Shape]]) -> Path:
    """A file whose large tensors are zeros that take no room on the disk."""
    header, content = {}, b""
    for key, tensor in held.items():
        body = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(content), len(content) + len(body)]
        header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        content += body
    end = len(content)
    for key, (dtype, shape) in zeros.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    os.truncate(path, 8 + len(text) + end)
    return path


def sparse_gguf(path: Path, shapes: Mapping[str, Shape], kind: str) -> Path:
    """The header of a file as ComfyUI-GGUF's converter writes it, matrices in one type, and zeros that take no room."""
    writer = gguf.GGUFWriter(path, "flux")
    end = 0
    for key, shape in shapes.items():
        stored = gguf.GGMLQuantizationType[kind if len(shape) == 2 and shape[1] % 256 == 0 else "F32"]
        block, size = gguf.GGML_QUANT_SIZES[stored]
        count = math.prod(shape) // block * size
        end += count + -count % 32
        # For quantised types the writer wants the shape in bytes.
        in_bytes = shape if block == 1 else (*shape[:-1], shape[-1] // block * size)
        dtype = torch.zeros(0, dtype=torch.float32 if block == 1 else torch.uint8).numpy().dtype
        writer.add_tensor_info(key, in_bytes, dtype, count, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = path.stat().st_size
    os.truncate(path, header + -header % 32 + end)
    return path


def scaled(form: str, shapes: Mapping[str, Shape]) -> tuple[dict[str, Tensor], dict[str, tuple[torch.dtype, Shape]]]:
    """Every matrix of the blocks in 8 bits as the tool in question writes it, with scales of one."""
    held: dict[str, Tensor] = {}
    zeros: dict[str, tuple[torch.dtype, Shape]] = {}
    for key, shape in shapes.items():
        layer = key.removesuffix(".weight")
        if len(shape) != 2 or "blocks" not in key:
            zeros[key] = (torch.bfloat16, shape)
        elif form == "quanto":
            zeros[f"{key}._data"] = (torch.int8, shape)
            held |= {f"{key}._scale": torch.ones(shape[0], 1), f"{layer}.input_scale": torch.ones(())}
        else:
            zeros[key] = (torch.float8_e4m3fn, shape)
            name = "scale_weight" if form == "scale_weight" else "weight_scale"
            held[f"{layer}.{name}"] = torch.ones(shape[0] if form == "per row" else ())
            if name == "weight_scale":
                text = json.dumps({"format": "float8_e4m3fn"}).encode()
                held[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if form == "scale_weight":
        held["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return held, zeros


def assert_is_flux(source: TensorSource) -> None:
    """The keys and shapes of FLUX's weights as a module on the meta device has them; one matrix is read."""
    with torch.device("meta"):
        module = Transformer(FULL)
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    assert {key: source.shape(key) for key in source.keys()} == expected  # noqa: SIM118 - a source is not a mapping
    assert len(expected) == 780
    read = source.read("double_blocks.18.img_attn.proj.weight")
    assert read.shape == (3072, 3072)
    assert not read.any()
    source.close()


@pytest.mark.parametrize("keys", ["Black Forest Labs", "diffusers"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_gguf_with_fluxs_keys(kind: str, keys: str, tmp_path: Path) -> None:
    shapes = transformer_shapes(FULL) if keys == "Black Forest Labs" else diffusers_shapes(FULL)
    path = sparse_gguf(tmp_path / "flux1-dev.gguf", shapes, kind)
    assert path.stat().st_size > (12e9 if kind == "Q8_0" else 6e9)
    assert_is_flux(open_transformer_checkpoint(path, FULL))


@pytest.mark.parametrize("form", ["scale_weight", "weight_scale", "per row", "quanto"])
def test_scaled_files_with_fluxs_keys(form: str, tmp_path: Path) -> None:
    path = sparse_safetensors(tmp_path / "flux1-dev.safetensors", *scaled(form, transformer_shapes(FULL)))
    assert path.stat().st_size > 11e9
    assert_is_flux(open_transformer_checkpoint(path, FULL))


LAYERS, ROWS, COLUMNS = 24, 512, 512
LAYER_BYTES = ROWS * COLUMNS * 4
"""Of one layer in float32."""


def opened(form: str, folder: Path) -> TensorSource:
    shapes = {f"blocks.{i}.weight": (ROWS, COLUMNS) for i in range(LAYERS)}
    if form.startswith("Q"):
        return GGUFSource(sparse_gguf(folder / "f.gguf", shapes, form))
    held, zeros = scaled(form, shapes)
    tensors = {**held, **{key: torch.zeros(shape).to(dtype) for key, (dtype, shape) in zeros.items()}}
    write_safetensors(folder / "f.safetensors", tensors)
    return with_scales(SafetensorsSource(folder / "f.safetensors"))


def empty_module() -> nn.Module:
    with torch.device("meta"):
        return nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(COLUMNS, ROWS, bias=False) for _ in range(LAYERS))})


@pytest.mark.parametrize("form", ["Q8_0", "Q4_K", "scale_weight", "per row", "quanto"])
def test_loading_holds_one_layer_besides_the_module(form: str, tmp_path: Path) -> None:
    """24 layers of 1 MiB in float32 become 12 MiB in bfloat16; all of them in float32 at once would be 24 MiB more."""
    source = opened(form, tmp_path)
    with LiveBytes():  # the first time in a process torch and the gguf library import what they need
        load_parameters(empty_module(), source, device="cpu", dtype=torch.bfloat16)
    module, live = empty_module(), LiveBytes()
    tracemalloc.start()  # counts what numpy holds, which the gguf library computes with
    try:
        with live:
            load_parameters(module, source, device="cpu", dtype=torch.bfloat16)
        _, in_numpy = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    source.close()
    in_module = LAYERS * LAYER_BYTES // 2
    assert live.alive >= in_module == sum(tensor.nbytes for tensor in module.state_dict().values())
    assert live.peak - in_module + in_numpy < 3 * LAYER_BYTES
