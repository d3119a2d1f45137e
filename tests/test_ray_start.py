"""Starting on Ray: clusters that are not there, rooms that are too small, Ray's errors. Needs Ray, but starts none."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from uso_engine.config import load_config
from uso_engine.errors import ConfigError, EngineDeadError, QueueFullError, USOError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'uso-engine[ray]' (310 MB)")

from uso_engine.serving.ray import start  # noqa: E402
from uso_engine.serving.ray.application import application, build  # noqa: E402
from uso_engine.serving.ray.arguments import read_arguments  # noqa: E402
from uso_engine.serving.ray.autoscaling import WorkScaling  # noqa: E402
from uso_engine.serving.ray.demand import Demand  # noqa: E402
from uso_engine.serving.ray.ingress import sender  # noqa: E402
from uso_engine.serving.ray.messages import Order, Taken  # noqa: E402
from uso_engine.serving.ray.remote_engine import ReplicaLostError  # noqa: E402
from uso_engine.serving.settings import ServerSettings  # noqa: E402

CONFIG = load_config("uso-tiny")
BASE: dict[str, Any] = {"config": "uso-tiny", "storage": "file:///tmp/none"}


ORDER = Order(Demand("1", 1), "me", {})


class Response:
    """What Ray gives for a call.

    Args:
        messages: it gives.
        error: it raises then.
    """

    def __init__(self, messages: list[object], error: Exception | None) -> None:
        self._messages, self._error, self.cancelled = messages, error, 0

    async def __aiter__(self) -> AsyncIterator[object]:
        for message in self._messages:
            yield message
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        self.cancelled += 1

    def handle(self) -> SimpleNamespace:
        made = SimpleNamespace(run=SimpleNamespace(remote=lambda order: self))
        made.options = lambda **_: made
        return made


def test_a_cluster_that_is_not_there_is_named_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(USOError, match=f"cannot reach a Ray cluster at {address}: Connection refused"):
            start.connect(address)


@pytest.mark.parametrize("address", ["cluster", "ray://head:10001/x", ":6379", "head:port"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(USOError, match="HOST:PORT or auto"):
        start.connect(address)


def test_whatever_ray_says_when_it_cannot_be_joined_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(USOError, match="cannot join the Ray cluster 'auto': Could not find any running"):
        start.connect("auto")
    with pytest.raises(USOError, match="cannot start Ray on this machine: Could not"):
        start.connect(None)


@pytest.mark.parametrize(
    ("there", "replicas", "said"),
    [
        ({"CPU": 64.0}, {"least": 2, "most": 4}, "2 replicas need 2 GPUs, and the cluster has 0"),
        ({"CPU": 64.0, "GPU": 1.0}, {"least": 2, "most": 2, "gpus": 0.6}, r"2 replicas need 1\.2 GPUs, and the cluster has 1"),
        ({"CPU": 1.0, "GPU": 8.0}, {"least": 2, "most": 2}, "2 replicas need 2 CPUs, and the cluster has 1"),
    ],
)
def test_a_cluster_without_room_is_said_before_anybody_waits(
    there: dict[str, float],
    replicas: dict[str, float],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    with pytest.raises(USOError, match=said):
        start.check_room(read_arguments({**BASE, "replicas": replicas}), CONFIG, may_grow=False)
    start.check_room(read_arguments({**BASE, "replicas": replicas}), CONFIG, may_grow=True)
    assert "waiting for it to grow" in caplog.text


def test_room_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    start.check_room(read_arguments({**BASE, "replicas": {"least": 2, "most": 9, "gpus": 0.5}}), CONFIG, may_grow=False)


def test_a_free_port_is_no_port_for_ray() -> None:
    with pytest.raises(USOError, match="give --port another number than 0"):
        start.serve_on_ray(read_arguments({**BASE, "server": {"port": 0}}), CONFIG, has_keys=False)


def test_an_application_is_built_without_a_cluster() -> None:
    made = application(read_arguments({**BASE, "replicas": {"least": 2, "most": 5}}), CONFIG)
    assert made._bound_deployment.name == "ingress"
    most = ServerSettings().transport.max_connections
    bounds = made._bound_deployment._deployment_config
    assert bounds.max_queued_requests >= bounds.max_ongoing_requests > most  # What is more is refused by the ingress itself.


@pytest.mark.parametrize("name", ["one-machine", "cluster", "uso-tiny"])
def test_configuration_files_build_their_applications(name: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = yaml.safe_load((repository / "configs" / "ray" / f"{name}.yaml").read_text())
    (one,) = document["applications"]
    if one["args"].get("server", {}).get("host") == "0.0.0.0":
        monkeypatch.delenv("USO_API_KEYS", raising=False)
        with pytest.raises(ConfigError, match="no keys are configured"):
            build(one["args"])
        monkeypatch.setenv("USO_API_KEYS", "me:secret")
    deployed = build(one["args"])._bound_deployment
    assert deployed.name == "ingress"
    engines = deployed.init_args[2]._bound_deployment
    scaling = engines._deployment_config.autoscaling_config
    wanted = one["args"]["replicas"]
    assert (scaling.min_replicas, scaling.max_replicas) == (wanted["least"], wanted["most"])
    assert engines.ray_actor_options["num_gpus"] == (0 if name == "uso-tiny" else 1)


def test_the_autoscaler_reads_what_replicas_record() -> None:
    def context(waiting: dict[str, float], busy: dict[str, float], replicas: int) -> SimpleNamespace:
        return SimpleNamespace(
            aggregated_metrics={"waiting_s": waiting, "busy": busy},
            current_num_replicas=replicas,
            total_queued_requests=0,
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=8,
        )

    scaling = WorkScaling(queue_s=10.0, busy=0.7)
    assert scaling(context({"a": 35.0, "b": 30.0}, {"a": 1.0, "b": 1.0}, 2)) == (7, {})
    assert scaling(context({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.2}, 2)) == (1, {})
    assert scaling(SimpleNamespace(**{**vars(context({}, {}, 3)), "aggregated_metrics": None})) == (1, {})


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (lambda: ray.exceptions.ActorDiedError(), ReplicaLostError),
        (lambda: ray.exceptions.WorkerCrashedError(), ReplicaLostError),
        (lambda: ray.exceptions.ActorUnavailableError("away", b"0" * 16), ReplicaLostError),
        (lambda: ray.serve.exceptions.BackPressureError(4, 4), QueueFullError),
        (lambda: ray.serve.exceptions.DeploymentUnavailableError("engines"), EngineDeadError),
    ],
)
def test_rays_errors_are_the_engines(raised: Callable[[], Exception], expected: type[Exception]) -> None:
    response = Response([Taken("a", "b")], raised())

    async def read() -> list[object]:
        async with sender(response.handle(), 4)(ORDER) as messages:
            return [message async for message in messages]

    with pytest.raises(expected):
        asyncio.run(read())
    # Ray raises once more where a call that has failed is cancelled.
    assert response.cancelled == 0


def test_a_call_that_is_left_is_cancelled_and_one_that_is_done_is_not() -> None:
    async def leave(response: Response, count: int) -> None:
        async with sender(response.handle(), 4)(ORDER) as messages:
            for _ in range(count):
                await anext(messages)
            if count == 1:
                raise asyncio.CancelledError

    left, whole = (Response([Taken("a", "b"), Taken("c", "d")], None) for _ in range(2))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(leave(left, 1))
    asyncio.run(leave(whole, 2))
    assert (left.cancelled, whole.cancelled) == (1, 0)
