"""The stubbed GPU sees every launch of a step; a second step prepares none, looks at no operands and asks for the stream."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch
from benchmarks.step.host_stub import DEEP, StubbedStreams, deep_step, stubbed_gpu
from uso_engine.model.side_stream import SideStream
from uso_kernels.operation import OPERATIONS, Operation

with torch.no_grad(), stubbed_gpu() as launches:
    step = deep_step()
    step()
    first, prepared = launches.count, {name: dict(known.prepared) for name, known in OPERATIONS.items()}
    looked_at, fill = [], Operation.fill
    Operation.fill = lambda known, operands: looked_at.append(known.name) or fill(known, operands)
    step()
    # Only the norms before the first blocks are no call sites.
    assert looked_at == 3 * ["layer_norm_modulate_into"], looked_at
    second = launches.count - first
    assert {name: dict(known.prepared) for name, known in OPERATIONS.items()} == prepared
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    # Allocations and views; nothing that multiplies, attends or activates.
    seen = {event.key for event in profiler.key_averages()}
    computed = [name for name in seen if any(part in name for part in ("mm", "linear", "gelu", "attention", "uso_kernels"))]
    assert computed == [], computed
    beside = deep_step(SideStream(torch.device("cpu"), StubbedStreams(launches)))
    beside()
    looked_at.clear()
    launches.by_stream.clear()
    beside()
    assert looked_at == 3 * ["layer_norm_modulate_into"], looked_at
    print(first, second, sum(map(len, prepared.values())), launches.by_stream[0], launches.by_stream[1])
"""


def test_every_launch_of_a_step_is_prepared_by_the_first(repository: Path) -> None:
    """In a process whose Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (repository, repository / "kernels"))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # Norms before the first blocks; q/k norms, two additions of each stream; in a single block one of each.
    depth, singles = 19, 38
    launches = 3 + (2 * depth + singles) + (4 * depth + singles)
    first, second, prepared, on_first, on_second = map(int, done.stdout.split())
    assert (first, second) == (launches, launches)
    # Of each double block, the text stream's q/k norm and its two additions.
    assert (on_first, on_second) == (launches - 3 * depth, 3 * depth)
    assert 0 < prepared < 20
