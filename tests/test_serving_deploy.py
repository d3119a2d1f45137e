"""The files under deploy/: what they promise of users, file systems and privileges, and options that exist."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

import uso_engine.cli.serve  # noqa: F401  adds its commands
from uso_engine.cli.app import app
from uso_engine.config import list_configs


@pytest.fixture(scope="module")
def options() -> set[str]:
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {name for parameter in serve.params for name in parameter.opts}


def instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def test_the_image_runs_without_privileges(repository: Path, options: set[str]) -> None:
    found = instructions((repository / "deploy" / "Dockerfile").read_text())
    last = [text for name, text in found if name == "USER"][-1]
    after = [name for name, _ in found[[text for _, text in found].index(last) :]]
    assert last == "10001" and "RUN" not in after and "COPY" not in after
    assert not any(name == "ADD" for name, _ in found)
    command = " ".join(text for name, text in found if name in ("ENTRYPOINT", "CMD"))
    assert set(re.findall(r'"(--[a-z-]+)"', command)) <= options
    assert re.search(r'"--config", "([a-z-]+)"', command)[1] in list_configs()  # type: ignore[index]
    extras = re.search(r"\.\[([a-z0-9,]+)\]", str(found))
    assert extras is not None and {"serve", "s3", "gpu"} <= set(extras[1].split(","))
    ignored = (repository / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    assert ignored[0] == "*" and all((repository / name).exists() for name in kept)


def test_the_compose_file_keeps_the_server_read_only(repository: Path, options: set[str]) -> None:
    found = yaml.safe_load((repository / "deploy" / "compose.yaml").read_text())
    server = found["services"]["uso"]
    assert server["read_only"] is True and server["cap_drop"] == ["ALL"] and server["tmpfs"] == ["/tmp"]
    assert {option.partition("=")[0] for option in server["command"]} <= options
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])
    assert set(server["secrets"]) == set(found["secrets"])
    for name, service in found["services"].items():
        assert "image" not in service or not service["image"].endswith(":latest"), name
        variables = service.get("environment", {})
        assert all(str(value).startswith("${") for key, value in variables.items() if "PASSWORD" in key or "SECRET" in key)


def test_the_unit_is_one(repository: Path, options: set[str], tmp_path: Path) -> None:
    path = repository / "deploy" / "uso-engine.service"
    unit = configparser.RawConfigParser(strict=False, delimiters=("=",))
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(path.read_text().replace("\\\n", " "))
    service = unit["Service"]
    assert set(re.findall(r"--[a-z-]+", service["ExecStart"])) <= options
    assert service["DynamicUser"] == service["NoNewPrivileges"] == "yes"
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    # A program that is there, since the check looks for it.
    copy = tmp_path / path.name
    copy.write_text(path.read_text().replace("/opt/uso/bin/uso-engine", "/bin/true"))
    checked = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    assert path.name not in checked.stderr, checked.stderr
