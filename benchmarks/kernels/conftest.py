"""Options of the kernel benchmarks."""

from __future__ import annotations

import pytest

from benchmarks.arguments import whole_number


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=whole_number, default=None, help="packed rows T; default 5824 on a GPU, 256 on a CPU")
    parser.addoption("--width", type=whole_number, default=None, help="model width C; default 3072 on a GPU, 256 on a CPU")
