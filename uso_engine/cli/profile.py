"""``uso-engine profile``: what one request's time goes to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import parse_images, parse_size
from .console import errors, reports_errors, say
from .generate import DEMONSTRATION, load_engine
from .outputs import check_writable
from .pictures import check_pictures
from .progress import GenerationProgress
from .torchrun import follows


@reports_errors
def profile(
    prompt: Annotated[str, typer.Option(help="What to make.")] = "a house by the sea",
    image: Annotated[
        list[str] | None,
        typer.Option(help="Content image, then style images: paths or URLs. Repeat; 'none' first: style only."),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="A configuration's name or TOML file; default: the embedded demonstration.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="square_hd, portrait_4_3, … or WIDTHxHEIGHT.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps; few are enough, and traces of many are large.")] = 2,
    trace: Annotated[Path, typer.Option(help="Where the trace goes, for chrome://tracing or Perfetto.")] = Path("profile.json"),
    table: Annotated[Path | None, typer.Option(help="Write the table to a file too.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU if there is one.")] = None,
    attention: Annotated[str, typer.Option(help="Attention backend; see `uso-engine info`.")] = "auto",
    memory_budget: Annotated[
        float | None, typer.Option(help="GPU memory in GiB that may be used; default: what the GPU has free.")
    ] = None,
) -> None:
    """Profile one request: a trace, and the steps' time by class of kernel beside the least that each class needs.

    On a CPU operations stand in for kernels. The request runs twice, so that nothing is compiled while it is profiled.
    """
    if follows(config or DEMONSTRATION, device, attention):
        return
    for path in (trace, *([] if table is None else [table])):
        check_writable(path)
    if table is not None and table.resolve() == trace.resolve():
        raise ValueError(f"--table and --trace name the same file, {trace}")
    from uso_engine.config import load_config
    from uso_engine.request_type import request_type_of

    settings = load_config(config if config is not None else DEMONSTRATION)
    fields: dict[str, object] = {"prompt": prompt, "num_inference_steps": steps, "seed": 1, "enable_safety_checker": False}
    fields |= {} if image is None else {"images": parse_images(image)}
    fields |= {} if size is None else {"image_size": parse_size(size)}
    request = request_type_of(settings).model_validate(fields)
    check_pictures(request)
    with load_engine(settings, device, attention, memory_budget) as engine:
        from uso_engine.imaging.atomic import write_atomically
        from uso_engine.profiling.request_profile import profile_request

        with GenerationProgress(errors) as progress:
            found = profile_request(engine, request, progress.on_step)
    found.write_trace(trace)
    text = found.table()
    if table is not None:
        write_atomically(table, text.encode())
    for line in text.splitlines():
        say(line)
    say(trace if table is None else f"{trace}\n{table}")
