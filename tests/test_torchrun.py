"""An engine whose processes torchrun has started: the picture of those it starts itself, and an end for all, come what may."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import run
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]  # documented there, not declared

from uso_engine import USOEngine, follow_if_not_first, load_config
from uso_engine.config import EngineConfig
from uso_engine.errors import BackendError, ParallelError
from uso_engine.loading import torchrun
from uso_engine.loading.torchrun import Launch, TorchrunProcesses, torchrun_launch
from uso_engine.parallel.group import serve_store
from uso_kernels.launch import numbered

CPU = torch.device("cpu")
PROGRAM = """
import os, signal, sys
from pathlib import Path
from uso_engine import USOEngine, follow_if_not_first

config, folder = sys.argv[1], Path(sys.argv[2])
(folder / os.environ["RANK"]).write_text(str(os.getpid()))

def on_step(step):
    pid = int((folder / "1").read_text())
    os.kill(pid, signal.SIGKILL)

if not follow_if_not_first(config, device="cpu"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun may be faster than what the first process has to say
    with USOEngine.from_config(config, device="cpu") as engine:
        engine.generate("a fish", seed=7, image_size={"width": 96, "height": 64}, on_step=on_step).save(folder / "out.png")
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """uso-tiny, whose transformer has three heads, in three processes."""
    path = tmp_path_factory.mktemp("config") / "three.toml"
    text = (repository / "configs" / "uso-tiny.toml").read_text()
    path.write_text(f"{text}\n[parallel]\nulysses = 3\nstep_timeout_s = 60\n")
    return path


def started(count: int, *program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *program]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
    )


def test_the_picture_is_that_of_processes_which_the_engine_starts_itself(config: Path, tmp_path: Path) -> None:
    asked = ["--prompt", "a fish", "--seed", "7", "--size", "96x64", "--steps", "2", "--device", "cpu"]
    ended = started(3, "-m", "uso_engine", "generate", "--config", str(config), *asked, "-o", str(tmp_path / "there.png"))
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("there.png") == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # As torchrun's processes have it.
    try:
        with USOEngine.from_config(config, device="cpu") as engine:
            made = engine.generate("a fish", seed=7, image_size={"width": 96, "height": 64}, num_inference_steps=2)
    finally:
        torch.set_num_threads(threads)
    made.save(tmp_path / "here.png")
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()


def test_another_number_of_processes_is_refused(config: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out.png")
    ended = started(2, "-m", "uso_engine", "generate", "--config", str(config), "--prompt", "x", "-o", output)
    assert ended.returncode != 0 and not list(tmp_path.iterdir())
    assert "error: torchrun started 2 processes and [parallel] ulysses is 3: give both the same number" in ended.stdout
    for rank in range(2):
        with pytest.raises(ParallelError, match=rf"started 2 processes .* ulysses is 3: .*this is process {rank}"):
            Launch(HashStore(), rank, 2).check_size(3)


def test_a_process_that_is_killed_ends_all(config: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    ended = started(3, str(tmp_path / "program.py"), str(config), str(tmp_path))
    assert ended.returncode != 0 and not (tmp_path / "out.png").exists()
    assert "exitcode  : -9" in ended.stdout, ended.stdout
    assert "process 0 of 3 lost the others" in ended.stdout or "have ended" in ended.stdout, ended.stdout
    for rank in range(3):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


def test_ray_and_torchrun_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run("serve", "--ray") == (2, "error: serve --ray starts its processes itself: leave out torchrun")


def test_without_torchrun_nobody_follows(config: Path) -> None:
    assert follow_if_not_first(config, device="cpu") is False


@pytest.fixture
def three(config: Path) -> EngineConfig:
    return load_config(config)


def test_one_that_cannot_load_is_named_and_the_others_are_told(three: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "_LOADING", timedelta(seconds=20))
    store = HashStore()
    others = TorchrunProcesses(Launch(store, 0, 3), three, CPU)
    broken = three.model_copy(
        update={"transformer": three.transformer.model_copy(update={"checkpoint": "/nowhere.safetensors"})}
    )
    monkeypatch.setattr(torchrun, "torchrun_launch", lambda: Launch(store, 2, 3))
    with pytest.raises(FileNotFoundError):
        follow_if_not_first(broken, device="cpu")
    with pytest.raises(ParallelError, match=r"failed before it could join: process 2: .*/nowhere\.safetensors"):
        others.join()
    monkeypatch.setattr(torchrun, "_ENDING_S", 0.0)
    assert "nowhere" in others.end()
    monkeypatch.setattr(torchrun, "torchrun_launch", lambda: Launch(store, 1, 3))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ParallelError, match="process 1 of 3: the first process could not load its engine"):
        follow_if_not_first(three, device="cpu")
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_the_first_makes_an_engine_and_only_one(three: EngineConfig) -> None:
    with pytest.raises(ParallelError, match="process 1 of torchrun's 3 makes no engine: call follow_if_not_first"):
        TorchrunProcesses(Launch(HashStore(), 1, 3), three, CPU)
    store = HashStore()
    store.set("first came", "")
    with pytest.raises(ParallelError, match="there was one before"):
        TorchrunProcesses(Launch(store, 0, 3), three, CPU)


def test_a_store_that_is_gone_is_said() -> None:
    store = serve_store(1)
    launch = Launch(TCPStore("127.0.0.1", store.port, None, False), 1, 3)
    del store
    launch.say("done/1")  # Nobody is left to be told.
    with pytest.raises(ParallelError, match="process 1 of 3 lost torchrun's store"):
        launch.heard("first came")


def test_a_store_that_nobody_serves_is_waited_for_as_long_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))  # Taken, and nobody listens.
        port = other.getsockname()[1]
        variables = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in {"TORCHELASTIC_RUN_ID": "none", **variables}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torchrun, "CONNECTING", timedelta(seconds=0.2))
        with pytest.raises(ParallelError, match=r"its store cannot be joined: no answer within 0:00:00\.2"):
            torchrun_launch.__wrapped__()  # What it said to another test is kept.
        monkeypatch.delenv("MASTER_ADDR")
        with pytest.raises(ParallelError, match=r"its store cannot be joined: .*MASTER_ADDR expected"):
            torchrun_launch.__wrapped__()


def test_every_process_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torchrun, "check_device", lambda given: numbered(torch.device(given)))
    monkeypatch.setattr(torchrun, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torchrun, "dist", SimpleNamespace(get_node_local_rank=lambda: 2))
    assert [str(torchrun._device_of_its_own(given)) for given in (None, "cuda", "cuda:2")] == ["cuda:2"] * 3
    assert torchrun._device_of_its_own("cpu") == CPU
    with pytest.raises(BackendError, match="here cuda:2; give 'cuda', not 'cuda:0'"):
        torchrun._device_of_its_own("cuda:0")


@pytest.mark.parametrize("variable", [None, "first"])
def test_a_process_without_a_number_on_its_machine_says_so(variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if variable is not None:
        monkeypatch.setenv("LOCAL_RANK", variable)
    monkeypatch.setattr(torchrun, "check_device", torch.device)
    with pytest.raises(ParallelError, match=r"does not say its number on this machine: .*(LOCAL_RANK|invalid literal)"):
        torchrun._device_of_its_own("cuda")
