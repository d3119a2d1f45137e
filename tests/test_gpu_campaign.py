"""The GPU campaigns at tiny size: every part gives its numbers, and one that fails, hangs or dies is seen and stops none."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import summary, tables, together
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.campaign import Campaign
from benchmarks.gpu.plan import CAMPAIGNS, Part
from benchmarks.gpu.steps import timed
from benchmarks.gpu.variants import BESIDE, VARIANTS, Made, Variant, compare
from benchmarks.measure import interleave, output_hash, tree_hash
from benchmarks.records import load, take
from benchmarks.step.engine_way import Evaluate
from benchmarks.step.prediction import predicted_step_ms, text_beside
from benchmarks.workload import WORKLOADS, Workload
from uso_engine.model.params import TransformerParams
from uso_engine.model.roofline import GPUS, Tokens, floor_ms
from uso_kernels.attention import choose_backend
from uso_kernels.cpu import activates

LIMITS_S = {"first": 540, "second": 240}
TINY = WORKLOADS["tiny"]
CHOSEN = choose_backend(torch.device("cpu"), torch.bfloat16, 1)
"""What this CPU computes attention with."""
MODULES = sorted({part.name for make in CAMPAIGNS.values() for part in make("tiny") if not part.commands})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("campaign")


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, dict[str, Any]]:
    """Every part's results, run in this process one after another."""
    found = {}
    for name in MODULES:
        path = out / f"{name}.json"
        bench = Bench(name, TINY, TINY, torch.device("cpu"), out, path)
        with torch.no_grad():
            importlib.import_module(f"benchmarks.gpu.{name}").run(bench)
        bench.finish()
        found[name] = json.loads(path.read_text())
    return found


def test_rates_of_every_product_and_attention(results: dict[str, dict[str, Any]]) -> None:
    products = results["rates"]["products, TFLOP/s"]
    assert {"linear1 96x896x128", "linear2 96x128x640", "text qkv 32x384x128", "image mlp.2 64x128x512"} <= set(products)
    for ways in products.values():
        assert set(ways) == {"bf16", "gelu", "fp8", "int8"}
        assert all(isinstance(rate, float) and rate > 0 for rate in ways.values())
    attention = results["rates"]["attention, TFLOP/s"]
    assert set(attention["chunked"]) == {"values apart", "values in place"}
    assert "CUDA" in attention["varlen"]


def test_steps_are_compared_and_hashed(results: dict[str, dict[str, Any]]) -> None:
    steps = results["steps"]
    outputs = steps["outputs"]
    assert set(steps["ms"]) == {"diffusers", "ours, auto", "ours, dense", "ours, chunked"}
    assert set(steps["ms, beside compiled"]) == {"diffusers", "diffusers compiled", "ours, auto"}
    assert outputs["diffusers"]["difference"] == 0
    assert outputs["diffusers compiled"]["hash"] == outputs["diffusers"]["hash"]
    assert outputs["ours, auto"]["hash"] == outputs[f"ours, {CHOSEN}"]["hash"]
    assert outputs["ours, chunked"]["hash"] != outputs["ours, dense"]["hash"]
    assert 0 < outputs["ours, auto"]["difference"] < 0.02
    assert {name for name in steps if "back to back" in name} == {
        "ours, 2 steps back to back, ms each",
        "diffusers compiled, 2 steps back to back, ms each",
    }


def test_every_other_part_says_what_it_is_for(results: dict[str, dict[str, Any]]) -> None:
    expected = {"products", "q/k norm, rotation", "gated residual, norm"}
    alone = set() if activates(torch.empty(0, dtype=torch.bfloat16)) else {"gelu"}  # Where no product ends in it.
    assert expected | alone <= set(results["kernel_classes"]["classes"])
    assert results["kernel_classes"]["classes"]["products"]["floor_ms"] > 0
    assert set(results["tiers"]) == {"fp8", "int8, W8A8"}
    assert all(0 < tier["difference"] < 0.1 for tier in results["tiers"].values())
    assert results["whole_request"]["uso-tiny through the engine"]["largest difference of 255"] == 0
    second = results["whole_request"]["second request, s"]
    stages = {"queue", "images", "encode", "denoise", "decode", "PNG"}
    assert stages <= set(second) and sum(second[stage] for stage in stages) <= 1.01 * second["whole request"]
    assert {"T5 and CLIP alone", "SigLIP and projector alone", "content alone"} < set(second)
    assert results["company"]["auto"]["beside a small one"] == "same bits"
    assert results["host_time"]["128 x 96"]["queued_ms"] > 0
    assert results["host_time"]["128 x 96, CUDA graph"] == "a CPU has no CUDA graphs"
    assert results["memory"]["attention"] == [CHOSEN]
    assert results["together"]["bits"] == "the same by itself and in company"
    assert set(rates := results["together"]["tokens per second"]) == {together.ALONE, together.SCHEDULED, together.AT_ONCE}
    assert rates[together.ALONE]["share"] == 1 and all(rate["tokens_per_s"] > 0 for rate in rates.values())
    variants = results["variants"]
    assert set(variants["outputs"]) == {variant.name for variant in VARIANTS}
    assert variants["times as fast as the base"]["base"] == 1
    assert "CUDA" in variants["outputs"]["attention varlen"] and "no CUDA graphs" in variants["outputs"]["CUDA graph"]
    assert all("no streams" in variants["outputs"][name] for name in (BESIDE, f"{BESIDE}, CUDA graph"))
    assert variants["outputs"]["kernels reference"]["difference"] < 0.02


def test_records_become_tables(results: dict[str, dict[str, Any]], out: Path, tmp_path: Path) -> None:
    """A rehearsal's records are left out; the same lines from a GPU are taken once, and every table has rows of them."""
    assert take(out, tmp_path)[0] == 0
    source = tmp_path / "gpu"
    source.mkdir()
    with (source / "records.jsonl").open("w") as file:
        for line in (out / "records.jsonl").read_text().splitlines():
            record = json.loads(line)
            record["machine"]["gpu"], record["device"], record["tokens"] = "NVIDIA H100 80GB HBM3", "cuda", 5824
            file.write(json.dumps({"peak_gib": 1.0, **record}) + "\n")
    taken, left = take(source, tmp_path)
    assert taken > 20 and left == 0
    assert take(source, tmp_path) == (0, taken)
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["nvidia-h100-80gb-hbm3.jsonl"]
    records = load(tmp_path)
    for table in tables.TABLES:
        assert "NVIDIA H100 80GB HBM3" in table.text(records), table.marker
        assert "ending" in table.text([]), table.marker
    with pytest.raises(SystemExit, match=r"no records in .*nowhere"):
        take(tmp_path / "nowhere")


def test_what_computes_something_else_is_not_timed(tmp_path: Path) -> None:
    bench = Bench("wrong", TINY, TINY, torch.device("cpu"), tmp_path, tmp_path / "wrong.json")
    made = bench.model()
    right = VARIANTS[0]

    def make_wrong(made: Made, workload: Workload) -> Evaluate:
        step = right.make(made, workload)
        return lambda: 2 * step()  # Exact in every floating type.

    def make_broken(made: Made, workload: Workload) -> Evaluate:
        copies.add(copy := torch.zeros(1))
        raise RuntimeError(f"no kernel image is available for {len(copy)}")

    copies: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    wrong, broken = Variant("wrong", make_wrong), Variant("broken", make_broken)
    with torch.no_grad():
        compare(bench, TINY, (right, wrong, broken))
        truth, outputs = right.make(made, TINY)(), dict[str, object]()
        times = timed(bench, {"right": right.make(made, TINY), "wrong": wrong.make(made, TINY)}, truth, outputs)
    assert set(times) == {"right"}
    assert "relative difference 1" in str(outputs["wrong"])
    found = json.loads((tmp_path / "wrong.json").read_text())
    assert set(found["ms"]) == {"base"}
    assert found["outputs"]["broken"] == "FAILED RuntimeError: no kernel image is available for 1"
    assert not copies, "what a failed piece held takes memory from the next"
    assert found["outputs"]["wrong"].startswith("FAILED ValueError: differs from the base by 1")
    with pytest.raises(ExceptionGroup) as failure:
        bench.finish()
    assert len(failure.value.exceptions) == 3


FAULTS = {
    "raising": "def run(bench):\n    bench.attempt('one', lambda: 1 / 0)\n    bench.save('two', 2)",
    "hanging": "import time\ndef run(bench):\n    bench.save('before', 1)\n    time.sleep(600)",
    "dying": "import os, signal\ndef run(bench):\n    os.kill(os.getpid(), signal.SIGKILL)",
    "unable": "import no_such_module",
    "sound": "def run(bench):\n    bench.save('answer', 42)\n    bench.record('rates', {})",
}


def test_a_part_that_fails_hangs_or_dies_stops_no_other(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in FAULTS.items():
        (tmp_path / f"seeded_{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{repository}:{repository / 'kernels'}:{tmp_path}")
    # It leaves a child behind that would hold the device.
    nap = "import time; time.sleep(600)"
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{nap}']); {nap}"
    commands = (
        ("good", (sys.executable, "-c", "print('3 passed')")),
        ("red", (sys.executable, "-c", "print('FAILED test_x'); raise SystemExit(1)")),
        ("slow", (sys.executable, "-c", child)),
    )
    parts = [Part("group", 2, commands)]
    parts += [Part(name, 10 if name == "hanging" else 60, module=f"seeded_{name}") for name in FAULTS]
    campaign = Campaign("first", tmp_path / "out", "tiny", parts)
    assert campaign.run() is False
    written = json.loads((tmp_path / "out" / "first.json").read_text())["parts"]
    assert written == campaign.report
    states = {name: part["state"] for name, part in written.items()}
    assert states == {
        "group": "red: exit status 1; slow: over its time limit, killed",
        "raising": "raising: exit status 1",
        "hanging": "hanging: over its time limit, killed",
        "dying": "dying: killed by SIGKILL",
        "unable": "unable: exit status 1",
        "sound": "ok",
    }
    assert written["raising"]["results"] == {"one": "FAILED ZeroDivisionError: division by zero", "two": 2}
    assert written["hanging"]["results"] == {"before": 1}
    assert "seeded_hanging.py" in written["hanging"]["output"]["hanging"]
    assert "no_such_module" in written["unable"]["output"]["unable"]
    assert written["sound"]["results"] == {"answer": 42}
    assert written["group"]["output"]["good"] == "3 passed"
    assert written["group"]["output"]["red"] == "FAILED test_x"
    assert 'File "<string>", line 1' in written["group"]["output"]["slow"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["first.json", "first.log", "records.jsonl"]
    text = summary.campaign_text("first", campaign.report)
    assert text.endswith("== first: FAILED: group, raising, hanging, dying, unable")
    assert "sound" in capsys.readouterr().out


def test_ended_from_outside_nothing_stays_behind(repository: Path, tmp_path: Path) -> None:
    """What ends the script ends the campaign and the part that runs, which is in a process group of its own."""
    script = repository / "benchmarks" / "gpu" / "first.sh"
    environment = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [str(script), str(tmp_path / "out"), "tiny"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 60
    while not list(tmp_path.glob("uso-gpu-*/verify*.txt")) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) != 0
    states = {name: part["state"] for name, part in json.loads((tmp_path / "out" / "first.json").read_text())["parts"].items()}
    assert "ended from outside" in states["checks"] and states["rates"] == "not run"
    mark = f"TMPDIR={tmp_path}\0".encode()
    assert [path for path in Path("/proc").glob("[0-9]*/environ") if mark in read(path)] == []


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("campaign", list(CAMPAIGNS))
def test_parts_fit_the_time_that_is_promised(campaign: str) -> None:
    for size in ("full", "tiny"):
        # The rest is for installing wheels and asking the driver.
        assert sum(part.limit_s for part in CAMPAIGNS[campaign](size)) <= LIMITS_S[campaign] - 10


def test_variants_are_timed_there_and_back() -> None:
    """A B B A: a clock that falls meanwhile slows both by as much."""
    order: list[str] = []
    variants = {name: partial(order.append, name) for name in "AB"}
    interleave(variants, rounds=4, device=torch.device("cpu"))
    assert "".join(order) == "ABBAABBA"


def test_a_summary_is_short_however_much_there_is_to_say() -> None:
    huge = {f"variant {i}": {"median_ms": 1.23456, "p20_ms": 1.0, "p80_ms": 2.0} for i in range(500)}
    reports: dict[str, dict[str, object]] = {
        f"part {i}": {"state": "ok", "seconds": 1.0, "results": {"ms": huge}, "output": {"x": "y" * 5000}} for i in range(12)
    }
    reports["last"] = {"state": "last: exit status 1", "seconds": 2.0, "output": {"last": "why it failed"}}
    text = summary.campaign_text("first", reports)
    assert len(text) <= summary.LENGTH < 10_000
    assert text.endswith("== first: FAILED: last")
    assert "why it failed" in text
    assert "variant 0: 1.235 (1 to 2)" in text


def test_the_prediction_is_over_the_floor_and_what_was_announced() -> None:
    params, tokens = TransformerParams(), Tokens(style=192, content=1024)
    predicted, floor = predicted_step_ms(params, tokens), floor_ms(params, tokens, GPUS["H100"])
    assert sum(predicted.values()) == pytest.approx(161.4, abs=0.5)
    assert predicted["products"] > floor["gemm"] and predicted["attention"] > floor["attention"]
    assert "copies" not in predicted and "gelu" not in predicted
    assert floor["floor"] == pytest.approx(131, abs=0.5)
    assert floor["separate kernels"] == pytest.approx(137.3, abs=0.5)
    beside = text_beside(params, tokens)
    assert beside.saved == pytest.approx(2.4, abs=0.1)
    # 704 rows are six tiles of 128: what is computed of them, and the rest of their waves.
    flops = 19 * 2 * 768 * 12 * 3072**2
    assert beside.products - beside.idle == pytest.approx(1e3 * flops / 684e12)
    assert 0 < beside.waits < beside.idle < beside.products


def test_hashes_tell_bits_apart() -> None:
    x = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    assert output_hash(x) == output_hash(x.t().contiguous().t()) != output_hash(x + 1)
    assert output_hash(torch.zeros(2)) != output_hash(-torch.zeros(2))
    assert len(tree_hash()) == 12


def test_scripts_say_how_they_are_called(repository: Path) -> None:
    answer = subprocess.run([str(repository / "benchmarks/gpu/first.sh")], capture_output=True, text=True, check=False)
    assert (answer.returncode, "usage: " in answer.stderr) == (2, True)
    assert shutil.which("bash")
