"""Measure what each deliberate difference from the authors' code does to the answer, on the small reference model.

    python -m benchmarks.fidelity.faithfulness

Every record is a relative error ||a - b|| / ||b||: of the last latent, of the autoencoder's latent for the posterior, of
attention's output, or the largest over all tensors of the cases in tests/reference. Weights are random, except where a
record says uso-tiny, so the figures are those of the arithmetic, not of pictures.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.arguments import BenchmarkParser
from benchmarks.measure import write_record
from uso_engine import USOEngine
from uso_engine.imaging.pixels import to_pixels
from uso_engine.imaging.resize import resize_content
from uso_engine.loading.assembly import load_autoencoder, load_pipeline
from uso_engine.model.params import TransformerParams
from uso_engine.pipeline import Pipeline
from uso_engine.sampling.admission import Conditions
from uso_engine.sampling.settings import DenoiseSettings
from uso_engine.verification.case import CaseSettings
from uso_engine.verification.measure import FLOAT32_BOUND, relative_error
from uso_engine.verification.run import VerifyOptions, verify
from uso_engine.verification.small_model import write_small_autoencoder, write_small_model
from uso_engine.weights.autoencoder_keys import AutoencoderParams
from uso_kernels.attention import attention
from uso_kernels.ragged import Ragged

SETTINGS = CaseSettings(
    width=128, height=96, refs=((16, 12),), styles=1, steps=28, guidance=4.0, seed=7, guidance_embed=True, lora=True
)


def drawn_conditions(params: TransformerParams) -> Conditions:
    """Random text, style and content of the small model's widths."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    style = normal(24, params.hidden_size)
    content = normal(16, *SETTINGS.refs[0])
    return Conditions(normal(32, params.context_in_dim), normal(params.vec_in_dim), (style,), (content,))


def last_latent(pipeline: Pipeline, *, reference_numerics: bool = False, sigmas: tuple[float, ...] | None = None) -> Tensor:
    """The latent after 28 steps."""
    settings = DenoiseSettings(
        width=SETTINGS.width,
        height=SETTINGS.height,
        seeds=(SETTINGS.seed,),
        steps=SETTINGS.steps,
        sigmas=sigmas,
        reference_numerics=reference_numerics,
    )
    return pipeline.denoise(drawn_conditions(pipeline.transformer.params), settings).latents


def measure() -> list[dict[str, object]]:
    """All records."""
    with tempfile.TemporaryDirectory() as folder:
        half = replace_dtype(SETTINGS, "bfloat16")
        config = write_small_model(half, Path(folder))
        # The same bfloat16 weights, once computed with in float32 (the truth of those weights) and once in bfloat16.
        exact = load_pipeline(config, device="cpu", tier="float32")
        rounded = load_pipeline(config, device="cpu", tier="bf16")
        truth = last_latent(exact)
        ours = last_latent(rounded)
        authors = last_latent(rounded, reference_numerics=True)
        threads = between_threads(lambda: last_latent(exact))
    with USOEngine.from_config("uso-tiny", device="cpu") as engine:
        content = between_threads(lambda: engine.pipeline.autoencoder.encode(gradient()))
        request = between_threads(lambda: latent_of_a_request(engine))
    autoencoder_mean, autoencoder_sample = posterior()
    return [
        record("the engine in float32", "largest error of any tensor in tests/reference", worst_float32_error()),
        record("float32 time and latents", "bf16 engine against float32 engine, same weights", relative_error(ours, truth)),
        record("bfloat16 time and latents", "reference_numerics against float32 engine", relative_error(authors, truth)),
        record("float32 against bfloat16 time", "bf16 engine against reference_numerics", relative_error(ours, authors)),
        record("number of threads", "float32 engine on two threads against one, 28 steps", threads),
        record("number of threads", "autoencoder's latent of a content image, float32, uso-tiny", content),
        record("number of threads", "last latent with that content image, bfloat16, uso-tiny, 28 steps", request),
        record("posterior mean", "a seeded sample against the mean", relative_error(autoencoder_sample, autoencoder_mean)),
        *(
            record(f"{backend} attention in bfloat16", "against float64, 2752 tokens, 8 heads of 128", attention_error(backend))
            for backend in ("chunked", "dense")
        ),
    ]


def between_threads(compute: Callable[[], Tensor]) -> float:
    """What a second thread changes: libraries divide some sums among threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    return relative_error(results[1], results[0])


def gradient() -> Tensor:
    """Pixels of a content image."""
    return to_pixels(resize_content(Image.linear_gradient("L").convert("RGB"), long_side=128))


def latent_of_a_request(engine: USOEngine) -> Tensor:
    """The last latent of a request with a content image that is encoded anew."""
    pipeline = engine.pipeline
    text = pipeline.encode_prompt("a house")
    conditions = pipeline.conditions(text, content=[pipeline.autoencoder.encode(gradient())])
    settings = DenoiseSettings(width=SETTINGS.width, height=SETTINGS.height, seeds=(SETTINGS.seed,), steps=SETTINGS.steps)
    return pipeline.denoise(conditions, settings).latents


def worst_float32_error() -> float:
    """The largest relative error of the float32 cases that come with the tests."""
    cases = Path(__file__).resolve().parents[2] / "tests" / "reference"
    return max(check.error for check in verify(cases, VerifyOptions()) if check.bound == FLOAT32_BOUND)


def attention_error(backend: str) -> float:
    """Error of one sequence's attention in bfloat16, on queries and keys as large as QK-norm leaves them."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2752, 8, 128, generator=generator).to(torch.bfloat16) for _ in range(3))
    layout = Ragged.pack([2752])
    exact = attention(q.double(), k.double(), v.double(), layout, layout, backend="dense")
    return relative_error(attention(q, k, v, layout, layout, backend=backend), exact)


def replace_dtype(settings: CaseSettings, dtype: str) -> CaseSettings:
    """The same case in another precision."""
    return CaseSettings.model_validate({**settings.model_dump(), "dtype": dtype})


def posterior() -> tuple[Tensor, Tensor]:
    """Latent of a picture as the posterior's mean and as a sample."""
    with tempfile.TemporaryDirectory() as folder:
        params = replace(AutoencoderParams(), ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, resolution=64)
        section, path = write_small_autoencoder(params, "", Path(folder))
        autoencoder = load_autoencoder(section, path, device="cpu")
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return autoencoder.encode(pixels), autoencoder.encode(pixels, sample_seed=1)


def record(difference: str, compared: str, error: float) -> dict[str, object]:
    """One record."""
    machine = f"{platform.machine()}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    return {"difference": difference, "compared": compared, "relative_error": error, "on": machine}


def main(arguments: Sequence[str] | None = None) -> None:
    options = BenchmarkParser(__doc__, "out").read(arguments)
    for entry in measure():
        print(entry, flush=True)
        write_record("faithfulness", entry, options.out)


if __name__ == "__main__":
    main()
