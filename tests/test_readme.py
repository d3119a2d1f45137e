"""The README's Python and its commands, run as they are written."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from uso_engine.cli.app import app
from uso_engine.errors import GenerationCancelled


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language; a fence that opens is told from one that closes by counting them."""
    fences = re.split(r"^```(\w*)\n", text, flags=re.MULTILINE)
    return [body for opened, body in zip(fences[1::4], fences[2::4], strict=True) if opened == language]


def test_the_ten_lines_run(
    readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = blocks(readme, "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102  our own README
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (128, 128)
    assert "(7, 8)" in capsys.readouterr().out


def test_the_lines_for_a_service_run(
    readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, code = blocks(readme, "python")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102  our own README
    answer = json.loads(capsys.readouterr().out)
    written = sorted(path.name for path in (tmp_path / "files").iterdir())
    assert sorted(image["url"] for image in answer["images"]) == [f"https://host.example/files/{name}" for name in written]
    assert [(image["width"], image["height"]) for image in answer["images"]] == [(128, 96)] * 2
    assert names["HostedRequest"].model_json_schema()["required"] == ["model", "prompt", "image_urls"]
    names["gone"].set()
    with pytest.raises(GenerationCancelled, match="the client has gone"):
        names["cancel"](None)


def test_every_command_runs(readme: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [line for block in blocks(readme, "") for line in block.splitlines() if line.startswith("uso-engine ")]
    runnable = [line for line in commands if "uso-flux" not in line and not line.startswith("uso-engine verify")]
    assert len(runnable) >= 5
    monkeypatch.chdir(tmp_path)
    for name in ("content.png", "style.png"):
        Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(name)
    for command in runnable:
        arguments = shlex.split(command)[1:]
        if arguments[0] == "generate":
            arguments += ["--steps", "1", "--device", "cpu"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{command}\n{result.stdout}{result.stderr}"
    assert (tmp_path / "sheet.png").is_file()
    # What needs the real weights is at least a command with known options.
    for command in commands:
        result = CliRunner().invoke(app, [shlex.split(command)[1], "--help"])
        assert result.exit_code == 0


def test_the_make_targets_exist(readme: str, repository: Path) -> None:
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", readme, re.MULTILINE)
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
