"""What holds for every test: no network, Triton interpreted without a GPU; where the repository is; the usual engine."""

import ipaddress
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Read when the library of threads is loaded, which torch does. The tests' tensors are small: a second thread costs more in
# waiting than it computes, and a thread that waits by spinning takes the core from the other process of tests. What tests
# start inherits both.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# Read by the Hugging Face libraries when they are imported, so it stands before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from uso_engine import USOEngine

# Triton decides when a kernel is *defined* whether it will be interpreted or compiled, so without a GPU this must be set
# before anything imports triton. Tests that compile ahead of time run a subprocess whose environment lacks it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)


def _is_loopback(address: object) -> bool:
    if not isinstance(address, tuple):  # a Unix socket
        return True
    host = str(address[0]).partition("%")[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in {"localhost", ""}


@pytest.fixture(scope="session", autouse=True)
def loopback_only() -> Iterator[None]:
    """Refuse every connection that would leave this machine: a test that needs the network would pass only by chance."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guarded_connect(self: socket.socket, address: tuple[str, int], /) -> None:
        if not _is_loopback(address):
            raise OSError(f"tests may not leave this machine: connect to {address}")
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: tuple[str, int], /) -> int:
        if not _is_loopback(address):
            raise OSError(f"tests may not leave this machine: connect to {address}")
        return connect_ex(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        yield


@pytest.fixture(autouse=True)
def log_level_kept() -> Iterator[None]:
    """The command line, run inside a test, sets how much is logged; the next test starts from where this one did."""
    logger = logging.getLogger("uso_engine")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def engine() -> Iterator["USOEngine"]:
    """The embedded model in float32 on a CPU: one engine for a module, whose tests leave it as they found it."""
    # On demand: what stands above has to be in the environment first.
    from uso_engine import USOEngine

    with USOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def content() -> Image.Image:
    """A content picture; no two rows are alike."""
    return Image.linear_gradient("L").convert("RGB").resize((96, 64))


@pytest.fixture(scope="module")
def style() -> Image.Image:
    """A style picture."""
    return Image.radial_gradient("L").convert("RGB").resize((80, 80))
