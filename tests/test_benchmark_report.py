"""Generated tables and plots are made from records, and those of the documents are up to date."""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.documents import PENDING, Plot, SvgPlot, Table, markdown, rewritten, section_of, typed_results
from benchmarks.measure import TELLING_FLAGS, file_name, machine
from benchmarks.records import Record, clock_note, hardware, latest, load
from benchmarks.report import PLOTS, RESULTS, ROOT, TABLES, documents, main, outdated, write
from uso_engine.evaluation.report_table import report_table

DOCUMENTS = sorted({table.document for table in TABLES})


def record(benchmark: str, median_ms: float, **values: object) -> dict[str, object]:
    return {"benchmark": benchmark, "median_ms": median_ms, "machine": {"cpu": "some CPU", "threads": 2}, **values}


def medians(records: list[Record]) -> str:
    return markdown(["ms"], [[f"{r['median_ms']:.0f}"] for r in records])


STEPS, RUNGS = Table("a.md", "steps", ("step",), medians), Table("a.md", "rungs", ("ladder",), medians)
EMPTY = "<!-- table steps -->\n<!-- end steps -->\nText.\n<!-- table rungs -->\nold\n<!-- end rungs -->\n"


def test_every_document_says_what_the_records_say() -> None:
    assert list(outdated(ROOT, TABLES, PLOTS, load())) == []
    assert set(DOCUMENTS) <= set(documents(ROOT))


@pytest.mark.parametrize("document", ["docs/performance.md", "README.md"])
def test_a_new_record_changes_the_document(document: str) -> None:
    extra = record(
        "ladder", 12345.6, workload="small", tokens=2752, dtype="bfloat16", rung="authors' way", p20_ms=1.0, p80_ms=2.0,
        speedup=1.0, allocations=7, difference=0.0,
    )  # fmt: skip
    text = rewritten(document, (ROOT / document).read_text(), TABLES, [*load(), extra])
    assert "| 12346 |" in text
    assert "some CPU" in text


def test_a_table_shows_the_records_of_its_own_benchmarks() -> None:
    text = rewritten("a.md", EMPTY, (STEPS, RUNGS), [record("step", 5), record("other", 6)])
    assert text == (
        "<!-- table steps -->\n| ms |\n| --- |\n| 5 |\n<!-- end steps -->\nText.\n"
        f"<!-- table rungs -->\n{PENDING}\n<!-- end rungs -->\n"
    )


def test_a_marker_inside_a_line_is_prose() -> None:
    text = EMPTY + "Between `<!-- table NAME -->` and `<!-- end NAME -->` stands a table.\n"
    assert rewritten("a.md", text, (STEPS, RUNGS), []).endswith("stands a table.\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("<!-- table steps -->\n", ""), r"a\.md has places for .*\['rungs'\].*expected.*'steps'"),
        (lambda text: text.replace("<!-- end rungs -->\n", ""), r"a\.md: the tables .*'rungs'.* begin, \['steps'\] end"),
        (lambda text: text + EMPTY, r"a\.md has places for .*'steps', 'steps'"),
        (lambda text: text.replace("steps -->", "stpes -->"), r"a\.md has places for .*'stpes'.*expected.*'steps'"),
    ],
)
def test_a_table_without_a_place_and_a_place_without_a_table_are_errors(change: Callable[[str], str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rewritten("a.md", change(EMPTY), (STEPS, RUNGS), [])


@pytest.mark.parametrize(
    ("file", "typed"),
    [
        ("README.md", "<!-- table other -->\n| 9.9 |\n<!-- end other -->\n"),
        ("docs/deeper/b.md", "<!-- table steps -->\n| 9.9 |\n<!-- end steps -->\n"),
    ],
)
def test_a_generated_block_in_any_document_belongs_to_a_table(file: str, typed: str, tmp_path: Path) -> None:
    for name, text in (("a.md", EMPTY), (file, typed)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="expected one for each of"):
        list(outdated(tmp_path, (STEPS, RUNGS), (), []))


def test_a_number_typed_by_hand_is_found_and_overwritten(tmp_path: Path) -> None:
    document, records = tmp_path / "a.md", [record("step", 5)]
    document.write_text(EMPTY)
    write(tmp_path, (STEPS, RUNGS), (), records)
    right = document.read_text()
    assert list(outdated(tmp_path, (STEPS, RUNGS), (), records)) == []
    document.write_text(right.replace("| 5 |", "| 4 |"))
    assert list(outdated(tmp_path, (STEPS, RUNGS), (), records)) == ["a.md differs from its records in the tables ['steps']"]
    write(tmp_path, (STEPS, RUNGS), (), records)
    assert document.read_text() == right


def test_a_plot_of_other_records_is_found_and_drawn_anew(tmp_path: Path) -> None:
    source = tmp_path / "log.jsonl"
    plot = Plot("plot.png", ("log.jsonl",), lambda root: Image.new("RGB", (int((root / "log.jsonl").read_text()), 2)))
    source.write_text("3")
    assert len(list(outdated(tmp_path, (), (plot,), []))) == 1
    write(tmp_path, (), (plot,), [])
    assert list(outdated(tmp_path, (), (plot,), [])) == []
    source.write_text("4")
    assert list(outdated(tmp_path, (), (plot,), [])) == ["plot.png was not drawn from the records that are there"]
    write(tmp_path, (), (plot,), [])
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width == 4


def test_an_svg_plot_of_other_records_is_found_and_drawn_anew(tmp_path: Path) -> None:
    plot, records = SvgPlot("plot.svg", ("step",), lambda own: f"<svg>{len(own)}</svg>"), [record("step", 5)]
    assert len(list(outdated(tmp_path, (), (plot,), records))) == 1
    write(tmp_path, (), (plot,), records)
    assert list(outdated(tmp_path, (), (plot,), [*records, record("ladder", 5)])) == []
    more = [*records, record("step", 6)]
    assert list(outdated(tmp_path, (), (plot,), more)) == ["plot.svg was not drawn from the records that are there"]
    write(tmp_path, (), (plot,), more)
    assert (tmp_path / "plot.svg").read_text() == "<svg>2</svg>"


@pytest.mark.parametrize(
    "typed",
    ["2.5 times as fast", "12 ms a step", "it takes 3.4 s", "87 % of the floor", "1.2 TFLOP/s", "24 GB", "3.2 s an image"],
)
def test_a_result_typed_in_prose_is_found(typed: str) -> None:
    section = section_of(f"## Other\n{typed}\n## Results\nOurs: {typed}.\n{EMPTY}## More\n{typed}\n", "Results")
    assert len(typed_results(section)) == 1


@pytest.mark.parametrize(
    "defined", ["3 + 6 blocks", "hidden 1024, 512x512", "`12 ms`", "    2 * 4 GB\n", "L = 2752", "torch 2.13", "case 3 stands"]
)
def test_sizes_and_formulas_are_no_results(defined: str) -> None:
    inside = EMPTY.replace("old", "| 12 ms |")
    assert typed_results(f"{inside}\n{defined}\n") == []


def test_a_result_typed_into_the_readme_is_found(tmp_path: Path) -> None:
    for document in {*documents(ROOT), *DOCUMENTS}:
        (tmp_path / document).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / document).write_text((ROOT / document).read_text())
    readme = tmp_path / "README.md"
    before = list(outdated(tmp_path, TABLES, (), load()))
    readme.write_text(readme.read_text().replace("## Results\n", "## Results\nA picture takes 3.1 s on an H100.\n"))
    found = set(outdated(tmp_path, TABLES, (), load())) - set(before)
    assert found == {"README.md, section Results: ['3.1 s'] are typed; results come from records"}
    assert all(section_of((ROOT / document).read_text(), heading) for document, names in RESULTS.items() for heading in names)


def test_the_last_record_of_a_case_counts() -> None:
    records = [record("ladder", 1.0, rung="a"), record("ladder", 5.0, rung="b"), record("ladder", 2.0, rung="a")]
    assert [r["median_ms"] for r in latest(records, "rung")] == [2.0, 5.0]
    elsewhere = {**record("ladder", 3.0, rung="a"), "machine": {"cpu": "another CPU", "threads": 1}}
    assert [r["median_ms"] for r in latest([*records, elsewhere], "rung")] == [2.0, 5.0, 3.0]
    assert [r["median_ms"] for r in latest([*records, elsewhere], "rung", by_machine=False)] == [3.0, 5.0]


def test_of_two_machines_files_either_may_hold_the_last_record() -> None:
    early, late = (
        {"machine": {"cpu": cpu, "taken": f"2026-11-{day} 10:00:00"}, "check": "x"} for cpu, day in (("a", 1), ("b", 2))
    )
    for records in ([early, late], [late, early]):
        assert latest(records, "check", by_machine=False) == [late]
        assert latest(records, "check") == records


def test_a_record_names_the_device_that_it_was_taken_on() -> None:
    machine = {"cpu": "some CPU", "gpu": "some GPU", "threads": 2}
    assert hardware({"machine": machine}) == hardware({"machine": machine, "device": "cuda"}) == "some GPU"
    assert hardware({"machine": machine, "device": "cpu"}) == "some CPU"


def test_cpus_of_one_name_and_two_kinds_are_two_machines() -> None:
    """By what they compute with; records of before that was written down keep their name."""
    old = {"machine": {"cpu": "AMD EPYC"}, "workload": "small"}
    narrow = {"machine": {"cpu": "AMD EPYC", "cpu_capability": "AVX2", "cpu_flags": ["avx2", "fma"]}, "workload": "small"}
    wide = {"machine": {"cpu": "AMD EPYC", "cpu_capability": "AVX512", "cpu_flags": ["amx_tile"]}, "workload": "small"}
    names = [hardware(record) for record in (old, narrow, wide)]
    assert names == ["AMD EPYC", "AMD EPYC (AVX2)", "AMD EPYC (AVX512, AMX)"]
    assert [file_name(name) for name in names] == ["amd-epyc", "amd-epyc-avx2", "amd-epyc-avx512-amx"]
    assert latest([old, narrow, wide, narrow], "workload") == [old, narrow, wide]
    assert file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert file_name("Intel(R) Xeon(R) w5/2") == "intel-xeon-w5-2"
    here = machine()
    assert here["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert set(here["cpu_flags"]) <= set(TELLING_FLAGS)  # type: ignore[call-overload]


def test_processor_time_is_said_to_be_that() -> None:
    assert clock_note([record("step", 1.0, clock="wall")]) == ""
    assert "2 threads" in clock_note([record("step", 1.0, clock="process")])


def test_what_is_recorded_is_shown_and_what_is_shown_is_recorded() -> None:
    """Every benchmark that a script records stands in a table, and no table waits for what no script records."""
    written = set()
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"write_record", "bench.record"}:
                written |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    for path in (ROOT / "deploy").glob("*.sh"):
        written |= set(re.findall(r'"benchmark": "(\w+)"', path.read_text()))
    assert written == {benchmark for table in TABLES for benchmark in table.benchmarks}


def test_the_report_of_the_evaluation_is_the_table_of_its_numbers() -> None:
    folder = ROOT / "docs" / "quality"
    assert (folder / "report.md").read_text() == report_table(json.loads((folder / "report.json").read_text())) + "\n"


def test_checking_takes_no_records(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--check", "--records", "out"])
    assert "--check changes nothing" in capsys.readouterr().err
