"""``uso-engine generate``: pictures from the shell, one request or a file of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .arguments import merged_line, parse_images, parse_lora, parse_size, read_batch
from .console import be_verbose, errors, fail, is_verbose, reports_errors, say, sentence, warn
from .outputs import Outputs, check_outputs, hosted_format, named_output
from .pictures import check_pictures
from .progress import GenerationProgress, LoadingProgress
from .torchrun import follows

if TYPE_CHECKING:
    from uso_engine.api.request import GenerationRequest
    from uso_engine.api.research import ResearchOptions
    from uso_engine.api.result import GenerationResult
    from uso_engine.config import EngineConfig
    from uso_engine.engine import USOEngine
    from uso_engine.imaging.contact_sheet import Captioned
    from uso_engine.profiling.step_work import StepWork

DEMONSTRATION = "uso-tiny"


@reports_errors
def generate(
    prompt: Annotated[
        str | None, typer.Option(help="What to make; may be empty for stylisation that keeps the layout.")
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(help="Content image, then style images: paths or URLs. Repeat; 'none' first: style only."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where to write: .png, .jpg or .webp; default: out.png. Lines of a batch and several images are numbered.",
        ),
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="png, jpg or webp, for a name without an ending; default: the name's.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="A configuration's name or TOML file; default: the embedded demonstration.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="square_hd, portrait_4_3, … or WIDTHxHEIGHT.")] = None,
    keep_size: Annotated[bool | None, typer.Option("--keep-size", help="Keep the content image's shape.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps, 1 to 50.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, 1 to 20.")] = None,
    num_images: Annotated[int | None, typer.Option(help="How many images, 1 to 4.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same image; drawn and printed if -1.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to stay away from; doubles the work.")] = None,
    true_cfg_scale: Annotated[float | None, typer.Option(help="Weight of the prompt against the negative prompt.")] = None,
    style_scale: Annotated[float | None, typer.Option(help="Strength of the style images; 1 is the reference's.")] = None,
    quality: Annotated[
        str | None,
        typer.Option(help="reference (the default), high, fast or draft: measured points with less work."),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="euler (the reference), ab2 or unipc.")] = None,
    shift: Annotated[float | None, typer.Option(help="Shift of the schedule: 1 is even, more stays longer near noise.")] = None,
    cosine: Annotated[float, typer.Option(help="With --shift: share of cosine spacing, 0 to 1.")] = 0.0,
    text_padding: Annotated[
        str | None, typer.Option(help="keep (the reference) or merge: nearly equal rows of a prompt's padding become one.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="PATH or PATH=WEIGHT of a LoRA to merge besides USO's. Repeat.")
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            help="A file of requests, one JSON object per line, instead of --prompt. A line has the fields of a request; what "
            "it leaves out is taken from the options given here, then from the configuration."
        ),
    ] = None,
    contact_sheet: Annotated[Path | None, typer.Option(help="Write references and results in one picture.")] = None,
    response: Annotated[bool, typer.Option("--response", help="Write the response as JSON beside the image.")] = False,
    parameters: Annotated[bool, typer.Option("--parameters", help="Write prompt, seed and settings into the files.")] = False,
    safety_checker: Annotated[
        bool | None,
        typer.Option("--safety-checker/--no-safety-checker", help="Replace unsafe images by black ones; the default."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU if there is one.")] = None,
    attention: Annotated[str, typer.Option(help="Attention backend; see `uso-engine info`.")] = "auto",
    memory_budget: Annotated[
        float | None, typer.Option(help="GPU memory in GiB that may be used; default: what the GPU has free.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is chosen and loaded, and what ran.")] = False,
) -> None:
    """Make images from a prompt, a content image and style images."""
    if (prompt is None) == (batch is None):
        raise fail("give either --prompt or --batch", 2)
    if keep_size and size is not None:
        raise fail("give --size or --keep-size, not both", 2)
    if verbose:
        be_verbose()
    if follows(config or DEMONSTRATION, device, attention):
        return
    path = named_output(output, format_)
    fields: dict[str, object] = {
        "prompt": prompt,
        "images": None if image is None else parse_images(image),
        "image_size": None if size is None else parse_size(size),
        "keep_size": keep_size,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "num_images": num_images,
        "seed": None if seed == -1 else seed,
        "negative_prompt": negative_prompt,
        "true_cfg_scale": true_cfg_scale,
        "style_scale": style_scale,
        "enable_safety_checker": safety_checker,
        "output_format": hosted_format(path),
    }
    given = {name: value for name, value in fields.items() if value is not None}
    outputs = Outputs(path, contact_sheet, response, parameters)
    requests: list[tuple[Outputs, Mapping[str, object]]] = [(outputs, given)]
    if batch is not None:
        lines = [merged_line(given, line) for line in read_batch(batch)]
        requests = [(outputs.of_line(i, line.get("output_format")), line) for i, line in enumerate(lines)]
    check_outputs(outputs, requests, read=batch)
    from uso_engine.config import load_config

    loras = [parse_lora(text) for text in lora or []]
    settings = load_config(config if config is not None else DEMONSTRATION)
    from uso_engine.api.research import ResearchOptions
    from uso_engine.loading.lora_choice import choose_loras

    # Which checks the names.
    research = ResearchOptions(sampler=sampler, shift=shift, cosine=cosine, text_padding=text_padding)  # type: ignore[arg-type]
    # Before minutes of loading. What is read here is not read again while it is held.
    chosen = choose_loras(loras, settings) if loras else None
    if batch is None:  # In a batch one wrong line does not keep the others from being made.
        _check(settings, given, research, quality)
    with load_engine(settings, device, attention, memory_budget) as engine:
        if chosen is not None:
            engine.set_loras(loras)
        failed = _run_all(engine, requests, research, quality, is_batch=batch is not None)
    if failed:
        raise fail(f"{failed} of {len(requests)} requests failed; the images of the others were written")


def _check(settings: EngineConfig, given: Mapping[str, object], research: ResearchOptions, quality: str | None) -> None:
    """Refuse what the engine would refuse once it is loaded."""
    from uso_engine.loading.sampling_choice import choose_sampling, with_quality
    from uso_engine.request_type import request_type_of

    request = request_type_of(settings).model_validate(given)
    _, point = with_quality(settings, request, research, quality)
    choose_sampling(settings, research, point)
    check_pictures(request)


def load_engine(settings: EngineConfig, device: str | None, attention: str, memory_budget: float | None) -> USOEngine:
    """Load an engine, saying what is being loaded, what the embedded model is for, and what waits on the host."""
    if settings.demonstration:
        warn(
            "it shows that everything runs, not what USO can do. "
            "For the real one: uso-engine download uso-flux-dev, then --config uso-flux-dev",
            label=f"{settings.name} is a demonstration model:",
        )
    with LoadingProgress(errors) as progress:
        from uso_engine.engine import USOEngine

        engine = USOEngine.from_config(
            settings, device=device, attention=attention, memory_budget_gib=memory_budget, progress=progress
        )
    if engine.memory_plan is not None:
        say(engine.memory_plan, to=errors)
    return engine


def _run_all(
    engine: USOEngine,
    requests: Sequence[tuple[Outputs, Mapping[str, object]]],
    research: ResearchOptions,
    quality: str | None,
    *,
    is_batch: bool,
) -> int:
    """Run every request; returns how many failed. A single request's error is raised."""
    from uso_engine.errors import USOError

    failed = 0
    for number, (outputs, fields) in enumerate(requests):
        try:
            _run(engine, fields, outputs, research, quality)
        except (USOError, ValueError) as error:
            if not is_batch:
                raise
            failed += 1
            say(sentence(error), label=f"request {number + 1}:", style="bold red", to=errors)
    return failed


def _run(
    engine: USOEngine, fields: Mapping[str, object], outputs: Outputs, research: ResearchOptions, quality: str | None
) -> None:
    request = engine.request_type.model_validate(fields)
    # Before anything is written: a result may take the place of its own content image.
    references = [] if outputs.sheet is None else _open_references(request)
    from uso_engine.profiling.step_work import counted_steps

    with counted_steps(engine.pipeline.transformer) as work, GenerationProgress(errors) as progress:
        result = engine.generate(request, on_step=progress.on_step, research=research, quality=quality)  # type: ignore[arg-type]
    for warning in result.warnings:
        warn(warning)
    paths = result.save(outputs.image, parameters=outputs.parameters)
    if outputs.response:
        _write_response(result, outputs.response_path, paths)
    if outputs.sheet is not None:
        _write_sheet(references, result, outputs.sheet)
        paths = [*paths, outputs.sheet]
    for path, flagged in zip(paths, [*result.has_nsfw_concepts, False], strict=False):
        say(f"{path} (withheld by the safety checker)" if flagged else path)
    stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result.timings.items())
    say(f"seed {result.seed}, {result.width}x{result.height}, attention {'+'.join(result.attention)}; {stages}", to=errors)
    if is_verbose():
        say(_what_ran(engine, result), label="ran:", style="bold", to=errors)
        say(_speed(engine, result, work), label="steps:", style="bold", to=errors)


def _what_ran(engine: USOEngine, result: GenerationResult) -> str:
    """Configuration, tier, kernels, LoRAs, steps and memory plan, from the record that the result keeps."""
    ran = result.parameters
    loras = ", ".join(f"{entry['path']}={entry['weight']:g}" for entry in ran["loras"])  # type: ignore[attr-defined]
    plan = "everything stays in place" if engine.memory_plan is None else " ".join(str(engine.memory_plan).split())
    seconds = sum(result.timings.values())
    return (
        f"{ran['config']} in {ran['tier']} on {engine.device}; kernels {ran['kernels']}; "
        f"attention {'+'.join(result.attention)}; {ran['steps_taken']} steps; LoRAs {loras or 'none'}; memory plan: {plan}; "
        f"{result.tokens_used} tokens in {seconds:.2f} s"
    )


def _speed(engine: USOEngine, result: GenerationResult, work: StepWork) -> str:
    """How near the steps came to the least time that the device could need for them."""
    from uso_engine.profiling.ceilings import known_rates

    rates = known_rates(engine.device, engine.pipeline.transformer.img_in.weight.dtype)
    return work.speed(result.timings["denoise"], rates)


def _write_response(result: GenerationResult, path: Path, images: list[Path]) -> None:
    """The hosted API's JSON beside the images, with the paths just written as URLs."""
    from uso_engine.imaging.atomic import write_atomically
    from uso_engine.imaging.output_formats import output_format_of

    written = iter(images)

    class WrittenFiles:
        """A store whose images are on disk already."""

        def put(self, name: str, data: bytes, content_type: str) -> str:
            return next(written).resolve().as_uri()

    body = result.to_response(WrittenFiles(), output_format=output_format_of(images[0]))
    write_atomically(path, json.dumps(body.model_dump(), indent=1).encode())


def _open_references(request: GenerationRequest) -> list[Captioned]:
    """The request's pictures with their captions."""
    from uso_engine.imaging.open import open_image

    sources = [("content", request.content_image)] if request.content_image is not None else []
    sources += [(f"style {i + 1}", source) for i, source in enumerate(request.style_images)]
    return [(caption, open_image(source, name=caption)) for caption, source in sources]


def _write_sheet(references: list[Captioned], result: GenerationResult, path: Path) -> None:
    from uso_engine.imaging.contact_sheet import contact_sheet
    from uso_engine.imaging.encode import ImageMetadata, save_image

    results = [(f"seed {seed}", picture) for picture, seed in zip(result.images, result.seeds, strict=True)]
    sheet = contact_sheet(references, results, title=result.prompt or "(no prompt)")
    save_image(sheet, path, ImageMetadata(result.model))
