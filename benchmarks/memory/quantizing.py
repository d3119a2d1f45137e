"""Measure the peak host memory of quantising a checkpoint of several gigabytes into a file, one process per tier.

    python -m benchmarks.memory.quantizing [--double 2] [--single 3]

The checkpoint has the real model's widths and fewer blocks, so its largest layers are the real ones. What is reported is the
highest resident memory (ru_maxrss) above that after all imports, while `save_quantized` runs; the result itself is a file, not
memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.arguments import BenchmarkParser, whole_number
from benchmarks.measure import write_record
from uso_engine.model.params import TransformerParams
from uso_engine.precision.tiers import QUANTIZED_TIERS, TierName, linear_classes
from uso_engine.precision.transformer import layer_formats
from uso_engine.weights.files.recorded_file import RecordedFile
from uso_engine.weights.files.safetensors_file import SafetensorsSource, write_safetensors
from uso_engine.weights.files.tensor_source import RecipeSource
from uso_engine.weights.model_shapes import transformer_shapes
from uso_engine.weights.quantized_checkpoint import Description, save_quantized


def write_synthetic(path: Path, params: TransformerParams) -> int:
    """Write a bfloat16 checkpoint of plausible values, quickly drawn.

    Returns:
        Its size in bytes.
    """
    numbers = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02

    def values(key: str, shape: tuple[int, ...]) -> Tensor:
        count = torch.Size(shape).numel()
        return numbers.repeat(-(-count // len(numbers)))[:count].view(shape)

    write_safetensors(path, RecipeSource(transformer_shapes(params), values, dtype=torch.bfloat16))
    return path.stat().st_size


def peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def quantise_here(checkpoint: Path, target: Path, tier: TierName, params: TransformerParams) -> dict[str, object]:
    """Quantise in this process and say what it took."""
    # Imports and allocators that any run needs are not what is measured.
    for layer_class in linear_classes().values():
        layer_class.quantize_weight(torch.randn(64, 256))
    description = Description(tier, params, layer_formats(params, tier), torch.bfloat16, RecordedFile.of(checkpoint), ())
    before, start = peak_bytes(), time.perf_counter()
    save_quantized(target, description, SafetensorsSource(checkpoint), ())
    return {
        "tier": tier,
        "checkpoint_bytes": checkpoint.stat().st_size,
        "result_bytes": target.stat().st_size,
        "peak_above_start_bytes": peak_bytes() - before,
        "seconds": time.perf_counter() - start,
    }


def measure(tiers: list[TierName], double: int, single: int) -> list[dict[str, object]]:
    """One fresh process per tier, on one checkpoint."""
    params = TransformerParams(depth=double, depth_single_blocks=single)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "synthetic.safetensors"
        write_synthetic(checkpoint, params)
        for tier in tiers:
            target = Path(folder) / "quantised.safetensors"
            command = [sys.executable, "-m", "benchmarks.memory.quantizing", "--double", str(double), "--single", str(single)]
            done = subprocess.run(
                [*command, "--child", tier, str(checkpoint), str(target)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            records.append(json.loads(done.stdout.splitlines()[-1]))
            target.unlink()
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__, "out")
    parser.add_argument(
        "--double", type=whole_number, default=2, metavar="N", help="double blocks of the checkpoint; by default 2"
    )
    parser.add_argument("--single", type=whole_number, default=3, metavar="N", help="single blocks; by default 3")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.read(arguments)
    if options.child is not None:
        tier, checkpoint, target = options.child
        params = TransformerParams(depth=options.double, depth_single_blocks=options.single)
        print(json.dumps(quantise_here(Path(checkpoint), Path(target), tier, params)))
        return
    for entry in measure(list(QUANTIZED_TIERS), options.double, options.single):
        print(entry, flush=True)
        write_record("quantising memory", entry, options.out)


if __name__ == "__main__":
    main()
