"""Every memory plan at full size, carried out on a GPU under a cap of its budget: the peak has to stay under it.

    python -m benchmarks.memory.plans --config uso-flux-dev-fp8 --budget 24 --budget 16 --budget 12 --budget 8

Weights are zeros of the right types and sizes: memory and transfers do not depend on their values. All phases of a request run,
with two denoising steps, which reach the peak as 28 do (the modulation table is made for all of them), but for the safety
classifier. On a CPU it rehearses a tiny model, without a cap.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks.arguments import BenchmarkParser, amount
from benchmarks.encoders import autoencoder_module, encoder_sizes, text_modules, vision_module
from benchmarks.measure import write_record
from benchmarks.workload import Workload, conditions, random_inputs
from uso_engine.conditioning.content import Autoencoder
from uso_engine.conditioning.offloadable_part import OffloadablePart, attention_working_bytes
from uso_engine.conditioning.style import StyleEncoder
from uso_engine.config import EngineConfig, load_config
from uso_engine.model.projector import StyleProjector
from uso_engine.model.transformer import Transformer
from uso_engine.offload.budget import MemoryBudget, formats_of, usual_request_size
from uso_engine.offload.phases import GIB
from uso_engine.offload.placement import Placement, carry_out, decoding_of, strips_of
from uso_engine.offload.sizes import restores_weight
from uso_engine.precision.text_encoder import quantize_text_encoder
from uso_engine.precision.tiers import QUANTIZED_TIERS, TIERS
from uso_engine.precision.transformer import DTYPES, quantized_transformer
from uso_engine.sampling.admission import admit
from uso_engine.sampling.job import ImageJob
from uso_engine.sampling.run import DenoisingRun
from uso_engine.sampling.schedule import schedule

STEPS = 2


def _zeros(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Gives a module built without memory zeros on the host."""
    module.to(dtype).to_empty(device="cpu").requires_grad_(False).eval()
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.view(torch.uint8).zero_() if tensor.ndim else tensor.data.zero_()


def settings_for(name: str, workload: Workload) -> EngineConfig:
    """A configuration with the sizes of a workload."""
    config = load_config(name)
    if workload.name == "full":
        return config
    transformer = config.transformer.model_copy(update={"params": workload.params})
    rows, columns = workload.grid
    defaults = config.defaults.model_copy(update={"width": 16 * columns, "height": 16 * rows, "steps": workload.steps})
    content = config.content.model_copy(update={"long_side": 16 * max(workload.content)})
    return config.model_copy(update={"transformer": transformer, "defaults": defaults, "content": content})


TIER_CONFIGS = ["uso-flux-dev", *(f"uso-flux-dev-{tier}" for tier in QUANTIZED_TIERS)]
"""The configuration of every tier for the public models."""


def text_parts(config: EngineConfig, workload: Workload) -> list[tuple[OffloadablePart, nn.Module, int]]:
    """T5 and CLIP: the part, the encoder and its tokens."""
    t5, clip = text_modules(encoder_sizes(workload))
    for encoder in (t5, clip):
        _zeros(encoder, torch.bfloat16)
    # Filling undid the tie that the checkpoint has.
    t5.encoder.embed_tokens.weight = t5.shared.weight
    chosen = TIERS[config.precision.text_encoder].text_encoder or "float"
    if chosen != "float":
        quantize_text_encoder(t5, config.precision.text_encoder)
    wide, small = t5.config, clip.config
    working = attention_working_bytes(workload.text, wide.num_heads, wide.d_model, wide.d_ff, 2)
    working += 2 * wide.d_model * wide.d_ff if restores_weight(chosen) else 0
    little = attention_working_bytes(77, small.num_attention_heads, small.hidden_size, small.intermediate_size, 2)
    return [
        (OffloadablePart("T5", [t5], list(t5.encoder.block), working), t5, workload.text),
        (OffloadablePart("CLIP", [clip], list(clip.encoder.layers), little), clip, 77),
    ]


def style_encoder(config: EngineConfig, workload: Workload) -> StyleEncoder:
    """SigLIP and the projector."""
    vision = vision_module(encoder_sizes(workload))
    _zeros(vision)
    patches = vision.embeddings.num_patches
    projector = StyleProjector(
        patches,
        vision.config.hidden_size,
        max(1, workload.style // 3),
        config.transformer.params.hidden_size,
        device="meta",
        dtype=torch.bfloat16,
    )
    _zeros(projector)
    return StyleEncoder(vision, projector)


@torch.no_grad()
def measure_within(config: EngineConfig, workload: Workload, budget_gib: float, device: torch.device) -> dict[str, object]:
    """Place everything within a budget, run a request and say what it took."""
    tier = config.precision.tier
    transformer = quantized_transformer(config.transformer.params, formats_of(config, tier), dtype=DTYPES[TIERS[tier].dtype])
    _zeros(transformer)
    texts, style = text_parts(config, workload), style_encoder(config, workload)
    module = autoencoder_module(encoder_sizes(workload))
    _zeros(module)
    decodes_in_bf16 = config.autoencoder is not None and config.autoencoder.decode_dtype == "bf16"
    decode_dtype = torch.bfloat16 if decodes_in_bf16 else torch.float32
    autoencoder = Autoencoder(module, scale_factor=0.3611, shift_factor=0.1159, decode_dtype=decode_dtype)
    parts = [*(part for part, _, _ in texts), *style.parts, *autoencoder.parts]
    measure = _capped(budget_gib, device)
    budget = MemoryBudget(int(budget_gib * GIB), binding=True)
    placement = carry_out(config, tier, budget, transformer=transformer, parts=parts, autoencoder=autoencoder, device=device)
    start = time.perf_counter()
    for part, encoder, tokens in texts:
        with part.running():
            encoder(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=device))
    style.encode(torch.zeros(1, 3, style.image_side, style.image_side))
    work = usual_request_size(config)
    autoencoder.encode(torch.zeros(1, 3, work.content_side, work.content_side))
    _denoise(transformer, workload, config, placement, device)
    latents = torch.zeros(1, 16, work.height // 8, work.width // 8)
    autoencoder.decode(latents, strips_of(decoding_of(latents, autoencoder, placement), autoencoder))
    seconds = time.perf_counter() - start
    peak = measure()
    plan = placement.plan
    return {
        "tier": tier,
        "text_encoder": config.precision.text_encoder,
        "budget_gib": budget_gib,
        "planned_peak_gib": plan.peak_bytes / GIB,
        "peak_gib": peak,
        "streamed": sorted(plan.streamed),
        "blocks": len(plan.streamed_double_blocks) + len(plan.streamed_single_blocks),
        "decoding": plan.decoding,
        "moved_gb": placement.moved_bytes / 1e9,
        "seconds": seconds,
        "steps": STEPS,
    }


def _denoise(
    transformer: Transformer, workload: Workload, config: EngineConfig, placement: Placement, device: torch.device
) -> None:
    inputs = random_inputs(workload, device, torch.bfloat16)
    rows, columns = workload.grid
    sigmas = schedule(config.defaults.steps, 16 * columns, 16 * rows)
    sequence = admit(transformer, conditions(inputs), inputs.grid, sigmas, inputs.guidance)
    noise = torch.randn(16, 2 * rows, 2 * columns)
    denoiser = DenoisingRun(transformer, [ImageJob(sequence, noise, tuple(sigmas))])
    for _ in range(STEPS):
        denoiser.step()
    placement.end_denoising()


def _capped(budget_gib: float, device: torch.device) -> Callable[[], float | None]:
    """Sets the cap; returns what reads the peak in GiB, the CUDA context included."""
    if device.type != "cuda":
        return lambda: None
    gc.collect()
    torch.cuda.empty_cache()
    torch.zeros(1, device=device)

    def context() -> int:
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device)

    capacity = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction((budget_gib * GIB - context()) / capacity, device)
    torch.cuda.reset_peak_memory_stats(device)

    def read() -> float:
        torch.cuda.synchronize(device)
        # Again: kernels are loaded as they are used, and take memory of the context.
        return (torch.cuda.max_memory_reserved(device) + context()) / GIB

    return read


def main(arguments: Sequence[str] | None = None) -> None:
    parser = BenchmarkParser(__doc__, "workload", "device", "out")
    parser.add_argument("--config", action="append", help="repeat; by default uso-flux-dev and its quantised tiers")
    parser.add_argument("--budget", action="append", type=amount, metavar="GIB", help="repeat; by default 24, 16, 12 and 8")
    options = parser.read(arguments)
    names = options.config or TIER_CONFIGS
    over = []
    for name in names:
        for budget in options.budget or [24.0, 16.0, 12.0, 8.0]:
            record = measure_within(settings_for(name, options.workload), options.workload, budget, options.device)
            named = {"workload": options.workload.name, "device": options.device.type, **record}
            write_record("memory_plan", named, options.out)
            print(name, record)
            peak = record["peak_gib"]
            if isinstance(peak, float) and peak > budget:
                over.append(f"{name} at {budget:g} GiB took {peak:.2f}")
            gc.collect()
    if over:
        raise SystemExit("over budget: " + "; ".join(over))


if __name__ == "__main__":
    main()
