"""What must not depend on the CPU's instruction sets: constants, and an image's independence of its company."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_models import small_transformer
from test_batching import check_mixture
from test_denoiser import check_company
from test_uso_kernels_company import THREADS, check_rows

from uso_engine.model.modulation import sinusoidal_embedding
from uso_engine.model.rope import content_positions, grid_positions, rope_tables
from uso_engine.sampling.schedule import schedule
from uso_kernels.cpu import int8_product
from uso_kernels.matmul.linear import linear
from uso_kernels.ragged import Ragged

# Read when a process starts. ATen's own kernels, oneDNN's (bfloat16 products, convolutions) and MKL's (float32 products) are
# limited apart.
INSTRUCTION_SETS = {
    "as it is": {},
    "without AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
LIMITS = {name for limits in INSTRUCTION_SETS.values() for name in limits}
CHECK = """
import test_instruction_sets as t
t.check_products(); t.check_int8(); t.check_passes(); t.check_companies(); t.check_mixture()
print(t.constants())
"""
# Widths at which oneDNN's products on AMX, or MKL's under AVX2, were seen to change a row's bits with the number of rows.
WIDTHS = (96, 768, 960, 3072)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_bits_and_constants_under(name: str, repository: Path) -> None:
    if name == "without AMX" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has no AMX to be switched off")
    if name == "as it is" and not LIMITS & set(os.environ):
        check_products()
        check_int8()
        check_passes()
        check_companies()
        check_mixture()
        assert json.loads(constants()) == CONSTANTS
        return
    environment = {key: value for key, value in os.environ.items() if key not in LIMITS} | INSTRUCTION_SETS[name]
    folders = [repository, repository / "kernels", repository / "tests"]
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == CONSTANTS


def check_int8() -> None:
    """Sums of int8 products are exact, of the largest numbers and of drawn ones."""
    generator = torch.Generator().manual_seed(0)
    for columns in (64, 1024, 3080, 15360):
        x, weight = (torch.randint(-127, 128, (32, columns), generator=generator, dtype=torch.int8) for _ in range(2))
        x[0], weight[0], weight[1] = 127, 127, -127
        assert torch.equal(int8_product(x, weight), (x.long() @ weight.long().t()).int())


def check_products() -> None:
    """Segments of a packed product have the bits of the same rows alone, in small and large companies."""
    generator = torch.Generator().manual_seed(0)
    for lengths in ([16, 16], [40, 1024, 16], [700, 33, 512, 64]):
        layout = Ragged.pack(lengths)
        for width in WIDTHS:
            x, weight = (torch.randn(rows, width, generator=generator) for rows in (layout.rows, 128))
            for dtype in (torch.float32, torch.bfloat16):
                packed = linear(x.to(dtype), weight.to(dtype), sequences=layout)
                for rows in layout.row_slices:
                    alone = linear(x[rows].to(dtype), weight.to(dtype))
                    assert torch.equal(packed[rows], alone), f"{dtype}, width {width}, {rows} of {lengths}"


def check_passes() -> None:
    """What is computed number by number has a row's bits, whatever is beside it and however many threads there are."""
    for threads in THREADS:
        for dtype in (torch.float32, torch.bfloat16):
            check_rows(threads, dtype)


def check_companies() -> None:
    """Whole runs of images in company have the bits of runs alone."""
    for dtype in (torch.float32, torch.bfloat16):
        check_company(small_transformer(dtype=dtype))


def constants() -> str:
    """Digests of everything that is computed once and that a vector library's rounding could reach."""
    times = torch.tensor([sigma for steps in (1, 4, 28, 50) for sigma in schedule(steps, 1024, 1024)], dtype=torch.float64)
    positions = torch.cat([grid_positions((64, 64)), *content_positions((64, 64), [(32, 24), (30, 32)])])
    cos, sin = rope_tables(positions, (16, 56, 56), 10_000)
    tensors = {
        "sigmas": torch.tensor([schedule(steps, 768, 1024)[i] for steps in range(1, 51) for i in range(steps)]),
        "time embedding": sinusoidal_embedding(times.to(torch.float32)),
        "guidance embedding": sinusoidal_embedding(torch.tensor([1.0, 3.5, 4.0, 20.0])),
        "time embedding in bfloat16": sinusoidal_embedding(times.to(torch.bfloat16)).float(),
        "rotary cosines": cos,
        "rotary sines": sin,
    }
    return json.dumps({name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16] for name, tensor in tensors.items()})


# Of the values rounded once from float64; a difference is one of rounding, and the test of the constant itself says how large.
CONSTANTS = {
    "sigmas": "1d6472706ebd27a8",
    "time embedding": "40f724a2a7336cae",
    "guidance embedding": "64547912d1e1ccc3",
    "time embedding in bfloat16": "37e62147dbc685c9",
    "rotary cosines": "397eb3a6f216b3ed",
    "rotary sines": "3604038cd10938f5",
}
