"""Submissions that are sent again with their Idempotency-Key: one request, whatever broke off, and wherever it is sent."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from living_application import application, ask, living
from queue_parts import MemoryStorage, queued
from served_double import DoubleEngine
from serving_process import HTTP, double_server, free_port, serving, wait_ready
from test_serving_queue_upkeep import Server

from uso_engine.errors import OutputError
from uso_engine.serving.app import Application
from uso_engine.serving.auth import KeyRing
from uso_engine.serving.queue_records import QueuedRequest, QueueRecords, Submission, begun_state
from uso_engine.serving.queue_submission import submission_of
from uso_engine.serving.settings import ServerSettings

PATH = "/queue/fal-ai/uso"
SIZE = {"width": 64, "height": 64}
BODY = {"prompt": "a house", "image_size": SIZE}
KEY = {"Idempotency-Key": '"8e03978e-40d5-43dd-bc93-6894a57f9324"'}


async def identifier_of(client: httpx.AsyncClient, body: dict[str, object] | None = None, **headers: str) -> str:
    answer = await client.post(PATH, json=body or BODY, headers=headers or KEY)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["status_url"].endswith(f"{PATH}/requests/{found['request_id']}/status")
    return str(found["request_id"])


async def completed(client: httpx.AsyncClient, identifier: str) -> dict[str, object]:
    while True:
        found: dict[str, object] = (await client.get(f"{PATH}/requests/{identifier}/status")).json()
        if found["status"] == "COMPLETED":
            return found
        await asyncio.sleep(0.01)


def begun(made: Application) -> list[str]:
    engine = made.state.ready()
    assert isinstance(engine, DoubleEngine)
    return engine.begun


def test_the_same_submission_is_the_same_request(tmp_path: Path) -> None:
    made = application(tmp_path)

    async def asked(client: httpx.AsyncClient) -> None:
        first = await identifier_of(client)
        assert await identifier_of(client) == first
        assert (await completed(client, first)).get("error") is None
        # Answered, it is the same still, in whatever order its fields come.
        assert await identifier_of(client, {"image_size": SIZE, "prompt": "a house"}) == first
        seed = (await client.get(f"{PATH}/requests/{first}")).json()["seed"]
        assert isinstance(seed, int) and begun(made) == ["a house"]
        others = {first, await identifier_of(client, None, **{"Idempotency-Key": "another"})}
        for _ in range(2):
            others.add((await client.post(PATH, json=BODY)).json()["request_id"])
        assert len(others) == 4

    ask(made, asked)


def test_a_key_that_comes_with_something_else_is_refused(tmp_path: Path) -> None:
    made = application(tmp_path)

    async def asked(client: httpx.AsyncClient) -> None:
        first = await identifier_of(client)
        for path, body in ((PATH, {**BODY, "prompt": "b"}), (PATH, {**BODY, "seed": 1}), ("/queue/bytedance/uso", BODY)):
            refused = await client.post(path, json=body, headers=KEY)
            assert (refused.status_code, refused.json()["message"], refused.json()["fields"]) == (
                422,
                "The Idempotency-Key was used for another request.",
                ["Idempotency-Key"],
            )
        await completed(client, first)
        assert begun(made) == ["a house"]

    ask(made, asked)


def test_a_key_is_its_callers(tmp_path: Path) -> None:
    ring = KeyRing(None, "alice:alice-has-this-key,bob:bob-has-this-key!")
    made = application(tmp_path, ServerSettings(has_keys=True, page=False), keys=ring)

    async def asked(client: httpx.AsyncClient) -> None:
        alice, bob = ({**KEY, "Authorization": f"Key {key}"} for key in ("alice-has-this-key", "bob-has-this-key!"))
        found = [(await client.post(PATH, json=BODY, headers=one)).json()["request_id"] for one in (alice, bob, alice, bob)]
        assert found[0] == found[2] and found[1] == found[3] and found[0] != found[1]

    ask(made, asked)


@pytest.mark.parametrize("values", [[""], ["a" * 256], ["two words"], ["é"], ["a", "a"]])
def test_keys_that_are_none_are_refused(values: list[str], tmp_path: Path) -> None:
    made = application(tmp_path)

    async def asked(client: httpx.AsyncClient) -> None:
        headers = [(b"Idempotency-Key", value.encode()) for value in values]
        refused = await client.post(PATH, json=BODY, headers=headers)
        assert (refused.status_code, refused.json()["fields"]) == (400, ["Idempotency-Key"])
        assert begun(made) == []

    ask(made, asked)


def test_sent_again_it_is_neither_counted_nor_refused_by_a_full_queue(tmp_path: Path) -> None:
    made = application(tmp_path, ServerSettings(max_waiting=1, queue_width=1, page=False))

    async def asked(client: httpx.AsyncClient) -> None:
        long: dict[str, object] = {**BODY, "prompt": "steps:100000"}
        first = await identifier_of(client, long)
        assert (await client.post(PATH, json=BODY)).status_code == 429
        assert await identifier_of(client, long) == first
        await client.put(f"{PATH}/requests/{first}/cancel")
        await completed(client, first)
        assert await identifier_of(client, long) == first  # A cancelled request is the answer, too.

    ask(made, asked)


def test_many_at_once_on_two_servers_are_one_request(tmp_path: Path) -> None:
    made = [application(tmp_path), application(tmp_path)]

    async def run() -> None:
        async with asyncio.timeout(60), living(made[0]) as one, living(made[1]) as two:
            while any(each.state.phase == "loading" for each in made):
                await asyncio.sleep(0)
            found = await asyncio.gather(*(identifier_of(client) for _ in range(8) for client in (one, two)))
            assert len(set(found)) == 1
            for client in (one, two):
                await completed(client, found[0])
            assert len(begun(made[0]) + begun(made[1])) == 1

    asyncio.run(run())
    assert {path.name.partition(".")[0] for path in (tmp_path / "queue").iterdir()} == {
        json.loads(path.read_text())["id"] for path in (tmp_path / "keys").iterdir()
    }


def test_it_goes_with_its_answer(tmp_path: Path) -> None:
    records, first, second = QueueRecords(storage := MemoryStorage()), keyed(), keyed()
    for one in (first, second):
        assert records.accept(one, "server") == (one is first)
    over = begun_state(first, "server").model_copy(update={"status": "COMPLETED", "status_code": 200, "expires": 2e9})
    records.finish(first.id, over, b"answer")
    records.sweep(2e9 - 1, 60.0)
    assert records.submitted("name") is not None
    records.sweep(2e9, 60.0)
    assert storage.files == {}
    assert records.accept(second, "server")


def keyed() -> QueuedRequest:
    return queued().model_copy(update={"submission": Submission(name="name", fingerprint="what")})


class Killed(BaseException):
    """The server's end, at once."""


class DyingStorage(MemoryStorage):
    """A storage whose server is killed after so many changes."""

    def __init__(self, changes: int) -> None:
        super().__init__()
        self.changes = changes

    def _change(self) -> None:
        if not self.changes:
            raise Killed
        self.changes -= 1

    def write(self, name: str, data: bytes, content_type: str) -> None:
        self._change()
        super().write(name, data, content_type)

    def delete(self, name: str) -> None:
        self._change()
        super().delete(name)


@pytest.mark.parametrize("taken_up_first", [False, True], ids=["sent again first", "taken up first"])
def test_killed_at_any_moment_of_a_submission_it_is_one_request(taken_up_first: bool) -> None:
    """Its client does not know, and sends it again, to another server."""
    said = set[bool]()
    for changes in range(4):
        storage, first, second = DyingStorage(changes), keyed(), keyed()
        records, other = QueueRecords(storage), Server(storage, "other")
        try:
            said.add(records.accept(first, "killed"))
        except Killed:
            said.add(False)
        storage.changes = -1

        def take_up(other: Server = other) -> None:
            for _ in range(5):
                other.round(10)

        def send_again(records: QueueRecords = records, second: QueuedRequest = second, other: Server = other) -> None:
            if records.submitted("name") is None and records.accept(second, "other"):
                other.taken.append(second.id)

        for step in (take_up, send_again) if taken_up_first else (send_again, take_up):
            step()
        take_up()
        found = records.submitted("name")
        assert found is not None and other.taken == [found.id]
        assert list(records.unfinished()) == [found.id]
        assert sorted(storage.files) == sorted(
            ["keys/name.json", f"queue/{found.id}.request.json", f"queue/{found.id}.state.json", "owners/other.json"]
        )
    assert said == {False, True}


@pytest.mark.parametrize("kind", ["request", "state", "keys"])
@pytest.mark.parametrize("all_the_same", [False, True], ids=["", "written all the same"])
def test_a_submission_that_the_storage_refused_can_be_sent_again(
    kind: str, all_the_same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = application(tmp_path)
    storage = made.runner._records._storage
    failing: list[Callable[..., object]] = []

    def fail_once(method: str) -> None:
        real = getattr(storage, method)

        def fail(name: str, data: bytes, content_type: str) -> object:
            if kind in name and not failing:
                failing.append(real)
                if all_the_same:
                    real(name, data, content_type)
                raise OutputError(f"cannot write {name}")
            return real(name, data, content_type)

        monkeypatch.setattr(storage, method, fail)

    for method in ("write", "create"):
        fail_once(method)

    async def asked(client: httpx.AsyncClient) -> None:
        assert (await client.post(PATH, json=BODY, headers=KEY)).status_code == 503
        again = await identifier_of(client)
        assert await identifier_of(client) == again
        if not (kind == "keys" and all_the_same):  # Then it waits for the next round of the upkeep.
            await completed(client, again)
        assert len(storage.names("keys")) == 1
        assert {name.partition(".")[0] for name in storage.names("queue")} == {again}

    ask(made, asked)


def test_a_submission_is_known_after_kill_9_and_is_computed_once(tmp_path: Path) -> None:
    port = free_port()
    command = double_server(tmp_path, port, "queue_width=1")
    with serving(command, tmp_path / "first") as served:
        wait_ready(served)
        url = f"{served.url}{PATH}"
        first = HTTP.post(url, json=BODY, headers=KEY).json()["request_id"]
        served.end(signal.SIGKILL)
    with serving(command, tmp_path / "second") as served:
        assert HTTP.post(url, json=BODY, headers=KEY).json()["request_id"] == first
        assert HTTP.post(url, json={**BODY, "seed": 3}, headers=KEY).status_code == 422
        with HTTP.stream("GET", f"{url}/requests/{first}/status/stream") as events:
            assert "COMPLETED" in "".join(events.iter_lines())
    assert len(list((tmp_path / "storage" / "queue").iterdir())) == 2  # Its state and its answer.


def test_a_key_that_leads_nowhere_is_made_anew(tmp_path: Path) -> None:
    """Whoever tidies the queue up by hand may leave it."""
    made = application(tmp_path)

    async def asked(client: httpx.AsyncClient) -> None:
        first = await identifier_of(client)
        await completed(client, first)
        for path in (tmp_path / "queue").iterdir():
            path.unlink()
        second = await identifier_of(client)
        assert second != first
        assert (await completed(client, second)).get("error") is None

    ask(made, asked)


def test_what_makes_a_submission() -> None:
    one = submission_of("key", "alice", "fal-ai/uso", {"a": 1, "b": [2]})
    assert one == submission_of("key", "alice", "fal-ai/uso", {"b": [2], "a": 1})
    assert one.name not in {submission_of("key", "bob", "m", {}).name, submission_of("other", "alice", "m", {}).name}
    for model, fields in (("other/uso", {"a": 1, "b": [2]}), ("fal-ai/uso", {"a": 1}), ("fal-ai/uso", {"a": "1", "b": [2]})):
        other = submission_of("key", "alice", model, fields)
        assert other.name == one.name and other.fingerprint != one.fingerprint
