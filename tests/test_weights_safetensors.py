"""Safetensors files: the official library reads ours and we read its; whatever is not one is refused in words."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from uso_engine.errors import CheckpointError, MissingFileError, OutputError
from uso_engine.weights.files.safetensors_file import SafetensorsSource, write_safetensors
from uso_engine.weights.files.safetensors_header import DTYPES, MAX_HEADER_BYTES
from uso_engine.weights.files.tensor_source import MemorySource, TensorSource, without_prefix
from uso_engine.weights.recipe import draw, recipe_source


def _one_of_each_type() -> dict[str, Tensor]:
    values = torch.arange(-6, 6, dtype=torch.float32).reshape(3, 4)
    tensors = {f"t.{name}": values.to(dtype) for name, dtype in DTYPES.items() if name != "BOOL"}
    return tensors | {
        "flag": values > 0,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 7),
        "odd": torch.ones(3, dtype=torch.int8),
    }


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _assert_same(a: Tensor, b: Tensor) -> None:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert _bits(a) == _bits(b)


def test_the_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    tensors = _one_of_each_type()
    write_safetensors(tmp_path / "ours.safetensors", tensors, {"note": "grün"})
    save_file(tensors, tmp_path / "theirs.safetensors", {"note": "grün"})
    theirs = load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == tensors.keys()
    for file in ("ours", "theirs"):
        source = SafetensorsSource(tmp_path / f"{file}.safetensors")
        assert source.metadata["note"] == "grün"
        assert set(source.keys()) == set(tensors)
        for key, tensor in tensors.items():
            assert (source.shape(key), source.dtype(key)) == (tuple(tensor.shape), tensor.dtype)
            _assert_same(source.read(key), tensor)
            _assert_same(theirs[key], tensor)
        source.close()


def test_a_read_tensor_is_the_callers_own_and_aligned(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(5, dtype=torch.int8)})
    before = path.read_bytes()
    source = SafetensorsSource(path)
    for key in source.keys():  # noqa: SIM118 - a source is not a mapping
        tensor = source.read(key)
        assert tensor.data_ptr() % 16 == 0  # int8 products on a CPU crash on unaligned weights
        tensor.zero_()
        assert source.read(key).eq(1).all()
    assert path.read_bytes() == before


def _file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _tensor(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "only 7 bytes"),
    "absurd length": (b"\xff" * 8 + b"{}", "at most"),
    "length just over the limit": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "at most"),
    "length beyond the file": ((1000).to_bytes(8, "little") + b"{}", "truncated, or not safetensors"),
    "not JSON": (_file(b"{nonsense"), "not JSON"),
    "not UTF-8": (_file(b'{"\xff":1}'), "not JSON"),
    "nested without end": (_file(b"[" * 100_000), "not JSON"),
    "a number of 5000 digits": (_file(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    "a list": (_file([]), "list, not an object"),
    "a key twice": (
        _file(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "twice",
    ),
    "no entry": (_file({"a": 1}), "expected dtype, shape and data_offsets"),
    "unknown type": (_file({"a": _tensor(dtype="Q4")}, bytes(8)), "type Q4"),
    "type is a list": (_file({"a": _tensor(dtype=["F32"])}, bytes(8)), "is not one of"),
    "negative side": (_file({"a": _tensor([-2])}, bytes(8)), "whole numbers"),
    "fractional side": (_file({"a": _tensor([2.0])}, bytes(8)), "whole numbers"),
    "true for a side": (_file({"a": _tensor([True, 2])}, bytes(8)), "whole numbers"),
    "sides of 2^60": (_file({"a": _tensor([1 << 60, 1 << 60])}, bytes(8)), "whole numbers"),
    "reversed range": (_file({"a": _tensor(offsets=[8, 0])}, bytes(8)), "increasing"),
    "range of another size": (_file({"a": _tensor(offsets=[0, 4])}, bytes(8)), "takes 8 bytes"),
    "overlap": (_file({"a": _tensor(), "b": _tensor()}, bytes(8)), "contradicts itself"),
    "hole": (_file({"a": _tensor(offsets=[4, 12])}, bytes(12)), "contradicts itself"),
    "truncated": (_file({"a": _tensor()}, bytes(5)), r"truncated: expected \d+ bytes, the file has \d+ \(3 are missing\)"),
    "trailing bytes": (_file({"a": _tensor()}, bytes(9)), "damaged"),
    "metadata of numbers": (_file({"__metadata__": {"a": 1}}), "__metadata__"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-lfs pointer"),
    "web page": (b"\xef\xbb\xbf\n<!DOCTYPE html><html><title>Sign in</title></html>", "web page"),
    "error message": (b'{"error":"Access to model black-forest-labs/FLUX.1-dev is restricted"}', "this is text, perhaps"),
    "short error message": (b"Not Found", "this is text, perhaps the error message of a failed download"),
    "legacy pickle": (pickle.dumps({"a": [1] * 40}, protocol=2), "pickle"),
    "zip pickle": (b"PK\x03\x04\x00\x00\x08\x08" + bytes(64), "zip archive"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(64), "GGUF"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_is_no_safetensors_file_is_refused_by_name(what: str, tmp_path: Path) -> None:
    content, message = HOSTILE[what]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsSource(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    # The path may be a slip: what the file says is not passed on.
    assert "restricted" not in str(caught.value)
    assert "Not Found" not in str(caught.value)


def test_a_header_whose_length_looks_like_a_pickle_is_still_read(tmp_path: Path) -> None:
    # 0x0280 little-endian are the two bytes that a pickle of protocol 2 begins with.
    text = json.dumps({"a": _tensor()}).encode().ljust(0x0280)
    (tmp_path / "a.safetensors").write_bytes(_file(text, bytes(8)))
    assert SafetensorsSource(tmp_path / "a.safetensors").read("a").tolist() == [0, 0]


def test_every_truncation_and_many_mutations_are_refused_or_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a.weight": torch.ones(3, 2), "b.bias": torch.ones(3, dtype=torch.bfloat16)}, {"x": "y"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            SafetensorsSource(path)
    chance = random.Random(0)
    for _ in range(600):
        changed = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        path.write_bytes(changed)
        try:
            source = SafetensorsSource(path)
        except CheckpointError:
            continue
        for key in source.keys():  # noqa: SIM118 - a source is not a mapping
            source.read(key)
        source.close()


def test_folders_pipes_and_missing_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such file"):
        SafetensorsSource(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="a folder"):
        SafetensorsSource(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):  # opening it would wait for ever
        SafetensorsSource(tmp_path / "pipe.safetensors")


def test_a_file_that_changes_or_shrinks_under_us_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.ones(1000)})
    source = SafetensorsSource(path)
    os.truncate(path, 500)
    with pytest.raises(CheckpointError, match="was changed after it was opened"):
        source.read("a")
    source.close()
    with pytest.raises(ValueError, match="was closed"):
        source.read("a")


def test_a_replaced_file_still_gives_the_pristine_values(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.ones(4)})
    source = SafetensorsSource(path)
    write_safetensors(path, {"a": torch.zeros(4)})
    assert source.read("a").tolist() == [1, 1, 1, 1]


class _Failing(MemorySource):
    def read(self, key: str) -> Tensor:
        if key == "b":
            raise KeyboardInterrupt
        return super().read(key)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.ones(4)})
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, _Failing({"a": torch.zeros(4), "b": torch.zeros(4)}))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(OutputError, match="cannot be written"):
        write_safetensors(tmp_path / "none" / "a.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="complex64"):
        write_safetensors(path, {"a": torch.zeros(1, dtype=torch.complex64)})


RECIPE = {
    "img_in.weight": [0.293762803, -0.41428256, 1.43369997, -1.1909585, 0.726369023, -0.0622810908],
    "high_layer_norm.weight": [0.730132103, 0.998479068, 0.908052325],
    "salt img_in.bias": [0.00321501237, -0.0147479502, 0.00955410581],
}


def test_recipe_weights_follow_the_reference_recipe() -> None:
    # Drawn once by the code in the reference cases' README.
    assert draw("img_in.weight", (2, 3)).flatten().tolist() == pytest.approx(RECIPE["img_in.weight"], abs=1e-7)
    assert draw("high_layer_norm.weight", (3,)).tolist() == pytest.approx(RECIPE["high_layer_norm.weight"], abs=1e-7)
    assert draw("img_in.bias", (3,), "salt").tolist() == pytest.approx(RECIPE["salt img_in.bias"], abs=1e-7)
    source = recipe_source({"img_in.weight": [2, 3]}, dtype=torch.bfloat16, draw_prefix="")
    assert isinstance(source, TensorSource)
    _assert_same(source.read("img_in.weight"), draw("img_in.weight", (2, 3)).bfloat16())
    prefixed = recipe_source({"in.weight": [2, 3]}, draw_prefix="img_")
    _assert_same(prefixed.read("in.weight"), draw("img_in.weight", (2, 3)))


def test_a_view_without_prefix_reads_the_prefixed_tensors() -> None:
    base = MemorySource({"a.x": torch.ones(1), "b.x": torch.zeros(1)})
    view = without_prefix(base, "a.")
    assert view.keys() == ("x",)
    assert view.read("x").item() == 1
