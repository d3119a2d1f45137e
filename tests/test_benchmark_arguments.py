"""Every benchmark says how it is called, and refuses what is unknown, impossible or contradicts itself."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.arguments import SHARED, BenchmarkParser
from benchmarks.workload import WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
Main = Callable[[list[str]], None]


def benchmarks() -> Iterator[str]:
    """Every module of a question's folder that can be run."""
    for path in sorted((ROOT / "benchmarks").glob("*/*.py")):
        if path.parent.name != "gpu" and "def main(" in path.read_text():
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts)


def command_of(name: str) -> str:
    """How a benchmark is called: a folder that is a command is called by its own name."""
    folder = name.rpartition(".")[0]
    return folder if (ROOT / folder.replace(".", "/") / "__main__.py").exists() else name


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", list(benchmarks()))
def test_every_benchmark_has_help_and_refuses_an_unknown_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main: Main = importlib.import_module(name).main
    with pytest.raises(SystemExit) as ending:
        main(["--help"])
    shown = capsys.readouterr().out
    assert ending.value.code == 0
    assert f"python -m {command_of(name)}" in shown
    with pytest.raises(SystemExit) as ending:
        main(["--work", "tiny"])
    assert ending.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--work", "tiny"], "unrecognized arguments: --work tiny"),
        (["--workload", "huge"], f"'huge': expected one of {', '.join(WORKLOADS)}"),
        (["--device", "tpu"], "unknown device 'tpu': expected cpu, cuda or cuda:0"),
        (["--device", "cuda:x"], "unknown device 'cuda:x': expected"),
        (["--device", "cuda:99"], "no device 'cuda:99': this machine has"),
        (["--dtype", "float16"], "'float16': expected one of bfloat16, float32"),
        (["--rounds", "0"], "'0': expected a whole number of at least 1"),
        (["--rounds", "2.5"], "'2.5': expected a whole number of at least 1"),
        (["--clock", "sun"], "'sun': expected one of wall, process"),
        (["--device", "cpu", "--clock", "process", "--threads", "2"], "time of 2 threads: expected --threads 1"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        BenchmarkParser("Some benchmark.", *SHARED).read(arguments)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--clock", "process"], ["--threads", "1"]])
def test_what_is_for_a_cpu_is_refused_for_a_gpu(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(SystemExit):
        BenchmarkParser("Some benchmark.", *SHARED).read(["--device", "cuda", *arguments])
    assert "--device is cuda:0: expected" in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
def test_options_are_read_as_what_they_mean() -> None:
    parser = BenchmarkParser("Some benchmark.", *SHARED, workload="tiny")
    options = parser.read(["--device", "cpu", "--dtype", "float32", "--clock", "process", "--out", "file"])
    assert (options.workload, options.device) == (WORKLOADS["tiny"], torch.device("cpu"))
    assert (options.dtype, options.rounds, options.out) == (torch.float32, 5, Path("file"))
    parser.read(["--threads", "2"])
    assert torch.get_num_threads() == 2


def test_a_default_of_an_option_that_is_not_there_is_a_mistake() -> None:
    with pytest.raises(TypeError, match=r"\['rounds'\]"):
        BenchmarkParser("Some benchmark.", "workload", rounds="3")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("memory.plans", ["--budget", "-1"], "'-1': expected a number above 0"),
        ("memory.plans", ["--budget", "nan"], "'nan': expected a number above 0"),
        ("memory.decoding", ["--side", "500"], "'500': expected a multiple of 16"),
        ("memory.decoding", [], "--side"),
        ("step.roofline", ["--text", "-5"], "'-5': expected a whole number"),
        ("tiers.sensitivity", ["--kind", "int2"], "int2"),
        ("kernels.compile", ["volta"], "unknown generations ['volta']: expected some of ['ampere'"),
    ],
)
def test_a_benchmarks_own_options_are_checked_too(
    name: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        importlib.import_module(f"benchmarks.{name}").main(arguments)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err
