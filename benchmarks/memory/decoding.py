"""Decoding whole, in strips, and in strips with what lies between layers on the host: time, difference, memory moved.

    OMP_NUM_THREADS=1 python -m benchmarks.memory.decoding --side 512 --clock process
    python -m benchmarks.memory.decoding --side 1024 --side 2048 --device cuda --rounds 5

FLUX's decoder in float32 with random weights. One round by default: on a CPU a picture takes minutes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.arguments import BenchmarkParser, side
from benchmarks.encoders import FULL, autoencoder_module, filled
from benchmarks.measure import Clock, summarise, time_once, write_record
from uso_engine.conditioning.content import Autoencoder
from uso_engine.conditioning.strips import Strips
from uso_engine.offload.autoencoder_sizes import CUTS, FLUX_DECODER, STRIP_PIXELS, Cut


def measure_cuts(
    autoencoder: Autoencoder, side: int, device: torch.device, *, rounds: int, clock: Clock
) -> list[dict[str, object]]:
    """Decode a square picture in every way.

    Args:
        autoencoder: on the device.
        side: of the picture, in pixels.
        device: where it runs.
        rounds: how often each way is timed, in turn.
        clock: of a CPU.

    Returns:
        A record for each way; differences are the largest of any value, relative to the largest value.
    """
    latents = torch.randn(1, 16, side // 8, side // 8, generator=torch.Generator().manual_seed(0)).to(device)
    pictures: dict[Cut, Tensor] = {}
    times: dict[Cut, list[float]] = {cut: [] for cut in CUTS}
    peaks: dict[Cut, float | None] = dict.fromkeys(CUTS)
    moved: dict[Cut, int] = {}
    for _ in range(rounds):
        for cut in CUTS:
            before = autoencoder.moved_bytes
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)

            def decode(cut: Cut = cut) -> None:
                strips = None if cut == "whole" else Strips(STRIP_PIXELS, on_host=cut == "host strips")
                pictures[cut] = autoencoder.decode(latents, strips)

            times[cut].append(time_once(decode, device, clock))
            moved[cut] = autoencoder.moved_bytes - before
            if device.type == "cuda":
                peaks[cut] = torch.cuda.max_memory_allocated(device) / 2**20
    whole = pictures["whole"]
    return [
        {
            "cut": cut,
            "side": side,
            "device": device.type,
            **summarise(times[cut]),
            "difference": float((pictures[cut] - whole).abs().max() / whole.abs().max()),
            "moved_gb": moved[cut] / 1e9,
            "planned_mib": FLUX_DECODER.peak_bytes(cut, side**2) / 2**20,
            "peak_mib": peaks[cut],
        }
        for cut in CUTS
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__, "device", "rounds", "clock", "threads", "out", rounds="1")
    parser.add_argument(
        "--side", type=side, action="append", required=True, metavar="PIXELS", help="of a square picture; repeat"
    )
    options = parser.read(arguments)
    module = autoencoder_module(FULL)
    filled(module, options.device, torch.float32)
    autoencoder = Autoencoder(module, scale_factor=0.3611, shift_factor=0.1159, device=options.device)
    for pixels in options.side:
        for record in measure_cuts(autoencoder, pixels, options.device, rounds=options.rounds, clock=options.clock):
            print(record)
            write_record("decoding in strips", {"clock": options.clock, **record}, options.out)


if __name__ == "__main__":
    main()
