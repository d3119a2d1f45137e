"""Keys and limits of callers: how they are read, what is refused, reading again, rates under a clock of the test's own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import uso_engine.cli.serve  # noqa: F401  adds its commands
from uso_engine.cli.app import app
from uso_engine.errors import ConfigError
from uso_engine.serving.auth import Key, KeyRing, new_key, parse_key
from uso_engine.serving.rate_limit import CallerLimits
from uso_engine.serving.refusal import Refusal
from uso_engine.serving.settings import RequestBounds, ServerSettings, Transport, default_storage

ALICE, BOB = "alice-has-this-key", "bob-has-this-key!"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_keys_open_by_value_or_by_hash(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    hashed = hashlib.sha256(BOB.encode()).hexdigest()
    file.write_text(f"# who may\n\nalice:{ALICE} requests_per_minute=30 concurrent=2\n bob:sha256:{hashed}\n")
    ring = KeyRing(file, "carol:carol-has-this-key")
    found = ring.identify(ALICE)
    assert found is not None and (found.name, found.requests_per_minute, found.concurrent) == ("alice", 30, 2)
    assert [one and one.name for one in map(ring.identify, (BOB, "carol-has-this-key"))] == ["bob", "carol"]
    for wrong in ("", ALICE[:-1], ALICE + " ", hashed, f"sha256:{hashed}", "\udcff"):
        assert ring.identify(wrong) is None
    assert ALICE not in repr(ring.__dict__)


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return one == other

    monkeypatch.setattr("uso_engine.serving.auth.hmac.compare_digest", compare)
    ring = KeyRing(None, f"alice:{ALICE},bob:{BOB}")
    for presented in (ALICE, BOB, "neither of the two"):
        compared.clear()
        ring.identify(presented)
        assert len(compared) == 2


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "at least one line name:key"),
        ("# nothing", "at least one line name:key"),
        (ALICE, "line 1: expected name:key"),
        ("al ice:x", "line 1: expected name:key"),
        ("alice:short", "must have 16 to 512 printable ASCII characters, got 5"),
        ("alice:sha256:abc", "expected sha256: and 64 hexadecimal digits for alice, got 3 characters"),
        (f"alice:{ALICE}\nalice:{BOB}", "expected every name once, got that of alice more than once"),
        (f"alice:{ALICE}\nbob:{ALICE}", "expected every key once"),
        (f"alice:{ALICE} rate=3", "got 'rate'"),
        (f"alice:{ALICE} concurrent=0", "got 'concurrent'"),
    ],
)
def test_files_that_cannot_be_used_say_where_and_no_key(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        KeyRing(file, None)
    assert part in str(error.value) and ALICE not in str(error.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyRing(tmp_path / "missing", None)
    file.write_text(f"alice:{ALICE}\n")
    with pytest.raises(ConfigError, match="alice are keys of USO_API_KEYS as well"):
        KeyRing(file, f"alice:{BOB}")


def test_a_file_that_changes_is_read_again_and_a_broken_one_is_not(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys", Clock()
    file.write_text(f"alice:{ALICE}\n")
    ring = KeyRing(file, None, clock)
    file.write_text(f"bob:{BOB}\n")
    assert ring.identify(BOB) is None  # It is looked at once a second.
    clock.now = 2.0
    assert ring.identify(BOB) is not None and ring.identify(ALICE) is None
    for broken in ("", "bob:short\n"):
        file.write_text(broken)
        clock.now += 2.0
        assert ring.names == ("bob",) and ring.identify(BOB) is not None
    file.unlink()
    clock.now += 2.0
    assert ring.identify(BOB) is not None


def test_a_new_key_opens(tmp_path: Path) -> None:
    key, line = new_key("alice")
    assert KeyRing(None, line).identify(key) is not None and key not in line
    shown = CliRunner().invoke(app, ["new-key", "alice"])
    first, second = shown.stdout.split("\n")[:2]
    assert (
        parse_key(second.removeprefix("line: "), "x").digest == hashlib.sha256(first.removeprefix("key:  ").encode()).digest()
    )
    assert CliRunner().invoke(app, ["new-key", "a b"]).exit_code == 1


def test_rates_are_a_bucket_that_fills(tmp_path: Path) -> None:
    clock = Clock()
    limits = CallerLimits(4, None, clock)
    alice, bob = Key("alice", b"a"), Key("bob", b"b", requests_per_minute=60)
    for _ in range(4):
        limits.admit(alice)
    with pytest.raises(Refusal) as refused:
        limits.admit(alice)
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "15")
    clock.now = 15.0
    limits.admit(alice)
    with pytest.raises(Refusal):
        limits.admit(alice)
    for _ in range(60):
        limits.admit(bob)
    clock.now = 1e6
    for _ in range(4):
        limits.admit(alice)
    with pytest.raises(Refusal):
        limits.admit(alice)


def test_requests_at_once_are_counted_until_they_end() -> None:
    limits = CallerLimits(None, 1)
    alice, bob = Key("alice", b"a"), Key("bob", b"b", concurrent=2)
    with limits.running(alice):
        with pytest.raises(Refusal, match="at once"), limits.running(alice):
            raise AssertionError
        with limits.running(bob), limits.running(bob):
            pass
    with limits.running(alice):
        pass


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: ServerSettings(host="0.0.0.0"), "no keys are configured"),
        (lambda: ServerSettings(host="::"), "no keys are configured"),
        (lambda: ServerSettings(host="uso.example"), "no keys are configured"),
        (lambda: ServerSettings(public_url="uso.example"), "public_url must be an http(s) URL"),
        (lambda: ServerSettings(drain_s=0), "drain_s must be positive, got 0"),
        (lambda: RequestBounds(max_steps=51), "max_steps must be from 1 to 50, got 51"),
        (lambda: RequestBounds(deadline_s=0), "deadline_s must be positive, got 0"),
        (lambda: Transport(max_body_bytes=0), "max_body_bytes must be positive, got 0"),
        (lambda: Transport(max_held_bytes=1), "is less than one body may have"),
    ],
)
def test_settings_that_cannot_be_used(make: object, part: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=part.replace("(", r"\(").replace(")", r"\)")):
        make()


def test_settings_that_can() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        ServerSettings(host=host)
    ServerSettings(host="0.0.0.0", has_keys=True)
    ServerSettings(host="0.0.0.0", allow_anonymous=True)
    assert default_storage(None, Path("/home/a")) == "file:///home/a/.local/state/uso-engine/storage"
    assert default_storage("/state", Path("/home/a")) == "file:///state/uso-engine/storage"
