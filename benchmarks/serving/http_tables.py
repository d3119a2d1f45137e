"""The tables of docs/http-api.md, from the server's own OpenAPI document and command line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import typer

import uso_engine.cli.serve  # noqa: F401  adds its commands
from benchmarks.documents import Table, markdown
from benchmarks.measure import RESULTS
from benchmarks.records import Record, hardware, latest
from uso_engine.cli.app import app as command_line
from uso_engine.config import load_config
from uso_engine.serving.app import make_application
from uso_engine.serving.served_engine import ServedEngine
from uso_engine.serving.settings import ServerSettings
from uso_engine.serving.storage import open_storage

CONFIG = "uso-flux-dev"
Schema = dict[str, Any]


@asynccontextmanager
async def _no_engine() -> AsyncIterator[ServedEngine]:
    raise RuntimeError("the document needs no engine")
    yield


@cache
def document() -> Schema:
    """The OpenAPI document of a server with keys and the defaults of everything else."""
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(Path(folder).as_uri())
        return make_application(load_config(CONFIG), ServerSettings(has_keys=True), _no_engine, storage).document()


def fields_table(name: str) -> str:
    schema = document()["components"]["schemas"][name]
    required = schema.get("required", ())
    rows = [
        [f"`{field}`", _type(found), "required" if field in required else _default(found), _line(found.get("description", ""))]
        for field, found in schema["properties"].items()
    ]
    return markdown(["field", "type", "default", "meaning"], rows)


def hosted_table(records: list[Record]) -> str:
    return fields_table("GenerationRequest")


def openai_table(records: list[Record]) -> str:
    return fields_table("OpenAIImageRequest")


def edit_table(records: list[Record]) -> str:
    schema = document()["components"]["schemas"]
    known = schema["OpenAIImageRequest"]["properties"]
    rows = [
        [f"`{field}`", "file, or up to three" if field == "image" else _type(found), _line(found.get("description", ""))]
        for field, found in schema["OpenAIEditRequest"]["properties"].items()
        if field not in known
    ]
    return markdown(["field", "type", "meaning"], rows)


def answer_table(records: list[Record]) -> str:
    schemas = document()["components"]["schemas"]
    rows = []
    for name in ("GenerationResponse", "ImageObject", "DataObject", "OpenAIImages", "FalTicket", "FalStatus", "ErrorBody"):
        for field, found in schemas[name]["properties"].items():
            rows.append([name, f"`{field}`", _type(found), _line(found.get("description", ""))])
    return markdown(["schema", "field", "type", "meaning"], rows)


def routes_table(records: list[Record]) -> str:
    rows = [
        [f"`{method.upper()} {path}`", _line(operation.get("description", ""))]
        for path, operations in document()["paths"].items()
        for method, operation in operations.items()
    ]
    return markdown(["route", "what it does"], rows)


def errors_table(records: list[Record]) -> str:
    from uso_engine.serving.openapi import ERRORS, KEY_REUSED

    described = sorted((str(status), str(found["description"])) for status, found in (ERRORS | KEY_REUSED).items())
    return markdown(["status", "when"], [list(one) for one in described])


def options_table(records: list[Record]) -> str:
    command = typer.main.get_command(command_line)
    rows = []
    for parameter in command.commands["serve"].params:  # type: ignore[attr-defined]
        given = parameter.default
        shown = f"{given:g}" if isinstance(given, int | float) and not isinstance(given, bool) else str(given or "")
        rows.append([f"`{parameter.opts[0]}`", shown, _line(getattr(parameter, "help", "") or "")])
    return markdown(["option", "default", "meaning"], [row for row in rows if row[0] != "`--help`"])


def overhead_table(records: list[Record]) -> str:
    rows = [
        [hardware(one), *(f"{one['sides'][side]['median_ms']:.1f}" for side in ("engine", "HTTP")), f"{one['overhead_ms']:.1f}"]
        for one in latest(records)
    ]
    return markdown(["machine", "engine, ms", "over HTTP, client included, ms", "difference, ms"], rows)


def soak_table(records: list[Record]) -> str:
    rows = []
    for path in sorted((RESULTS / "soak").glob("*.json")):
        found = json.loads(path.read_text())
        # The first tenth is when caches and pools fill.
        settled = [one["resident_mib"] for one in found["samples"][len(found["samples"]) // 10 :]]
        answers = ", ".join(f"{status}: {count}" for status, count in found["statuses"].items())
        memory = f"{min(settled):.0f} to {max(settled):.0f}"
        rows.append([str(found["clients"]), f"{found['seconds'] / 60:g}", answers, memory, hardware(found)])
    return markdown(["clients", "minutes", "answers by status", "resident MiB", "machine"], rows)


def _type(schema: Schema) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return "one of " + ", ".join(f"`{one}`" for one in schema["enum"])
    if "anyOf" in schema:
        return ", or ".join(dict.fromkeys(_type(one) for one in schema["anyOf"]))
    kinds = schema.get("type", "any")
    kind = " or ".join(kinds) if isinstance(kinds, list) else str(kinds)
    if kind == "array":
        inner = _type(schema["items"]) if "items" in schema else "values"
        return f"list of {inner}" + (f", at most {schema['maxItems']}" if "maxItems" in schema else "")
    if kind == "object" and set(schema.get("properties", ())) == {"width", "height"}:
        side = schema["properties"]["width"]
        return f"`{{width, height}}`, each from {side['minimum']} to {side['maximum']}"
    limits = [f"{schema[name]}" for name in ("minimum", "maximum") if name in schema]
    if len(limits) == 2:
        return f"{kind} from {limits[0]} to {limits[1]}"
    return f"{kind}, at most {schema['maxLength']} characters" if "maxLength" in schema else kind


def _default(schema: Schema) -> str:
    if "default" not in schema:
        return ""
    return f"`{json.dumps(schema['default'])}`"


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


HTTP_TABLES = tuple(
    Table("docs/http-api.md", marker, benchmarks, make)
    for marker, benchmarks, make in (
        ("http routes", (), routes_table),
        ("http hosted", (), hosted_table),
        ("http openai", (), openai_table),
        ("http edit", (), edit_table),
        ("http answers", (), answer_table),
        ("http errors", (), errors_table),
        ("http options", (), options_table),
        ("http overhead", ("serving overhead",), overhead_table),
        ("http soak", (), soak_table),
    )
)
