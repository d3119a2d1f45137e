"""Finished files get URLs."""

from __future__ import annotations

import base64
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from uso_engine.errors import OutputError
from uso_engine.imaging.data_uri import decode_data_uri
from uso_engine.imaging.store import FileStore, ImageStore


def test_file_store_gives_urls_under_its_base(tmp_path: Path) -> None:
    store: ImageStore = FileStore(tmp_path / "files", "https://host.example/files/")
    assert store.put("a-1.png", b"data", "image/png") == "https://host.example/files/a-1.png"
    assert (tmp_path / "files" / "a-1.png").read_bytes() == b"data"


def test_without_a_base_urls_are_file_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = FileStore(Path("with space")).put("a.png", b"data", "image/png")
    assert Path(unquote(urlsplit(url).path)).read_bytes() == b"data"


@pytest.mark.parametrize("name", ["../a.png", "a/b.png", ".hidden", "", "a\0", "a b.png", "ä.png", "x" * 300, "a\n"])
def test_names_that_are_not_plain_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not a plain file name"):
        FileStore(tmp_path / "files").put(name, b"", "image/png")
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_write_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot write"):
        FileStore(tmp_path / "file").put("a.png", b"data", "image/png")


def test_a_data_uri_holds_its_bytes() -> None:
    data = bytes(range(256)) * 3
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    assert decode_data_uri(uri, max_bytes=len(data), label="x") == data


def test_a_folder_may_be_text_and_is_never_something_else(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path / "files"), "https://host/files/")
    assert store.put("a.png", b"data", "image/png") == "https://host/files/a.png"
    assert (tmp_path / "files" / "a.png").read_bytes() == b"data"
    with pytest.raises(ValueError, match="folder must be a path, got int"):
        FileStore(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="base_url must be a URL as text, got bytes"):
        FileStore(tmp_path, b"https://host")  # type: ignore[arg-type]
