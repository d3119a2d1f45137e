"""Paths in a configuration: files, folders, home, hub ids in the local cache; never a download."""

from __future__ import annotations

from pathlib import Path

import pytest

from uso_engine.errors import ConfigError, MissingFileError
from uso_engine.weights.files.paths import HubId, resolve_path, split_hub_id

COMMIT = "0123abcd"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache as the hub library lays it out: links in snapshots to blobs."""
    repo = tmp_path / "hub" / "models--org--model.v1"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / "b").write_text("weights")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    snapshot = repo / "snapshots" / COMMIT
    (snapshot / "transformer").mkdir(parents=True)
    (snapshot / "a.safetensors").symlink_to("../../blobs/b")
    (snapshot / "broken.safetensors").symlink_to("../../blobs/none")
    (snapshot / "transformer" / "config.json").write_text("{}")
    return tmp_path / "hub"


def test_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs" / "w").mkdir(parents=True)
    file = tmp_path / "configs" / "w" / "a.safetensors"
    file.write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "configs"
    assert resolve_path(str(file), what="x") == file
    assert resolve_path("w/a.safetensors", what="x", base_dir=base) == file
    assert resolve_path("w", what="x", base_dir=base) == base / "w"
    assert resolve_path("./w/a.safetensors", what="x", base_dir=base).samefile(file)
    assert resolve_path("../configs/w", what="x", base_dir=base).samefile(base / "w")
    assert resolve_path("~/configs/w/a.safetensors", what="x") == file
    assert resolve_path("configs/w", what="x") == base / "w"
    assert resolve_path("file:w/a.safetensors", what="x", base_dir=base) == file
    assert resolve_path("file:~/configs/w", what="x") == base / "w"
    assert resolve_path(f"file://{file}", what="x") == resolve_path(f"file:{file}", what="x") == file
    assert resolve_path(f"FILE://localhost{tmp_path}/co%6efigs/w", what="x") == base / "w"


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("org/model.v1", ""),
        ("org/model.v1:a.safetensors", "a.safetensors"),
        ("org/model.v1/a.safetensors", "a.safetensors"),
        ("org/model.v1:transformer", "transformer"),
        ("org/model.v1/transformer/config.json", "transformer/config.json"),
    ],
)
def test_hub_ids_are_found_in_the_cache(text: str, inside: str, cache: Path, tmp_path: Path) -> None:
    found = resolve_path(text, what="x", base_dir=tmp_path, cache_dir=cache)
    assert found == cache / "models--org--model.v1" / "snapshots" / COMMIT / inside
    assert found.exists()


def test_a_revision_of_a_hub_id(cache: Path, tmp_path: Path) -> None:
    repo = cache / "models--org--model.v1"
    (repo / "refs" / "v2").write_text("feed5678")
    (repo / "snapshots" / "feed5678").mkdir()
    assert resolve_path("org/model.v1@v2", what="x", cache_dir=cache) == repo / "snapshots" / "feed5678"
    assert resolve_path(f"org/model.v1@{COMMIT}:a.safetensors", what="x", cache_dir=cache).read_text() == "weights"
    with pytest.raises(MissingFileError, match=r"`hf download org/model\.v1 --revision v3`"):
        resolve_path("org/model.v1@v3", what="x", cache_dir=cache, in_config=False)


def test_the_hub_librarys_own_cache_is_the_default(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert resolve_path("org/model.v1", what="x").name == COMMIT


def test_a_path_goes_before_a_hub_id(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "org" / "model.v1").mkdir(parents=True)
    assert resolve_path("org/model.v1", what="x", base_dir=tmp_path, cache_dir=cache) == tmp_path / "org" / "model.v1"


@pytest.mark.parametrize(
    "text", ["org/model.v1:none.safetensors", "org/other", "org/model.v1:broken.safetensors", "org/other:f/g"]
)
def test_what_was_not_downloaded_is_named_with_the_command(text: str, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError) as caught:
        resolve_path(text, what="transformer checkpoint", base_dir=tmp_path, cache_dir=cache)
    message = str(caught.value)
    assert message.startswith(f"transformer checkpoint: {text} was not found; looked at {tmp_path / text}, {cache}")
    assert "`uso-engine download CONFIG`" in message


def test_a_missing_file_is_named_with_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"vision encoder: \./none was not found; looked at .*/none; correct the path"):
        resolve_path("./none", what="vision encoder", base_dir=tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "  ", "a\0b", "org/model.v1:../../secret", "org/model.v1:/etc/passwd", "~nobody-of-this-name/x", "file://host/x"],
)
def test_impossible_paths(text: str, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="x: "):
        resolve_path(text, what="x", base_dir=tmp_path, cache_dir=cache)


def test_a_reference_that_leads_out_of_the_cache_is_not_followed(cache: Path, tmp_path: Path) -> None:
    (cache / "models--org--model.v1" / "refs" / "main").write_text("../../../..")
    with pytest.raises(MissingFileError):
        resolve_path("org/model.v1", what="x", base_dir=tmp_path, cache_dir=cache)


def test_hub_ids_are_split_for_the_download_command() -> None:
    assert split_hub_id("org/name") == HubId("org/name")
    assert split_hub_id("org/name:a/b.safetensors") == HubId("org/name", None, "a/b.safetensors")
    assert split_hub_id("org/name/a.safetensors") == HubId("org/name", None, "a.safetensors")
    assert split_hub_id("org/name@v1.0") == HubId("org/name", "v1.0")
    assert split_hub_id("org/name@0123abcd:a.safetensors") == HubId("org/name", "0123abcd", "a.safetensors")
    assert split_hub_id("org/name@../x") is None
    assert split_hub_id("file:org/name") is None
    assert split_hub_id("name") is None
    assert split_hub_id("loras/ink.safetensors") is None
    assert split_hub_id("./org/name") is None
    assert split_hub_id("/org/name") is None
