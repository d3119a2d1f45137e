"""Quantised files: load anywhere, prove their content, and refuse everything that is not what was written."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from uso_engine.errors import CheckpointError, LoRAError, MissingFileError, OutputError
from uso_engine.model.params import TransformerParams
from uso_engine.precision.quantized_linear import TensorLayout
from uso_engine.precision.tiers import QUANTIZED_TIERS, TierName
from uso_engine.precision.transformer import layer_formats
from uso_engine.weights.files.quantized_file import QuantizedFile, is_quantized_file, write_quantized_file
from uso_engine.weights.files.recorded_file import RecordedFile
from uso_engine.weights.files.safetensors_file import SafetensorsSource, write_safetensors
from uso_engine.weights.loaded_quantized import LoadedQuantizedTransformer
from uso_engine.weights.lora import read_lora
from uso_engine.weights.lora.key_styles import uso_lora_shapes
from uso_engine.weights.model_shapes import transformer_shapes
from uso_engine.weights.quantized_checkpoint import (
    Description,
    load_quantized,
    open_originals,
    read_description,
    save_quantized,
)
from uso_engine.weights.quantizing import quantize
from uso_engine.weights.recipe import draw, recipe_source

PARAMS = TransformerParams(
    vec_in_dim=32, context_in_dim=32, hidden_size=64, num_heads=1, depth=2, depth_single_blocks=2, axes_dim=(16, 24, 24)
)


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    """A folder with a base checkpoint and a LoRA."""
    folder = tmp_path / "originals"
    folder.mkdir()
    write_safetensors(folder / "base.safetensors", recipe_source(transformer_shapes(PARAMS)))
    write_safetensors(folder / "lora.safetensors", {k: draw(k, shape) for k, shape in uso_lora_shapes(PARAMS, 4).items()})
    return folder


def describe(folder: Path, tier: TierName = "fp8", weight: float = 1.0) -> Description:
    return Description(
        tier,
        PARAMS,
        layer_formats(PARAMS, tier),
        torch.bfloat16,
        RecordedFile.of(folder / "base.safetensors"),
        (RecordedFile.of(folder / "lora.safetensors", weight),),
    )


def save(folder: Path, tier: TierName = "fp8", weight: float = 1.0) -> Path:
    path = folder.parent / f"{tier}.safetensors"
    loras = [(read_lora(folder / "lora.safetensors", PARAMS), weight)]
    save_quantized(path, describe(folder, tier, weight), SafetensorsSource(folder / "base.safetensors"), loras)
    return path


FRESH = """
import sys, torch
from pathlib import Path
from uso_engine.weights.quantized_checkpoint import load_quantized
for path in map(Path, sys.argv[1:]):
    module, description = load_quantized(path)
    torch.save({key: tensor.view(torch.uint8) for key, tensor in module.state_dict().items()}, path.with_suffix(".pt"))
    print(description.tier, description.loras[0].weight)
assert "optimum" not in sys.modules
"""


def test_files_load_in_a_fresh_process_without_their_originals(originals: Path, repository: Path) -> None:
    paths = {tier: save(originals, tier, 0.5) for tier in QUANTIZED_TIERS}
    lora = read_lora(originals / "lora.safetensors", PARAMS)
    source = SafetensorsSource(originals / "base.safetensors")
    expected = {tier: quantize(PARAMS, source, layer_formats(PARAMS, tier), loras=[(lora, 0.5)]) for tier in QUANTIZED_TIERS}
    originals.rename(originals.parent / "gone")
    environment = {"PYTHONPATH": f"{repository}:{repository / 'kernels'}"}
    command = [sys.executable, "-c", FRESH, *map(str, paths.values())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{tier} 0.5" for tier in QUANTIZED_TIERS], done.stderr
    for tier, path in paths.items():
        found, state = torch.load(path.with_suffix(".pt")), expected[tier].state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], tensor.view(torch.uint8)) for key, tensor in state.items()), tier


@pytest.mark.parametrize("tier", QUANTIZED_TIERS)
def test_tensors_are_aligned_and_the_file_is_plain_safetensors(tier: TierName, originals: Path) -> None:
    path = save(originals, tier)
    module, _ = load_quantized(path)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in module.state_dict().values())
    with safe_open(path, "pt") as file:
        for key, tensor in module.state_dict().items():
            assert torch.equal(file.get_tensor(key).view(torch.uint8), tensor.view(torch.uint8)), key
    assert is_quantized_file(path)
    assert not is_quantized_file(originals / "base.safetensors")
    assert not is_quantized_file(originals)
    assert read_description(path) == describe(originals, tier)


def test_every_changed_byte_is_found(originals: Path) -> None:
    path = save(originals)
    sound = path.read_bytes()
    header_bytes = 8 + int.from_bytes(sound[:8], "little")
    # Some places in the header, in every part of the data, and the very last byte.
    positions = [20, header_bytes // 2, header_bytes - 70, *range(header_bytes, len(sound), 9001), len(sound) - 1]
    for position in positions:
        edited = bytearray(sound)
        edited[position] ^= 1
        path.write_bytes(edited)
        with pytest.raises(CheckpointError):
            load_quantized(path)
    path.write_bytes(sound)
    load_quantized(path)


def test_edits_that_keep_the_format_valid_are_named(originals: Path) -> None:
    path = save(originals)
    sound = path.read_bytes()
    for old, new in ((b'\\"tier\\":\\"fp8\\"', b'\\"tier\\":\\"bf6\\"'), (b'"F8_E4M3"', b'"F8_E5M2"')):
        assert old in sound
        path.write_bytes(sound.replace(old, new))
        with pytest.raises(CheckpointError, match="its header was edited or damaged"):
            load_quantized(path)
    edited = bytearray(sound)
    edited[-1] ^= 255
    path.write_bytes(edited)
    with pytest.raises(CheckpointError, match=r"damaged or edited: 1 tensors .*: final_layer.*uso-engine quantize"):
        load_quantized(path)
    # What is skipped is said by name: only the tensors' content.
    load_quantized(path, check_contents=False)


@pytest.mark.parametrize("size", [0, 7, 500, -1, -5000])
def test_truncated_files_are_refused(originals: Path, size: int) -> None:
    path = save(originals)
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    with pytest.raises(CheckpointError, match=r"truncated|empty|bytes"):
        load_quantized(path, check_contents=False)


def test_files_of_other_kinds_and_versions_are_refused(originals: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such file"):
        load_quantized(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="not a quantised transformer"):
        load_quantized(originals / "base.safetensors")
    description = describe(originals)
    for change, message in (
        ({"version": 2}, "version 2 of the quantised format, this engine reads 1"),
        ({"kinds": {**description.formats, "img_in": "int2"}}, "kinds that this engine does not know: int2"),
        ({"kinds": {**description.formats, "double_blocks.1.img_attn.qkv": "int4"}}, "contradicts its own description"),
        ({"params": {"depth": 10**8}}, "cannot be understood: depth: expected a whole number from 1 to 1,000, got 100000000"),
        ({"params": 3}, "cannot be understood: expected a table of sizes"),
        ({"kinds": 3}, "cannot be understood"),
        ({"loras": [{"name": "x"}]}, "cannot be understood"),
        ({"dtype": "zeros"}, "in zeros is not known"),
        ({"tier": "int3"}, "tier int3 in bfloat16 is not known"),
    ):
        layout = description.layout()
        tensors = ((key, torch.zeros(entry.shape).to(entry.dtype)) for key, entry in layout.items())
        write_quantized_file(tmp_path / "other.safetensors", layout, tensors, {**description.document(), **change})
        with pytest.raises(CheckpointError, match=message):
            load_quantized(tmp_path / "other.safetensors")


def test_nothing_is_left_behind_when_quantising_fails(originals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = transformer_shapes(PARAMS)
    tensors = {key: draw(key, shape) for key, shape in shapes.items()}
    tensors["single_blocks.1.linear2.weight"][3, 3] = float("nan")
    write_safetensors(originals / "base.safetensors", tensors)
    with pytest.raises(CheckpointError, match="not a number"):
        save(originals)
    assert sorted(file.name for file in originals.parent.iterdir()) == ["originals"]
    with pytest.raises(OutputError, match="cannot be written"):
        write_quantized_file(originals / "no" / "folder.safetensors", {}, [], {})
    monkeypatch.setattr("os.statvfs", lambda folder: os.statvfs_result((1, 1, 1, 1, 10, 1, 1, 1, 0, 255)))
    with pytest.raises(OutputError, match=r"GB are needed, 0\.0 GB are free"):
        write_quantized_file(originals / "full.safetensors", {"x": TensorLayout((99,), torch.float32)}, [], {})


def test_writer_takes_exactly_the_layout(tmp_path: Path) -> None:
    path, x = tmp_path / "file.safetensors", torch.arange(5, dtype=torch.int8)
    layout = {"x": TensorLayout((5,), torch.int8), "y": TensorLayout((5,), torch.int8)}
    for tensors, message in (
        ([("x", x)], "never came: y"),
        ([("x", x), ("x", x)], "came twice"),
        ([("z", x)], "not in the layout"),
        ([("x", x.float())], "x must be torch.int8"),
    ):
        with pytest.raises(ValueError, match=message):
            write_quantized_file(path, layout, tensors, {})
        assert list(tmp_path.iterdir()) == []
    # Five bytes, then a filler, since the format has no gaps.
    write_quantized_file(path, layout, [("y", x + 1), ("x", x)], {"note": "ä"})
    file = QuantizedFile(path)
    assert torch.equal(file.tensor("y"), x + 1)
    assert file.tensor("y").data_ptr() % 64 == 0
    assert (file.document, list(file.layout)) == ({"note": "ä"}, ["x", "y"])
    file.check_contents()


def test_file_must_be_what_the_configuration_asks_for(originals: Path, tmp_path: Path) -> None:
    description = describe(originals)
    lora = originals / "lora.safetensors"
    formats = layer_formats(PARAMS, "fp8")
    wanted: dict[str, Any] = {
        "params": PARAMS,
        "tier": "fp8",
        "loras": [(lora, 1.0)],
        "formats": formats,
        "path": tmp_path / "q",
    }
    description.require(**wanted)
    # A LoRA that is no longer there goes by its name.
    description.require(**{**wanted, "loras": [(tmp_path / "elsewhere" / "lora.safetensors", 1.0)]})
    other = originals / "other.safetensors"
    write_safetensors(other, {k: draw(k, shape, "x") for k, shape in uso_lora_shapes(PARAMS, 4).items()})
    for change, message in (
        ({"tier": "int8"}, "precision tier is fp8, the configuration has int8"),
        ({"params": replace(PARAMS, depth=3)}, "depth is 2, the configuration has 3"),
        ({"loras": [(lora, 0.5)]}, "merged LoRAs are .*lora.safetensors at weight 1 .*has .*at weight 0.5"),
        ({"loras": [(other, 1.0)]}, "merged LoRAs are"),
        ({"loras": []}, "the configuration has none"),
        ({"formats": layer_formats(PARAMS, "fp8", keep=[])}, "other layers are kept .*double_blocks.0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            description.require(**{**wanted, **change})


def test_other_loras_come_from_the_originals_or_an_error_names_them(originals: Path) -> None:
    path = save(originals, "fp8", 0.5)
    module, description = load_quantized(path)
    loaded = LoadedQuantizedTransformer(module, description.tier, lambda: open_originals(description), description.formats)
    loaded.set_loras([], keep_configured=False)
    pristine = quantize(PARAMS, SafetensorsSource(originals / "base.safetensors"), description.formats)
    for key, tensor in pristine.state_dict().items():
        assert torch.equal(module.state_dict()[key].view(torch.uint8), tensor.view(torch.uint8)), key
    loaded.close()
    with pytest.raises(CheckpointError, match="was closed"):
        loaded.set_loras([])

    moved = originals.rename(originals.parent / "moved")
    module, description = load_quantized(path)
    loaded = LoadedQuantizedTransformer(module, description.tier, lambda: open_originals(description), description.formats)
    with pytest.raises(MissingFileError, match=r"(?s)not there:.*base.safetensors \(.*lora.safetensors at weight 0.5"):
        loaded.set_loras([])
    source, loras = open_originals(description, folder=moved)
    assert [strength for _, strength in loras] == [0.5]
    source.close()
    write_safetensors(moved / "lora.safetensors", {k: draw(k, s, "x") for k, s in uso_lora_shapes(PARAMS, 4).items()})
    with pytest.raises(CheckpointError, match=r"(?s)other content than these files have now:.*lora.safetensors"):
        open_originals(description, folder=moved)


def test_document_says_what_the_file_is_made_of(originals: Path) -> None:
    path = save(originals, "int4")
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["uso_quantized"])
    assert document["tier"] == "int4"
    assert document["params"]["hidden_size"] == 64
    assert document["source"]["bytes"] == (originals / "base.safetensors").stat().st_size
    assert len(document["source"]["sha256"]) == 64
    assert document["loras"][0]["weight"] == 1.0
    assert set(document["kinds"].values()) == {"float", "int4", "int8_weight"}


def test_folder_of_shards_is_recorded_by_all_of_them(tmp_path: Path) -> None:
    for number in (1, 2):
        write_safetensors(tmp_path / f"model-0000{number}-of-00002.safetensors", {"x": torch.full((4,), float(number))})
    before = RecordedFile.of(tmp_path)
    assert before.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    write_safetensors(tmp_path / "model-00002-of-00002.safetensors", {"x": torch.full((4,), 3.0)})
    assert RecordedFile.of(tmp_path).sha256 != before.sha256
    with pytest.raises(MissingFileError):
        RecordedFile.of(tmp_path / "absent")


def test_lora_errors_name_the_lora(originals: Path) -> None:
    with pytest.raises(LoRAError, match=r"lora\.safetensors"):
        save(originals, "int4", 3e38)
