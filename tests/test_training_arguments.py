"""Every training script says how it is called, and refuses what is unknown or impossible before it reads anything."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from training.arguments import SHARED, TrainingParser

ROOT = Path(__file__).resolve().parents[1]
Main = Callable[[list[str]], None]


def scripts() -> Iterator[str]:
    """Every module of training/ that can be run."""
    for path in sorted((ROOT / "training").glob("*.py")):
        if "def main(" in path.read_text():
            yield path.stem


def refusal(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What standard error says when a script refuses to run."""
    main: Main = importlib.import_module(f"training.{name}").main
    with pytest.raises(SystemExit) as ending:
        main(arguments)
    assert ending.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", list(scripts()))
def test_every_script_has_help_and_refuses_an_unknown_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main: Main = importlib.import_module(f"training.{name}").main
    with pytest.raises(SystemExit) as ending:
        main(["--help"])
    shown = capsys.readouterr().out
    assert ending.value.code == 0
    assert f"python -m training.{name}" in shown
    source = (ROOT / "training" / f"{name}.py").read_text()
    # One parser for all: abbreviations are refused, too.
    assert "ArgumentParser(" not in source
    assert "TrainingParser(" in source
    refusal(name, ["--see", "1"], capsys)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("transformer", [], "the following arguments are required: --data, --out"),
        ("transformer", ["--data", "d", "--out", "o", "--seconds", "0"], "'0': expected a number above 0"),
        ("guidance", ["--data", "d", "--out", "o"], "required: --start"),
        ("vision", ["--data", "d", "--out", "o", "--seed", "-1"], "'-1': expected a whole number"),
        ("autoencoder", ["--data", "d", "--out", "o", "--batch", "0"], "'0': expected a whole number of at least 1"),
        ("dataset", ["--out", "o", "--processes", "0"], "'0': expected a whole number of at least 1"),
        ("conditions", ["--data", "d", "--part", "levels", "--autoencoder", "a"], "expected --vision"),
        ("conditions", ["--data", "d", "--part", "latents"], "expected --autoencoder"),
    ],
)
def test_values_that_make_no_sense_are_refused(
    name: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(name, arguments, capsys)


def test_options_are_read_as_what_they_mean() -> None:
    parser = TrainingParser("Some stage.", *SHARED, seconds="480", peak="1.5e-3")
    options = parser.read(["--data", "there", "--out", "here", "--batch", "8"])
    assert (options.data, options.out, options.batch, options.ranks, options.seed) == (Path("there"), Path("here"), 8, 2, 0)
    assert (options.seconds, options.peak) == (480.0, 1.5e-3)
