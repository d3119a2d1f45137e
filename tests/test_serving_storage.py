"""Where images are kept: names, expiry, whole or not at all; in a folder and in a real S3 server's bucket."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import httpx
import pytest
from living_application import BODY, PATH, application, ask
from serving_process import HTTP, double_server, free_port, serving, wait_ready

from uso_engine.errors import ConfigError, OutputError
from uso_engine.serving.files import ImageFiles, RequestStore
from uso_engine.serving.queue_records import QueueRecords, QueueState, accepted_at, is_identifier, new_id
from uso_engine.serving.storage import FolderStorage, S3Storage, Storage, open_storage

BUCKET = "pictures"
NAME = "0123456789abcdef" * 2 + ".png"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A bucket on an S3 server of its own process; the variables that lead there."""
    port = free_port()
    log = (tmp_path_factory.mktemp("s3") / "log").open("wb")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        client = boto3.client(
            "s3",
            endpoint_url=variables["AWS_ENDPOINT_URL"],
            aws_access_key_id="a",
            aws_secret_access_key="b",
            region_name="us-east-1",
            config=boto3.session.Config(retries={"max_attempts": 60, "mode": "standard"}),
        )
        client.create_bucket(Bucket=BUCKET)
        yield variables
    finally:
        process.kill()
        process.wait()
        log.close()


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "folder":
        return open_storage(tmp_path.as_uri())
    for name, value in request.getfixturevalue("s3").items():
        monkeypatch.setenv(name, value)
    return open_storage(f"s3://{BUCKET}/{tmp_path.name}")


def test_files_come_back_and_go(storage: Storage) -> None:
    assert storage.names("files") == []
    storage.write("files/b.png", b"two", "image/png")
    storage.write("files/a.png", b"", "image/png")
    storage.write("files/b.png", b"second", "image/png")
    assert storage.names("files") == ["a.png", "b.png"]
    assert (storage.read("files/a.png"), storage.read("files/b.png")) == (b"", b"second")
    storage.delete("files/a.png")
    storage.delete("files/a.png")
    with pytest.raises(FileNotFoundError):
        storage.read("files/a.png")


def test_of_all_who_create_a_file_one_does(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda place: storage.create("keys/a.json", b"%d" % place, "application/json"), range(8)))
    assert sum(made) == 1
    assert storage.read("keys/a.json") == b"%d" % made.index(True) and storage.names("keys") == ["a.json"]
    assert not storage.create("keys/a.json", b"late", "application/json")
    storage.delete("keys/a.json")
    assert storage.create("keys/a.json", b"again", "application/json") and storage.read("keys/a.json") == b"again"


@pytest.mark.parametrize(
    "number", [errno.EINVAL, errno.EIO, errno.ENOSYS, 0], ids=["refused", "conflict", "unknown", "passed over"]
)
def test_a_store_with_other_words_for_conditions_creates_a_file_once(
    number: int, s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says in words of its own that there is such a file, or knows no conditional writes."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    storage = open_storage(f"s3://{BUCKET}/{tmp_path.name}")
    assert isinstance(storage, S3Storage)
    real = storage._files.pipe_file

    def other_words(path: str, data: bytes, mode: str = "overwrite", **named: str) -> None:
        if mode == "create" and number:
            raise OSError(number, "not that way")
        real(path, data, **named)

    monkeypatch.setattr(storage._files, "pipe_file", other_words)
    if number in (errno.ENOSYS, 0):
        assert storage.create("keys/a.json", b"first", "application/json")
    else:
        with pytest.raises(OutputError, match=r"cannot store keys/a\.json: OSError"):
            storage.create("keys/a.json", b"first", "application/json")
        storage.write("keys/a.json", b"first", "application/json")
    assert not storage.create("keys/a.json", b"second", "application/json")
    assert storage.read("keys/a.json") == b"first"


def test_no_name_leads_elsewhere(storage: Storage) -> None:
    for name in ("a.png", "/files/a", "files/../a", "files/.hidden", "files/a/b", "files/", "files/a\n", "../x/a"):
        with pytest.raises(ValueError, match="is not a name in the storage"):
            storage.write(name, b"", "image/png")
        with pytest.raises(ValueError, match="is not a name in the storage"):
            storage.read(name)


def test_images_expire_by_their_names(storage: Storage) -> None:
    now = [1_800_000_000.0]
    files = ImageFiles(storage, 60, clock=lambda: now[0])
    url = RequestStore(files, "https://host.example").put(NAME, b"image", "image/png")
    name = url.removeprefix("https://host.example/files/")
    assert re.fullmatch(rf"[0-9a-f]{{8}}-{NAME}", name)
    found = files.find(name)
    assert found is not None and (found.data, found.content_type, found.seconds_left) == (b"image", "image/png", 60)
    assert files.sweep() == 0
    for other in (name.replace("-0", "-1"), "f" + name[1:], name + "x", "../files/" + name, ""):
        assert files.find(other) is None
    now[0] += 61
    assert files.find(name) is None
    assert files.sweep() == 1 and storage.names("files") == []


class StubbornStorage(FolderStorage):
    """Keeps one file; of the next it fails, and from then on nothing can be removed if a test says so."""

    removes = True

    def write(self, name: str, data: bytes, content_type: str) -> None:
        super().write(name, data, content_type)
        if len(self.names("files")) > 1:
            raise OutputError(f"cannot write {name}")

    def delete(self, name: str) -> None:
        if not self.removes:
            raise OutputError(f"cannot remove {name}") from OSError(30, "Read-only file system", name)
        super().delete(name)


@pytest.mark.parametrize("removes", [True, False])
def test_an_answer_that_fails_half_way_leaves_no_images(
    removes: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is told of the first image where the second could not be stored, nor of the second where it was after all."""
    made, storage = application(tmp_path), StubbornStorage(tmp_path)
    made.runner._service.files._storage = storage
    storage.removes = removes

    async def asked(client: httpx.AsyncClient) -> None:
        answer = await client.post(PATH, json={**BODY, "num_images": 2})
        assert answer.status_code == 503

    ask(made, asked)
    names = storage.names("files")
    assert len(names) == (0 if removes else 2)
    said = [record.getMessage() for record in caplog.records if "nobody was told of" in record.getMessage()]
    assert said == ["an image that nobody was told of could not be removed and will expire: Read-only file system"] * len(names)


def test_queue_records_come_back(storage: Storage) -> None:
    records, identifier = QueueRecords(storage), new_id()
    # The version's digit; the digits of the time before it may begin with a 7, too.
    assert is_identifier(identifier) and not is_identifier(f"{identifier[:14]}4{identifier[15:]}")
    assert records.state(identifier) is None and records.unfinished() == {}
    records.put_state(identifier, QueueState(key="k", model="m", owner="o", status="COMPLETED", expires=10.0))
    records.ask_to_cancel(identifier)
    records.sweep(accepted_at(identifier) + 1, 5)
    assert records.state(identifier) is not None
    records.sweep(accepted_at(identifier) + 6, 5)
    assert records.state(identifier) is None and storage.names("queue") == []
    storage.write(f"queue/{identifier}.state.json", b"{broken", "application/json")
    assert records.state(identifier) is None


def test_identifiers_sort_by_time() -> None:
    assert abs(accepted_at(new_id()) - accepted_at(new_id())) < 60


def test_a_folder_has_no_signed_urls_and_has_to_be_writable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="signed URLs need storage in s3"):
        ImageFiles(open_storage(tmp_path.as_uri()), 60, signed_urls=True)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be written to"):
        FolderStorage(tmp_path / "file")
    broken = FolderStorage(tmp_path / "folder")
    (tmp_path / "folder" / "files").write_bytes(b"")
    with pytest.raises(OutputError):
        broken.write("files/a.png", b"", "image/png")
    for read in (lambda: broken.names("files"), lambda: broken.read("files/a.png"), lambda: broken.delete("files/a.png")):
        with pytest.raises(OutputError):
            read()


def test_a_folder_that_is_made_is_its_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0o022)
    try:
        kept = open_storage("file://~/state/kept%20here")
        kept.write("files/a.png", b"image", "image/png")
        assert (tmp_path / "state" / "kept here" / "files" / "a.png").read_bytes() == b"image"
        assert stat.S_IMODE((tmp_path / "state" / "kept here").stat().st_mode) == 0o700
        assert not caplog.records
        (tmp_path / "everybodys").mkdir()
        (tmp_path / "everybodys").chmod(0o777)
        open_storage((tmp_path / "everybodys").as_uri()).write("files/a.png", b"image", "image/png")
    finally:
        os.umask(before)
    (record,) = caplog.records
    assert "everybodys can be changed by every user of this machine" in record.getMessage()


@pytest.mark.parametrize(
    "url", ["", "pictures", "http://host/x", "s3://", "file:relative", "file://host/x", "file://~", "gs://bucket"]
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="storage must be file:///folder, file://~/folder or s3://bucket/prefix"):
        open_storage(url)


def test_a_bucket_that_is_not_there_is_found_at_once(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="s3://nowhere cannot be written to"):
        open_storage("s3://nowhere")


def test_a_home_that_is_not_known_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(ConfigError, match=r"file://~/state is in this user's home, which is not known; set HOME"):
        open_storage("file://~/state")


def test_images_of_a_server_with_a_bucket(s3: dict[str, str], tmp_path: Path) -> None:
    size = {"width": 64, "height": 64}
    body = {"model": "bytedance/uso", "prompt": "", "image_urls": [], "image_size": size}
    storage = f"s3://{BUCKET}/{tmp_path.name}"
    commands = [double_server(tmp_path, 0, *more, storage=storage) for more in ((), ("signed_urls=1",))]
    with serving(commands[0], tmp_path / "a", **s3) as served, serving(commands[1], tmp_path / "b", **s3) as signing:
        wait_ready(served)
        wait_ready(signing)
        url = HTTP.post(f"{served.url}/v1/images/generations", json=body).json()["images"][0]["url"]
        # Every server that shares the store has it.
        for address in (url, url.replace(served.url, signing.url)):
            found = HTTP.get(address)
            assert (found.status_code, found.headers["content-type"]) == (200, "image/png")
        signed = HTTP.post(f"{signing.url}/v1/images/generations", json=body).json()["images"][0]["url"]
        assert signed.startswith(s3["AWS_ENDPOINT_URL"]) and "Signature=" in signed
        with urllib.request.urlopen(signed, timeout=30) as answer:
            assert answer.headers["Content-Type"] == "image/png" and answer.read().startswith(b"\x89PNG")
        ticket = HTTP.post(f"{served.url}/queue/fal-ai/uso", json={"prompt": "", "image_size": size}).json()
        with HTTP.stream("GET", f"{ticket['status_url'].replace(served.url, signing.url)}/stream") as events:
            assert "COMPLETED" in "".join(events.iter_lines())
