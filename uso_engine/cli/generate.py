"""``uso-engine generate``: pictures from the shell, one request or a file of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import app, console, errors, escaped, fail, reports_errors, sentence
from .arguments import check_output, parse_lora, parse_size, read_batch
from .progress import GenerationProgress, LoadingProgress

if TYPE_CHECKING:
    from uso_engine.engine import USOEngine
    from uso_engine.result import GenerationResult

DEMONSTRATION = "uso-tiny"


@dataclass(frozen=True)
class Outputs:
    """Where a request's results go.

    Args:
        image: path of the image; several get -0, -1 … before the ending.
        sheet: path of the contact sheet, if one is wanted.
        response: whether the response as JSON is written beside the image.
        parameters: whether the files say what made them.
    """

    image: Path
    sheet: Path | None
    response: bool
    parameters: bool


@app.command()
@reports_errors
def generate(
    prompt: Annotated[
        str | None, typer.Option(help="What to make; may be empty for stylisation that keeps the layout.")
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(help="Content image, then style images: paths or URLs. Repeat; 'none' first: style only."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write: .png or .jpg.")] = Path("out.png"),
    config: Annotated[
        str | None, typer.Option(help="A configuration's name or TOML file; default: the embedded demonstration.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="square_hd, portrait_4_3, … or WIDTHxHEIGHT.")] = None,
    keep_size: Annotated[bool, typer.Option("--keep-size", help="Keep the content image's shape.")] = False,
    steps: Annotated[int | None, typer.Option(help="Denoising steps, 1 to 50.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, 1 to 20.")] = None,
    num_images: Annotated[int, typer.Option(help="How many images, 1 to 4.")] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same image; drawn and printed if left out.")] = None,
    negative_prompt: Annotated[str, typer.Option(help="What to stay away from; doubles the work.")] = "",
    true_cfg_scale: Annotated[float | None, typer.Option(help="Weight of the prompt against the negative prompt.")] = None,
    style_scale: Annotated[float | None, typer.Option(help="Strength of the style images; 1 is the reference's.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="PATH or PATH=WEIGHT of a LoRA to merge besides USO's. Repeat.")
    ] = None,
    batch: Annotated[
        Path | None, typer.Option(help="A file of requests, one JSON object per line, instead of --prompt.")
    ] = None,
    contact_sheet: Annotated[Path | None, typer.Option(help="Write references and results in one picture.")] = None,
    response: Annotated[bool, typer.Option("--response", help="Write the response as JSON beside the image.")] = False,
    parameters: Annotated[bool, typer.Option("--parameters", help="Write prompt, seed and settings into the files.")] = False,
    safety_checker: Annotated[bool, typer.Option(help="Replace unsafe images by black ones.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU if there is one.")] = None,
    attention: Annotated[str, typer.Option(help="Attention backend; see `uso-engine info`.")] = "auto",
    memory_budget: Annotated[
        float | None, typer.Option(help="GPU memory in GiB that may be used; default: what the GPU has free.")
    ] = None,
) -> None:
    """Make images from a prompt, a content image and style images."""
    if (prompt is None) == (batch is None):
        raise fail("give either --prompt or --batch", 2)
    check_output(output, contact_sheet)
    if batch is not None:
        requests = read_batch(batch)
    else:
        sources: list[str | None] = [None if name.lower() == "none" and i == 0 else name for i, name in enumerate(image or [])]
        fields: dict[str, object] = {
            "prompt": prompt,
            "images": sources,
            "image_size": None if size is None else parse_size(size),
            "keep_size": keep_size,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "num_images": num_images,
            "seed": seed,
            "negative_prompt": negative_prompt,
            "true_cfg_scale": true_cfg_scale,
            "style_scale": style_scale,
            "enable_safety_checker": safety_checker,
            "output_format": "png" if output.suffix.lower() == ".png" else "jpeg",
        }
        requests = [{name: value for name, value in fields.items() if value is not None}]
    loras = [parse_lora(text) for text in lora or []]
    engine = _load(config, device, attention, memory_budget)
    with engine:
        if loras:
            engine.set_loras(loras)
        failed = _run_all(engine, requests, Outputs(output, contact_sheet, response, parameters), is_batch=batch is not None)
    if failed:
        raise fail(f"{failed} of {len(requests)} requests failed; the images of the others were written")


def _load(config: str | None, device: str | None, attention: str, memory_budget: float | None) -> USOEngine:
    from uso_engine.config import load_config

    settings = load_config(config if config is not None else DEMONSTRATION)
    if settings.demonstration:
        errors.print(
            f"[yellow]{settings.name} is a demonstration model:[/] it shows that everything runs, not what USO can do. "
            "For the real one: uso-engine download uso-flux-dev, then --config uso-flux-dev",
            highlight=False,
            soft_wrap=True,
        )
    with LoadingProgress(errors) as progress:
        from uso_engine.engine import USOEngine

        engine = USOEngine.from_config(
            settings, device=device, attention=attention, memory_budget_gib=memory_budget, progress=progress
        )
    if engine.memory_plan is not None:
        errors.print(str(engine.memory_plan), highlight=False, markup=False, soft_wrap=True)
    return engine


def _run_all(engine: USOEngine, requests: list[dict[str, object]], outputs: Outputs, *, is_batch: bool) -> int:
    """Run every request; returns how many failed. A single request's error is raised."""
    from uso_engine.errors import USOError

    failed = 0
    for number, fields in enumerate(requests):
        target = outputs
        if is_batch:
            stem = f"{outputs.image.stem}-{number + 1:04d}"
            sheet = None if outputs.sheet is None else outputs.sheet.with_stem(f"{outputs.sheet.stem}-{number + 1:04d}")
            target = Outputs(outputs.image.with_stem(stem), sheet, outputs.response, outputs.parameters)
        try:
            _run(engine, fields, target)
        except (USOError, ValueError) as error:
            if not is_batch:
                raise
            failed += 1
            errors.print(f"[bold red]request {number + 1}:[/] {escaped(sentence(error))}", highlight=False, soft_wrap=True)
    return failed


def _run(engine: USOEngine, fields: dict[str, object], outputs: Outputs) -> None:
    request = engine.request_type.model_validate(fields)
    with GenerationProgress(errors) as progress:
        result = engine.generate(request, on_step=progress.on_step)
    for warning in result.warnings:
        errors.print(f"[yellow]warning:[/] {escaped(warning)}", highlight=False, soft_wrap=True)
    paths = result.save(outputs.image, parameters=outputs.parameters)
    if outputs.response:
        _write_response(result, outputs.image, paths)
    if outputs.sheet is not None:
        _write_sheet(engine, fields, result, outputs.sheet)
        paths = [*paths, outputs.sheet]
    stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result.timings.items())
    for path, flagged in zip(paths, [*result.has_nsfw_concepts, False], strict=False):
        note = " [yellow](withheld by the safety checker)[/]" if flagged else ""
        console.print(f"{path}{note}", highlight=False, soft_wrap=True)
    errors.print(
        f"seed {result.seed}, {result.width}x{result.height}, attention {'+'.join(result.attention)}; {stages}",
        highlight=False,
        soft_wrap=True,
    )


def _write_response(result: GenerationResult, image: Path, paths: list[Path]) -> None:
    """The hosted API's JSON beside the images, with the paths just written as URLs."""
    from uso_engine.imaging.atomic import write_atomically

    written = iter(paths)

    class WrittenFiles:
        """A store whose images are on disk already."""

        def put(self, name: str, data: bytes, content_type: str) -> str:
            return next(written).resolve().as_uri()

    body = result.to_response(WrittenFiles())
    write_atomically(image.with_suffix(".json"), json.dumps(body.model_dump(), indent=1).encode())


def _write_sheet(engine: USOEngine, fields: dict[str, object], result: GenerationResult, path: Path) -> None:
    from uso_engine.imaging.contact_sheet import Captioned, contact_sheet
    from uso_engine.imaging.encode import ImageMetadata, save_image
    from uso_engine.imaging.open import open_image

    request = engine.request_type.model_validate(fields)
    references: list[Captioned] = []
    if request.content_image is not None:
        references.append(("content", open_image(request.content_image)))
    references += [(f"style {i + 1}", open_image(source)) for i, source in enumerate(request.style_images)]
    results = [(f"seed {seed}", picture) for picture, seed in zip(result.images, result.seeds, strict=True)]
    sheet = contact_sheet(references, results, title=result.prompt or "(no prompt)")
    save_image(sheet, path, ImageMetadata(result.model))
