"""Leases of servers: names that are one's alone, who has ended, who takes up what is left, and what is removed of the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from queue_parts import MemoryStorage

from uso_engine.serving.leases import Leases, server_name
from uso_engine.serving.process_mark import ProcessMark, has_certainly_ended, this_process
from uso_engine.serving.queue_records import new_id
from uso_engine.serving.storage import FolderStorage

LEASE_S = 30.0
linux = pytest.mark.skipif(this_process() is None, reason="this kernel does not say which process is which")


class Watch:
    """A watch that a test moves on."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def mark(**changed: object) -> ProcessMark:
    here = this_process()
    assert here is not None
    return here.model_copy(update=changed)


def leases_of(storage: MemoryStorage, owner: str, process: ProcessMark | None = None) -> Leases:
    """A server's leases; its process is what a test says."""
    made = Leases(storage, owner, LEASE_S, clock=lambda: 1_800_000_000.0)
    made._process = process
    return made


def test_no_two_starts_of_a_server_have_one_name() -> None:
    names = {server_name("a.b/c", 80) for _ in range(100)}
    assert len(names) == 100 and all(name.startswith("a-b-c-80-") for name in names)
    assert len(server_name("x" * 300, 65535)) < 150


@linux
def test_a_killed_process_has_ended_at_once_and_a_living_one_has_not(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    script = """
import sys
from pathlib import Path
from uso_engine.serving.leases import Leases
from uso_engine.serving.storage import FolderStorage
Leases(FolderStorage(Path(sys.argv[1])), "other", 30.0).renew(takes_up=True)
print("said", flush=True)
sys.stdin.read()
"""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdin=pipe, stdout=pipe, env=variables) as process:
        assert process.stdout is not None and process.stdout.readline() == b"said\n"
        assert not Leases(storage, "looking", LEASE_S).has_ended("other")
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # Its parent has not asked for it yet.
        assert Leases(storage, "looking", LEASE_S).has_ended("other")
        process.wait()
    assert Leases(storage, "restarted", LEASE_S).has_ended("other")


@linux
def test_a_process_has_ended_only_where_that_can_be_seen() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert has_certainly_ended(mark(pid=gone.pid)) and not has_certainly_ended(mark())
    assert has_certainly_ended(mark(started=1)), "its number is another process's now"
    assert not has_certainly_ended(mark(pid=1, started=mark_of_one()))
    for elsewhere in ({"host": "other"}, {"boot": "other"}, {"namespace": "pid:[1]"}):
        assert not has_certainly_ended(mark(pid=gone.pid, **elsewhere))


def mark_of_one() -> int:
    return int(Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19])


@linux
def test_who_seemed_gone_and_says_more_is_alive() -> None:
    """As a copy of a machine with its memory, whose kernel says that it is the same one."""
    storage, watch = MemoryStorage(), Watch()
    copied = leases_of(storage, "copied", mark(pid=2**22 + 1))
    looking = Leases(storage, "looking", LEASE_S, watch=watch)
    copied.renew(takes_up=True)
    assert looking.has_ended("copied")
    copied.renew(takes_up=True)
    assert not looking.has_ended("copied")
    watch.now_s += LEASE_S
    assert looking.has_ended("copied")


def test_what_cannot_be_read_lives_while_it_changes() -> None:
    """A server of another version; it takes up nothing, as far as this one knows."""
    storage, watch = MemoryStorage(), Watch()
    looking = Leases(storage, "looking", LEASE_S, watch=watch)
    for text in (b'{"until": 1}', b"", b'{"until": 2}'):
        storage.files["owners/other.json"] = text
        assert not looking.has_ended("other")
        assert looking.chosen()(new_id())
        watch.now_s += LEASE_S - 1
    assert not looking.has_ended("other")
    watch.now_s += 1
    assert looking.has_ended("other")


def test_each_request_is_one_servers_alone_and_all_have_some() -> None:
    storage = MemoryStorage()
    servers = [leases_of(storage, server_name("vm", 8000)) for _ in range(3)]
    ending = leases_of(storage, "ending")
    for one in servers:
        one.renew(takes_up=True)
    ending.renew(takes_up=False)
    identifiers = [new_id() for _ in range(300)]
    chosen = [one.chosen() for one in servers]
    takers = [[place for place, takes in enumerate(chosen) if takes(identifier)] for identifier in identifiers]
    assert all(len(places) == 1 for places in takers)
    assert min(Counter(places[0] for places in takers).values()) > 50 and len(set(map(tuple, takers))) == 3
    servers[0].leave()
    left = [one.chosen() for one in servers[1:]]
    for identifier, (before,) in zip(identifiers, takers, strict=True):
        now = [place + 1 for place, takes in enumerate(left) if takes(identifier)]
        assert now == [before] if before else len(now) == 1  # Nobody else's are passed on.


def test_leases_of_the_dead_are_removed_and_the_living_keep_theirs() -> None:
    storage, watch = MemoryStorage(), Watch()
    looking = Leases(storage, "looking", LEASE_S, watch=watch)
    alive, dead, killed = leases_of(storage, "alive"), leases_of(storage, "dead"), leases_of(storage, "killed")
    if this_process() is not None:
        killed._process = mark(pid=2**22 + 1)
    for one in (looking, alive, dead, killed):
        one.renew(takes_up=True)
    looking.remove_ended()
    kept = {"owners/looking.json", "owners/alive.json", "owners/dead.json"}
    assert set(storage.files) == kept | (set() if this_process() else {"owners/killed.json"})
    storage.files.pop("owners/killed.json", None)
    for _ in range(9):
        watch.now_s += LEASE_S
        alive.renew(takes_up=True)
        looking.remove_ended()
        assert set(storage.files) == kept
    watch.now_s += LEASE_S
    alive.renew(takes_up=True)
    looking.remove_ended()
    assert set(storage.files) == {"owners/looking.json", "owners/alive.json"}
    dead.renew(takes_up=True)  # It was held up for that long.
    assert not looking.has_ended("dead")


def test_a_clock_that_is_far_off_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    storage = MemoryStorage()
    ahead = Leases(storage, "ahead", LEASE_S, clock=lambda: 1_800_003_600.0)
    looking = leases_of(storage, "looking")
    for _ in range(3):
        ahead.renew(takes_up=True)
        looking.has_ended("ahead")
    (record,) = caplog.records
    assert "the clock of server ahead is 360" in record.getMessage() and "s ahead of this one's" in record.getMessage()
    ahead.leave()
    looking.remove_ended()
    assert not looking._apart and not looking._seen  # Names are never used again: kept, they would become many.
    caplog.clear()
    near = leases_of(storage, "near")
    for _ in range(3):
        near.renew(takes_up=True)
        looking.has_ended("near")
    assert not caplog.records
