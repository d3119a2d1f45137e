"""A storage in a folder, and what becomes of it: unmounted, read-only, without hard links, its writers killed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from uso_engine.errors import OutputError
from uso_engine.serving.storage import FolderStorage, open_storage


def test_where_a_file_system_has_no_hard_links_one_process_creates_a_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*names: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    storage = open_storage(tmp_path.as_uri())
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda place: storage.create("keys/a.json", b"%d" % place, "application/json"), range(8)))
    assert sum(made) == 1 and storage.read("keys/a.json") == b"%d" % made.index(True)
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["a.json"]


def test_a_folder_that_is_removed_under_a_server_is_not_made_anew(tmp_path: Path) -> None:
    """Unmounted, it would take what is written and hide it once it is there again."""
    kept = FolderStorage(tmp_path / "mounted")
    kept.write("files/a.png", b"image", "image/png")
    (tmp_path / "mounted").rename(tmp_path / "elsewhere")
    for there in (False, True):
        if there:
            (tmp_path / "mounted").mkdir()
        with pytest.raises(OutputError, match="was removed, or is another one"):
            kept.write("files/b.png", b"image", "image/png")
        with pytest.raises(OutputError, match="was removed, or is another one"):
            kept.read("files/a.png")
        with pytest.raises(OutputError, match="was removed, or is another one"):
            kept.names("files")
        assert (tmp_path / "mounted").exists() == there
    (tmp_path / "mounted").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "mounted")
    kept.write("files/b.png", b"image", "image/png")
    assert kept.names("files") == ["a.png", "b.png"]
    (tmp_path / "mounted" / ".writable").unlink()  # As what removes old files may.
    kept.write("files/c.png", b"image", "image/png")
    shutil.copytree(tmp_path / "mounted", tmp_path / "mounted anew")
    shutil.rmtree(tmp_path / "mounted")
    (tmp_path / "mounted anew" / ".writable").touch()
    (tmp_path / "mounted anew").rename(tmp_path / "mounted")
    kept.write("files/d.png", b"image", "image/png")
    assert kept.names("files") == ["a.png", "b.png", "c.png", "d.png"]


def test_what_a_killed_writer_left_is_never_seen_and_removed(tmp_path: Path) -> None:
    storage = open_storage(tmp_path.as_uri())
    script = """
import os, signal, sys
import uso_engine.imaging.atomic as atomic
from uso_engine.serving.storage import open_storage
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
keep = lambda path, data: atomic.write_atomically(path, data) if data else path.parent.mkdir(exist_ok=True)
open_storage.__globals__["write_atomically"] = keep
open_storage(sys.argv[1]).write("files/a.png", b"half of it", "image/png")
"""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", script, tmp_path.as_uri()], env=variables, check=False)
    assert ended.returncode == -signal.SIGKILL
    (part,) = (tmp_path / "files").iterdir()
    assert part.read_bytes() == b"half of it"
    assert storage.names("files") == [] and part.exists()
    with pytest.raises(ValueError, match="is not a name"):
        storage.read(f"files/{part.name}")
    os.utime(part, (0, 0))
    assert storage.names("files") == [] and not part.exists()
    mark = tmp_path / "..writable.0123abcd.part"
    mark.touch()
    assert open_storage(tmp_path.as_uri()).names("files") == [] and mark.exists()
    os.utime(mark, (0, 0))
    open_storage(tmp_path.as_uri())
    assert not mark.exists()


def test_what_is_being_written_stays_whatever_this_machines_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system of another machine has that one's clock."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7200)
    storage = open_storage(tmp_path.as_uri())
    storage.write("files/a.png", b"image", "image/png")
    part = tmp_path / "files" / ".b.png.0123abcd.part"
    part.touch()
    assert storage.names("files") == ["a.png"] and part.exists()
    monkeypatch.setattr(time, "time", lambda: now - 7200)
    os.utime(part, (now - 3700, now - 3700))
    assert storage.names("files") == ["a.png"] and not part.exists()


def test_what_is_being_written_stays_though_the_file_systems_clock_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path.as_uri())
    storage.write("files/a.png", b"image", "image/png")
    back = [7200.0]
    real = Path.stat

    def stat(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        found = real(path, follow_symlinks=follow_symlinks)
        values = list(found)
        values[8] = int(found.st_mtime - back[0])
        return os.stat_result(values)

    monkeypatch.setattr(Path, "stat", stat)
    part, abandoned = (tmp_path / "files" / f".b.png.{digits}.part" for digits in ("0123abcd", "4567abcd"))
    for path in (part, abandoned):
        path.touch()
    os.utime(abandoned, (time.time() - 3700, time.time() - 3700))
    assert storage.names("files") == ["a.png"] and part.exists() and not abandoned.exists()


def test_what_a_killed_writer_left_hides_nothing_where_it_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = open_storage(tmp_path.as_uri())
    storage.write("files/a.png", b"image", "image/png")
    part = tmp_path / "files" / ".b.png.0123abcd.part"
    part.touch()
    os.utime(part, (0, 0))

    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    assert storage.names("files") == ["a.png"]
    assert "cannot be removed: Read-only file system" in caplog.text
