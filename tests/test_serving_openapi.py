"""The server's OpenAPI document, and what comes back for everything that can be made from it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_process import HTTP, Served, double_server, serving, wait_ready


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("openapi")
    command = double_server(folder, 0, "max_images=2", "max_steps=9", "max_pixels=16384", "max_waiting=20", "deadline_s=10.0")
    with serving(command, folder / "log") as running:
        wait_ready(running)
        yield running


def test_the_document_has_the_operators_limits(served: Served) -> None:
    document = HTTP.get(f"{served.url}/openapi.json").json()
    schemas = document["components"]["schemas"]
    hosted, openai = schemas["GenerationRequest"], schemas["OpenAIImageRequest"]
    assert hosted["required"] == ["model", "prompt", "image_urls"] and hosted["additionalProperties"] is False
    properties = hosted["properties"]
    assert (properties["num_images"]["maximum"], openai["properties"]["n"]["maximum"]) == (2, 2)
    assert (properties["num_inference_steps"]["maximum"], properties["num_inference_steps"]["default"]) == (9, 9)
    size = properties["image_size"]["anyOf"]
    assert size[0]["enum"] == [] and size[1]["properties"]["width"]["maximum"] == 1024
    assert "16384" in size[1]["description"]
    assert properties["prompt"]["maxLength"] == 4000
    assert set(schemas["FalRequest"]["properties"]) > {"input_image_urls", "image_urls", "prompt"}
    with_422 = [path for path, operations in document["paths"].items() if "'422'" in str(operations)]
    assert with_422 == ["/queue/{owner}/{name}"] and "securitySchemes" not in document["components"]
    submitting = document["paths"]["/queue/{owner}/{name}"]["post"]
    assert "Idempotency-Key was used" in submitting["responses"]["422"]["description"]
    assert [one["schema"]["anyOf"][0]["pattern"] for one in submitting["parameters"] if one["in"] == "header"] == [
        "^[!-~]{1,255}$"
    ]


def test_every_reference_leads_somewhere(served: Served) -> None:
    document = HTTP.get(f"{served.url}/openapi.json")
    names = set(re.findall(r'"#/components/schemas/(\w+)"', document.text))
    assert names and names <= set(document.json()["components"]["schemas"])


def test_generated_requests_get_documented_answers(served: Served, tmp_path: Path) -> None:
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"]
    command += ["--phases", "fuzzing", "--max-examples", "12", "--seed", "1", "--request-timeout", "30", "--no-color"]
    command += ["--checks", f"{checks},negative_data_rejection", "--generation-database", "none"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout
    statuses = {line.get("status") for line in served.lines()}
    assert {201, 400, 404} <= statuses and not any(isinstance(status, int) and status >= 500 for status in statuses)
