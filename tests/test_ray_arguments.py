"""What an application on Ray is built from, and what is refused with which words. Without Ray."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import command_line
import pytest
import yaml

from uso_engine.config import list_configs, load_config
from uso_engine.errors import ConfigError
from uso_engine.serving.engine_opening import EngineOptions
from uso_engine.serving.ray.arguments import (
    ReplicaArguments,
    application_arguments,
    ingress_bounds,
    read_arguments,
    server_settings,
)
from uso_engine.serving.settings import RequestBounds, ServerSettings, Transport

BASE: dict[str, Any] = {"config": "uso-tiny", "storage": "file:///data"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"storage": ...}, "storage: Field required"),
        ({"replica": {}}, "replica: Extra inputs"),
        ({"replicas": {"least": 0}}, r"replicas\.least: .*greater than or equal to 1"),
        ({"replicas": {"least": 3, "most": 2}}, r"replicas\.least is 3, more than replicas\.most, 2"),
        ({"replicas": {"gpus": -1}}, r"replicas\.gpus"),
        ({"replicas": {"weights": "latest"}}, r"replicas\.weights"),
        ({"replicas": {"routing": {"equal_share": 2}}}, "equal_share must be"),
        ({"replicas": {"scaling": {"queue_s": 0}}}, "queue_s must be"),
        ({"replicas": {"options": {"devices": "cpu"}}}, r"replicas\.options\.devices"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], said: str) -> None:
    table = {name: value for name, value in {**BASE, **change}.items() if value is not ...}
    with pytest.raises(ConfigError, match=said):
        read_arguments(table)


def test_server_settings_are_those_of_the_server() -> None:
    found = server_settings({"host": "0.0.0.0", "bounds": {"max_steps": 8}, "aliases": ["uso", "a/b"]}, has_keys=True)
    assert found == ServerSettings(host="0.0.0.0", has_keys=True, bounds=RequestBounds(max_steps=8), aliases=("uso", "a/b"))
    wrong: list[tuple[dict[str, object], str]] = [({"hosts": ""}, "no settings"), ({"has_keys": True}, "no settings")]
    wrong.append(({"bounds": {"max_steps": 99}}, "max_steps"))
    for fields, said in wrong:
        with pytest.raises(ConfigError, match=said):
            server_settings(fields, has_keys=False)
    with pytest.raises(ConfigError, match="no keys are configured"):
        server_settings({"host": "0.0.0.0"}, has_keys=False)


def test_a_burst_at_idle_replicas_is_no_queue() -> None:
    """Ray counts as waiting whatever it has not handed over yet."""
    arguments = ReplicaArguments(most=3, max_queued=5)
    assert arguments.most_unassigned(load_config("uso-tiny")) == 3 * 64 + 5


def test_an_ingress_is_given_more_than_it_answers_so_that_it_refuses_in_the_servers_words() -> None:
    settings = ServerSettings(transport=Transport(max_connections=40))
    given, held = ingress_bounds(settings, 3)
    assert given > 40
    assert held >= 3 * given  # A burst that is on its way to three idle ingresses is no queue.
    assert ingress_bounds(ServerSettings(), 1)[0] > ServerSettings().transport.max_connections


def test_the_command_lines_options_arrive() -> None:
    settings = ServerSettings(port=9, bounds=RequestBounds(max_images=2), cors_origins=("https://a.example",))
    options = EngineOptions(device="cpu", fetch_from=("a.example",))
    made = application_arguments(load_config("uso-tiny"), settings, "file:///d", Path("/keys"), options, (1, 3, 0.5))
    assert server_settings(made.server, has_keys=False) == settings
    assert (made.replicas.options, made.keys) == (options, Path("/keys"))
    assert (made.replicas.least, made.replicas.most, made.replicas.gpus) == (1, 3, 0.5)


def test_gpus_of_a_replica() -> None:
    config = load_config("uso-tiny")
    parallel = config.model_copy(update={"parallel": config.parallel.model_copy(update={"ulysses": 3})})
    assert ReplicaArguments().gpus_of(config) == 1 and ReplicaArguments().gpus_of(parallel) == 3
    assert ReplicaArguments(gpus=0.5).gpus_of(parallel) == 0.5
    assert ReplicaArguments(options=EngineOptions(device="cpu")).gpus_of(parallel) == 0


def test_the_configuration_files_are_valid(repository: Path) -> None:
    files = sorted((repository / "configs" / "ray").glob("*.yaml"))
    assert files
    for path in files:
        document = yaml.safe_load(path.read_text())
        for one in document["applications"]:
            assert one["import_path"] == "uso_engine.serving.ray.application:build", path
            arguments = read_arguments(one["args"])
            assert not arguments.storage.startswith("file:///tmp"), path  # Others may have made it, or read what is there.
            assert arguments.config in list_configs(), path
            has_keys = arguments.keys is not None or arguments.server.get("host", "127.0.0.1") != "127.0.0.1"
            server_settings(arguments.server, has_keys=has_keys)


def test_a_command_without_ray_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name == "ray" else found(name, *more))
    code, text = command_line.run("serve", "--ray", "--storage", tmp_path.as_uri())
    assert code == 1 and "serve --ray needs ray: pip install 'uso-engine[serve,ray]'" in text


def test_options_of_ray_without_ray_are_refused(tmp_path: Path) -> None:
    for option in (("--replicas", "2"), ("--max-replicas", "2"), ("--gpus-per-replica", "1"), ("--ray-address", "auto")):
        code, text = command_line.run("serve", *option, "--storage", tmp_path.as_uri())
        assert code == 2 and option[0] in text and "--ray" in text


def test_settings_of_every_table_are_plain() -> None:
    made = read_arguments(BASE).replicas
    assert set(asdict(made.routing)) == {"equal_share", "slow_ratio", "rest_s", "alternatives"}
    assert set(asdict(made.scaling)) == {"queue_s", "busy"}
