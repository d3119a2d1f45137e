"""The command line as a process: interrupts at every moment, streams that cannot be written to, verbosity."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from uso_engine.cli.console import interrupts
from uso_engine.cli.progress import LoadingProgress

MAIN = "from uso_engine.cli import main; main()"
FAST = ["generate", "--prompt", "x", "--size", "64x64", "--steps", "1", "--device", "cpu"]

# Presses Ctrl-C when a module is about to be imported, and does with it what libraries do.
PRESS = """
import os, signal, sys
class Presser:
    pressed = False
    def find_spec(self, name, path=None, target=None):
        if name == {module!r} and not Presser.pressed:
            Presser.pressed = True
            try:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(1000): pass
            except KeyboardInterrupt:
                {reaction}
        return None
sys.meta_path.insert(0, Presser())
"""


def run(
    repository: Path,
    arguments: list[str],
    folder: Path,
    before: str = "",
    stdout: int = subprocess.PIPE,
    streams: str = "utf-8",
) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(repository), str(repository / "kernels")])
    return subprocess.run(
        [sys.executable, "-c", before + MAIN, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "PYTHONIOENCODING": streams},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(
    ("arguments", "module", "reaction"),
    [
        (FAST, "typer", "raise"),
        (FAST, "torch", "raise"),
        (FAST, "torch", "pass"),
        (["info"], "torch", "raise RuntimeError('could not be imported') from None"),
    ],
    ids=["while importing itself", "while importing torch", "swallowed by torch", "turned into torch's own error"],
)
def test_an_interrupt_is_one_line_whatever_it_meets(
    arguments: list[str], module: str, reaction: str, repository: Path, tmp_path: Path
) -> None:
    done = run(repository, arguments, tmp_path, PRESS.format(module=module, reaction=reaction))
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_swallowed_interrupt_is_noticed_by_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "seen", True)
    with pytest.raises(KeyboardInterrupt), LoadingProgress(Console(stderr=True)):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["config", "list"], ["--help"], ["--version"]])
def test_a_full_disk_is_one_line(arguments: list[str], repository: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = run(repository, arguments, tmp_path, stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr == "error: cannot write the output: No space left on device\n"


def test_a_closed_pipe_is_silent(repository: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run(repository, ["config", "list"], tmp_path, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_without_a_place_to_print_to_the_command_still_ends_well(repository: Path, tmp_path: Path) -> None:
    done = run(repository, ["config", "list"], tmp_path, before="import sys; sys.stdout = None; ")
    assert (done.returncode, done.stderr) == (0, "")


def test_verbose_tells_what_ran_and_a_warning_comes_once(repository: Path, tmp_path: Path) -> None:
    # A name that is no text, on a terminal that has only ASCII.
    name = os.fsdecode("[red]ä:smile:".encode() + b"\xff.png")
    done = run(repository, [*FAST, "-v", "-o", name, "--prompt", "a small house " * 20], tmp_path, streams="ascii:strict")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[red]\\xe4:smile:\\udcff.png\n"
    (ran,) = [line for line in done.stderr.splitlines() if line.startswith("ran: ")]
    for part in ("uso-tiny in bf16 on cpu", "kernels reference", "attention ", "1 steps", "everything stays", " tokens in "):
        assert part in ran
    assert done.stderr.count("T5 takes 20 tokens") == 1


@pytest.mark.parametrize("columns", ["0", "1", "20"])
def test_what_is_sent_with_a_report_is_whole_at_any_width(
    columns: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = run(repository, ["info"], tmp_path)
    assert done.returncode == 0, done.stderr
    facts = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert facts["torch"].strip() == torch.__version__
    assert facts["memory plans"].strip() == "uso-engine info CONFIG"
    assert facts["FLUX.1-dev in bf16"].strip().endswith("without modulation linears")


def test_no_width_is_an_unknown_one(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers and editors say 0; help and errors are printed all the same."""
    monkeypatch.setenv("COLUMNS", "0")
    done = run(repository, ["config", "show", "nobodys"], tmp_path)
    assert (done.returncode, "error: no configuration named 'nobodys'" in done.stderr) == (1, True)
    assert "Make images from a prompt" in run(repository, ["generate", "--help"], tmp_path).stdout


@pytest.mark.skipif(sys.platform == "win32", reason="there a folder that is in use stays")
def test_a_working_directory_that_is_gone_is_named(repository: Path, tmp_path: Path) -> None:
    """PyTorch's own library ends the process otherwise, with a word about a file of its own."""
    gone = tmp_path / "gone"
    gone.mkdir()
    before = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); "
    done = run(repository, [*FAST, "-o", str(tmp_path / "out.png")], tmp_path, before=before)
    assert done.returncode == 1
    assert done.stderr == "error: the working directory is not there any more; change to another one\n"


def optimised(repository: Path, folder: Path, flag: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What the command line says and gives under an option of Python's."""
    paths = os.pathsep.join([str(repository), str(repository / "kernels")])
    return subprocess.run(
        [sys.executable, flag, "-m", "uso_engine", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow  # Python keeps no compiled modules for these options where it may not write beside them.
def test_without_assertions_a_picture_is_made(repository: Path, tmp_path: Path) -> None:
    done = optimised(repository, tmp_path, "-O", *FAST)
    assert (done.returncode, done.stdout) == (0, "out.png\n"), done.stderr
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (64, 64)


@pytest.mark.slow
def test_without_docstrings_a_sentence_says_what_to_run(repository: Path, tmp_path: Path) -> None:
    """Python leaves them out under -OO, and transformers reads its own when its models are imported."""
    done = optimised(repository, tmp_path, "-OO", *FAST)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0
    assert "Traceback" not in said
    assert "transformers' models cannot be imported without docstrings, which python -OO (or PYTHONOPTIMIZE=2)" in said, said
    # What transformers itself says is not left out.
    assert "docstring of `" in said and said.endswith("; run python, or python -O"), said
    assert list(tmp_path.iterdir()) == []
