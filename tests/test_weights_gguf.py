"""GGUF files: values by ggml's own formulas, FLUX's keys, and headers that lie."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_blocks import BLOCK_BYTES, FORMULAS, HALVES_AT
from narrow_model import NARROW
from torch import Tensor

from uso_engine.errors import BackendError, CheckpointError
from uso_engine.weights.files.gguf_file import TYPES, GGUFSource
from uso_engine.weights.loading import load_parameters
from uso_engine.weights.model_shapes import transformer_shapes
from uso_engine.weights.recipe import draw
from uso_engine.weights.transformer_checkpoint import open_transformer_checkpoint

gguf = pytest.importorskip("gguf", reason="needs the gguf library: pip install 'uso-engine[gguf]'")

PARAMS = replace(NARROW, in_channels=32, vec_in_dim=32, context_in_dim=32)
SHAPES = transformer_shapes(PARAMS)


def _kind(name: str) -> object:
    return gguf.GGMLQuantizationType[name]


def _random_blocks(kind: str, count: int) -> bytes:
    """Blocks of random codes with factors that are numbers."""
    chance = random.Random(kind)
    blocks = bytearray()
    for _ in range(count):
        block = bytearray(chance.randbytes(BLOCK_BYTES[kind]))
        for at in HALVES_AT[kind]:
            struct.pack_into("<e", block, at, chance.uniform(-0.1, 0.1))
        blocks += block
    return bytes(blocks)


def _write(path: Path, tensors: Mapping[str, np.ndarray], kinds: Mapping[str, str], **texts: str) -> Path:
    """A file as converters write it: arrays of plain types, or bytes [rows, bytes of a row] of a quantised one."""
    writer = gguf.GGUFWriter(path, "flux")
    for key, text in texts.items():
        writer.add_string(key.replace("__", "."), text)
    for name, array in tensors.items():
        writer.add_tensor(name, array, raw_dtype=_kind(kinds[name]) if name in kinds else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", FORMULAS)
def test_values_are_those_of_ggmls_formulas(kind: str, tmp_path: Path) -> None:
    rows, columns = 3, 512
    per_block = 256 if kind.endswith("_K") else 32
    stored = _random_blocks(kind, rows * columns // per_block)
    array = np.frombuffer(stored, dtype=np.uint8).reshape(rows, -1)
    source = GGUFSource(_write(tmp_path / "f.gguf", {"w": array}, {"w": kind}))
    assert source.shape("w") == (rows, columns) and source.dtype("w") == torch.float32
    size = BLOCK_BYTES[kind]
    expected = [x for at in range(0, len(stored), size) for x in FORMULAS[kind](stored[at : at + size])]
    found = source.read("w")
    assert torch.allclose(
        found.double(), torch.tensor(expected, dtype=torch.float64).reshape(rows, columns), rtol=1e-5, atol=1e-5
    )
    source.close()


def test_every_type_that_is_read_has_a_formula_here() -> None:
    assert set(TYPES) == {*FORMULAS, "F32", "F16", "BF16"}


def test_plain_types_keep_their_bits(tmp_path: Path) -> None:
    values = draw("w", (4, 32))
    halves = values.bfloat16().view(torch.int16).numpy().view(np.uint8)
    tensors = {"f32": values.numpy(), "f16": values.half().numpy(), "bf16": halves}
    source = GGUFSource(_write(tmp_path / "f.gguf", tensors, {"bf16": "BF16"}))
    for name, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
        assert source.dtype(name) == dtype and source.shape(name) == (4, 32)
        assert torch.equal(source.read(name), values.to(dtype))
    source.close()


def _flux(kind: str, prefix: str = "") -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, Tensor]]:
    """A transformer as ComfyUI-GGUF's converter writes it: matrices quantised, the rest in float32; and what it means."""
    tensors: dict[str, np.ndarray] = {}
    kinds: dict[str, str] = {}
    truth: dict[str, Tensor] = {}
    for key, shape in SHAPES.items():
        values = draw(key, shape).numpy()
        name = prefix + key
        if len(shape) == 2:
            tensors[name], kinds[name] = gguf.quantize(values, _kind(kind)), kind
            stored, size = tensors[name].tobytes(), BLOCK_BYTES[kind]
            numbers = [x for at in range(0, len(stored), size) for x in FORMULAS[kind](stored[at : at + size])]
            truth[key] = torch.tensor(numbers, dtype=torch.float64).reshape(shape)
        else:
            tensors[name], truth[key] = values, torch.from_numpy(values).double()
    return tensors, kinds, truth


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_is_loaded_at_the_type_that_was_asked_for(kind: str, prefix: str, tmp_path: Path) -> None:
    tensors, kinds, truth = _flux(kind, prefix)
    source = open_transformer_checkpoint(_write(tmp_path / "flux1-dev.gguf", tensors, kinds), PARAMS)
    assert set(source.keys()) == set(SHAPES)
    with torch.device("meta"):
        module = _model()
    load_parameters(module, source, device="cpu", dtype=torch.bfloat16)
    for key, value in module.state_dict().items():
        assert torch.equal(value, truth[key].float().bfloat16()), key
    source.close()


def _model() -> torch.nn.Module:
    from uso_engine.model.transformer import Transformer

    return Transformer(PARAMS)


def test_an_original_shape_in_the_metadata_is_the_shape(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "f.gguf", "flux")
    writer.add_array("comfy.gguf.orig_shape.w", [4, 2, 16])
    writer.add_tensor("w", draw("w", (4, 32)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert torch.equal(GGUFSource(tmp_path / "f.gguf").read("w"), draw("w", (4, 32)).reshape(4, 2, 16))


def test_kontext_in_the_metadata_is_refused_unless_asked_for(tmp_path: Path) -> None:
    tensors, kinds, _ = _flux("Q8_0")
    path = _write(tmp_path / "f.gguf", tensors, kinds, general__name="Flux.1 Kontext Dev")
    with pytest.raises(CheckpointError, match=r"FLUX.1-Kontext \(general.name = Flux.1 Kontext Dev\)"):
        open_transformer_checkpoint(path, PARAMS, accept_kontext=False)
    open_transformer_checkpoint(path, PARAMS, accept_kontext=True).close()


def test_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    blocks = np.zeros((2, gguf.GGML_QUANT_SIZES[_kind("IQ4_NL")][1]), dtype=np.uint8)
    path = _write(tmp_path / "f.gguf", {"a.weight": blocks}, {"a.weight": "IQ4_NL"})
    with pytest.raises(CheckpointError, match=r"type IQ4_NL, which is not read .*: a.weight"):
        GGUFSource(path)


def _header(
    kind: int = 0, dims: tuple[int, ...] = (32, 4), offset: int = 0, *, count: int = 1, extra: bytes = b"", fields: int = 0
) -> bytes:
    """A header of one tensor `w`, written by hand."""
    head = b"GGUF" + struct.pack("<IQQ", 3, count, fields) + extra
    head += struct.pack("<Q", 1) + b"w" + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    head += struct.pack("<IQ", kind, offset)
    return head + bytes(-len(head) % 32)


def _field(kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + value


LIES = {
    "an unknown type": _header(kind=9999) + bytes(512),
    "a type without blocks of that length": _header(kind=8, dims=(31, 4)) + bytes(512),
    "a tensor longer than the file": _header(dims=(1 << 20, 1 << 20)) + bytes(512),
    "dimensions whose product overflows": _header(dims=(1 << 40, 1 << 40)) + bytes(512),
    "a place after the end": _header(offset=1 << 40) + bytes(512),
    "tensors that are not there": _header(count=1 << 60) + bytes(512),
    "fields that are not there": _header(fields=1 << 60) + bytes(512),
    "an array longer than the file": _header(fields=1, extra=_field(9, struct.pack("<IQ", 0, 1 << 60))) + bytes(512),
    "a string longer than the file": _header(fields=1, extra=_field(8, struct.pack("<Q", 1 << 60))) + bytes(512),
    "an unknown field": _header(fields=1, extra=_field(77, b"")) + bytes(512),
    "an old version": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "only its name": b"GGUF",
    "truncated in the tensor": _header() + bytes(511),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_end_in_an_error(lie: str, tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    path.write_bytes(LIES[lie])
    # What would lie after the end is not looked for: the first step beyond it is the error.
    said = "it should go on to byte" if "longer than the file" in lie else ""
    with pytest.raises(CheckpointError, match=rf"f\.gguf: .*{said}"):
        open_transformer_checkpoint(path, PARAMS)


def test_a_header_written_by_hand_is_read(tmp_path: Path) -> None:
    """So that the lies above are lies in one thing only."""
    (tmp_path / "f.gguf").write_bytes(_header() + draw("w", (4, 32)).numpy().tobytes())
    assert torch.equal(GGUFSource(tmp_path / "f.gguf").read("w"), draw("w", (4, 32)))


def test_every_byte_of_a_header_may_be_damaged(tmp_path: Path) -> None:
    path = _write(tmp_path / "f.gguf", {"w": draw("w", (4, 32)).numpy()}, {}, general__name="x")
    whole, chance = path.read_bytes(), random.Random(5)
    refused = 0
    for at in range(4, len(whole) - 512):
        damaged = bytearray(whole)
        damaged[at] = chance.randrange(256)
        path.write_bytes(damaged[: chance.choice((len(whole), at + 1))])
        try:
            source = GGUFSource(path)
        except CheckpointError:
            refused += 1
            continue
        for key in source.keys():  # noqa: SIM118 - a source is not a mapping
            source.read(key)
        source.close()
    assert refused > 50


def test_without_the_library_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "f.gguf").write_bytes(_header())
    with pytest.raises(BackendError, match=r"pip install 'uso-engine\[gguf\]'"):
        open_transformer_checkpoint(tmp_path / "f.gguf", PARAMS)
