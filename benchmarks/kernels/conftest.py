"""Options of the kernel benchmarks."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=int, default=None, help="packed rows T; default 5824 on a GPU, 256 on a CPU")
    parser.addoption("--width", type=int, default=None, help="model width C; default 3072 on a GPU, 256 on a CPU")
