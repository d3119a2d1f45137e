"""Files and folders that are damaged, foreign or odd: each ends in an error of ours that says where, never in a library's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from single_parts import FILES, FOLDERS, SECRET, load, refusal, weights_of
from small_encoders import TINY, edit_json

from uso_engine.errors import CheckpointError, LoRAError, MissingFileError

Damage = Callable[[Path], object]


def bytes_of(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content)


def header_of(header: object) -> Damage:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bytes_of(len(text).to_bytes(8, "little") + text)


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link_to(target: str) -> Damage:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(path if target == "itself" else target)

    return link


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


ANY_FILE: dict[str, Damage] = {
    "absent": Path.unlink,
    "empty": bytes_of(b""),
    "text": bytes_of(f"{SECRET}:root:/root:/bin/bash\n".encode() * 30),
    "binary": bytes_of(bytes(range(256)) * 40),
    "cut in half": cut_in_half,
    "a folder": a_folder,
    "a link to itself": a_link_to("itself"),
    "a link to nowhere": a_link_to("/nowhere/at/all"),
    "a list": bytes_of(b"[]"),
    "a number": bytes_of(b"1"),
    "deep": bytes_of(b"[" * 100_000),
    "a long number": bytes_of(b'{"a": ' + b"9" * 10_000 + b"}"),
}
WEIGHTS: dict[str, Damage] = {
    **ANY_FILE,
    "a pipe": a_pipe,
    "a device": a_link_to("/dev/zero"),
    "a pickle": bytes_of(b"\x80\x04\x95\x10" + b"\0" * 50),
    "a header that is a list": header_of([]),
    "a tensor that is a number": header_of({"a": 1}),
    "a tensor of terabytes": header_of({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}),
    "a deep header": header_of(b"[" * 100_000),
    "an odd description": header_of({"__metadata__": {"uso_quantized": "[]", "uso_quantized_sha256": "x"}}),
}


@pytest.mark.parametrize("damage", ANY_FILE)
@pytest.mark.parametrize(("part", "file"), [(part, file) for part, files in FOLDERS.items() for file in files])
def test_a_damaged_file_of_an_encoder(part: str, file: str, damage: str, tmp_path: Path) -> None:
    folder = tmp_path / part
    shutil.copytree(TINY / part, folder)
    ANY_FILE[damage](folder / file)
    refusal(part, folder)


@pytest.mark.parametrize("damage", WEIGHTS)
@pytest.mark.parametrize("part", FOLDERS)
def test_damaged_weights_of_an_encoder(part: str, damage: str, tmp_path: Path) -> None:
    folder = tmp_path / part
    shutil.copytree(TINY / part, folder)
    WEIGHTS[damage](folder / "model.safetensors")
    refusal(part, folder)


@pytest.mark.parametrize("damage", WEIGHTS)
@pytest.mark.parametrize("part", FILES)
def test_a_damaged_file_of_weights(part: str, damage: str, tmp_path: Path) -> None:
    path = weights_of(part, tmp_path)
    WEIGHTS[damage](path)
    refusal(part, path)


@pytest.mark.parametrize("part", [*FOLDERS, *FILES])
def test_sound_ones_load(part: str, tmp_path: Path) -> None:
    assert load(part, TINY / part if part in FOLDERS else weights_of(part, tmp_path))


@pytest.mark.parametrize(
    ("part", "file", "changes"),
    [
        ("t5", "config.json", {"num_layers": "x"}),
        ("t5", "config.json", {"d_model": -1}),
        ("t5", "config.json", {"num_heads": 0}),
        ("t5", "config.json", {"feed_forward_proj": "of-next-year"}),
        ("t5", "config.json", {"num_layers": 1}),
        ("t5", "config.json", {"dtype": "of-next-year"}),
        ("t5", "config.json", {"model_type": ["t5"]}),
        ("t5", "config.json", {"transformers_weights": "../../elsewhere.safetensors"}),
        ("t5", "tokenizer_config.json", {"model_max_length": "x"}),
        ("clip", "config.json", {"eos_token_id": "x"}),
        ("clip", "config.json", {"hidden_size": None}),
        ("clip", "config.json", {"num_hidden_layers": 1}),
        ("clip", "tokenizer_config.json", {"model_max_length": "x"}),
        ("vision", "config.json", {"image_size": [1, 2]}),
        ("vision", "config.json", {"patch_size": 0}),
        ("vision", "preprocessor_config.json", {"image_mean": "x"}),
        ("vision", "preprocessor_config.json", {"size": "x"}),
        ("safety", "config.json", {"id2label": {"a": "nsfw"}}),
        ("safety", "config.json", {"hidden_act": "of-next-year"}),
        ("safety", "config.json", {"model_type": "of-next-year", "auto_map": {"AutoConfig": "code.py--Config"}}),
        ("safety", "config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}),
        ("safety", "preprocessor_config.json", {"image_mean": "x"}),
        ("safety", "preprocessor_config.json", {"size": {"height": 10**9, "width": 10**9}}),
        ("safety", "preprocessor_config.json", {"image_processor_type": "OfNextYear"}),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else str(value),
)
def test_settings_that_cannot_be(part: str, file: str, changes: dict[str, object], tmp_path: Path) -> None:
    folder = tmp_path / part
    shutil.copytree(TINY / part, folder)
    edit_json(folder / file, **changes)
    refusal(part, folder)


def _index(path: Path, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (path / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _circle(path: Path, *names: str) -> None:
    for name in names:
        (path / name).symlink_to(name)


ODD_FOLDERS: dict[str, Damage] = {
    "empty": lambda path: None,
    "only config.json": lambda path: (path / "config.json").write_text("[]"),
    "an index that leads out": lambda path: _index(path, {"weight_map": {"a": "../../x.safetensors"}}),
    "an index that leads to the root": lambda path: _index(path, {"weight_map": {"a": "/etc/passwd"}}),
    "an index that is a list": lambda path: _index(path, []),
    "an index of numbers": lambda path: _index(path, {"weight_map": {"a": 1}}),
    "an index of nothing": lambda path: _index(path, {"weight_map": {}}),
    "an index of absent shards": lambda path: _index(path, {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}),
    "an index that is a folder": lambda path: (path / "model.safetensors.index.json").mkdir(),
    "a deep index": lambda path: _index(path, "[" * 100_000),
    "weights that are a folder": lambda path: (path / "model.safetensors").mkdir(),
    "links in a circle": lambda path: _circle(path, "transformer", "vae", "model.safetensors"),
}


@pytest.mark.parametrize("damage", ODD_FOLDERS)
@pytest.mark.parametrize("part", [*FOLDERS, *FILES])
def test_odd_folders(part: str, damage: str, tmp_path: Path) -> None:
    folder = tmp_path / part
    folder.mkdir()
    for file in (TINY / part).glob("*.json"):
        if damage.startswith(("an index", "a deep", "weights", "links")):
            shutil.copy(file, folder)
    ODD_FOLDERS[damage](folder)
    refusal(part, folder)


def test_an_index_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    """The shard that it names exists and would fit."""
    folder = tmp_path / "t5"
    shutil.copytree(TINY / "t5", folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    _index(folder, {"weight_map": {"shared.weight": "../outside.safetensors"}})
    assert "not beside it: ../outside.safetensors" in str(refusal("t5", folder))


def test_the_kinds_of_errors(tmp_path: Path) -> None:
    assert isinstance(refusal("t5", tmp_path / "absent"), MissingFileError)
    text = tmp_path / "notes.safetensors"
    text.write_text(f"{SECRET}:root:/root:/bin/bash\n")
    assert isinstance(refusal("lora", text), LoRAError)
    found = refusal("embedding", text)
    assert isinstance(found, CheckpointError)
    reason = "text, perhaps the error message of a failed download; download it again, or correct the path"
    assert str(found) == f"{text}: expected a safetensors file, but this is {reason}"


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """As somebody to whom a file can be closed, which root is not."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("part", [*FOLDERS, *(part for part in FILES if part != "embedding")])
def test_what_may_not_be_read(part: str) -> None:
    source = TINY / FILES.get(part, part)
    load(part, source)  # Imports what a closed home would hide.
    # pytest's own folders are closed to others.
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        cases = {root / "closed" / source.name: "", root / "within" / source.name: "config.json"}
        for path in cases:
            path.parent.mkdir()
            shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)
        closed = [path / inner if path.is_dir() else path for path, inner in cases.items()]
        locked = root / "locked"
        locked.mkdir()
        shutil.copytree(source, locked / source.name) if source.is_dir() else shutil.copy(source, locked)
        cases |= {locked / source.name: "", locked: ""}
        for path in (*closed, locked):
            path.chmod(0)
        try:
            with nobody():
                for path in cases:
                    refusal(part, path)
        finally:
            for path in (*closed, locked):
                path.chmod(0o755)
