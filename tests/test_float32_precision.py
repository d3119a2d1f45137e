"""What is promised in float32 asks for float32, whatever the process has set: no TF32 in convolutions and products.

On a CPU TF32 changes nothing, so the settings are read from inside the modules that a GPU would run with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from uso_engine import USOEngine
from uso_engine.verification.run import VerifyOptions, verify

# allow_tf32 cannot be read in a process that sets convolutions alone, as it may since torch 2.9. These switches are made at
# import, which is more than mypy sees.
CUDNN: Any = torch.backends.cudnn


def settings() -> tuple[str, str, str]:
    """How convolutions and products in float32 are computed on a GPU."""
    return CUDNN.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()


@pytest.fixture(params=["by default", "everything allowed", "convolutions by their new name"])
def process(request: pytest.FixtureRequest) -> Iterator[tuple[str, str, str]]:
    """The settings of the process that embeds the engine; torch's own default allows TF32 in convolutions."""
    before = CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision
    if request.param == "everything allowed":
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
    if request.param == "convolutions by their new name":
        CUDNN.conv.fp32_precision = "tf32"
        CUDNN.rnn.fp32_precision = "ieee"
    yield settings()
    torch.set_float32_matmul_precision("highest")
    CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision = before


@pytest.fixture
def seen() -> Iterator[dict[str, set[tuple[str, str, str]]]]:
    """The settings under which each kind of module ran."""
    found: dict[str, set[tuple[str, str, str]]] = {}

    def note(module: nn.Module, given: object) -> None:
        found.setdefault(type(module).__name__, set()).add(settings())

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    yield found
    hook.remove()


def check_float32(seen: dict[str, set[tuple[str, str, str]]], *kinds: str) -> None:
    assert set(kinds) <= set(seen)
    for kind in kinds:
        for conv, products, precision in seen[kind]:
            assert conv != "tf32", f"{kind} ran where cuDNN's convolutions use TF32"
            assert products != "tf32" and precision == "highest", f"{kind} ran where products use TF32"


def test_a_request_is_computed_in_float32(
    process: tuple[str, str, str], seen: dict[str, Any], content: Image.Image, style: Image.Image
) -> None:
    with USOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32) as engine:
        engine.generate(
            prompt="a red fish", images=[content, style], seed=7, num_inference_steps=1, image_size={"width": 64, "height": 64}
        )
    # The patch embedding and the autoencoder are convolutions; encoders and transformer are products.
    check_float32(seen, "Conv2d", "Linear")
    assert settings() == process


def test_verify_is_computed_in_float32(process: tuple[str, str, str], seen: dict[str, Any], repository: Path) -> None:
    checks = list(verify(repository / "tests" / "reference", VerifyOptions()))
    assert all(check.is_within for check in checks)
    check_float32(seen, "Conv2d", "Linear")
    assert settings() == process


def test_a_part_that_is_asked_by_itself_too(process: tuple[str, str, str], seen: dict[str, Any]) -> None:
    with USOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32) as engine:
        engine.encode_prompt("a fish")
        assert settings() == process
    check_float32(seen, "Linear")
