"""Tables are made from records, and the document's are up to date."""

import pytest

from benchmarks.records import latest, load
from benchmarks.report import DOCUMENTS, ROOT, rewrite


def record(benchmark: str, median_ms: float, **values: object) -> dict[str, object]:
    return {"benchmark": benchmark, "median_ms": median_ms, "machine": {"cpu": "some CPU", "threads": 2}, **values}


@pytest.mark.parametrize("document", list(DOCUMENTS))
def test_documents_say_what_the_records_say(document: str) -> None:
    text = (ROOT / document).read_text()
    assert rewrite(document, text, load()) == text


@pytest.mark.parametrize("document", ["docs/performance.md", "README.md"])
def test_a_new_record_changes_the_document(document: str) -> None:
    extra = record(
        "ladder", 12345.6, workload="small", tokens=2752, dtype="bfloat16", rung="authors' way", p20_ms=1.0, p80_ms=2.0,
        speedup=1.0, allocations=7, difference=0.0,
    )  # fmt: skip
    text = rewrite(document, (ROOT / document).read_text(), [*load(), extra])
    assert "| 12346 |" in text
    assert "some CPU" in text


def test_the_last_record_of_a_case_counts() -> None:
    records = [record("ladder", 1.0, rung="a"), record("step", 5.0, rung="a"), record("ladder", 2.0, rung="a")]
    assert [r["median_ms"] for r in latest(records, "ladder", "rung")] == [2.0]


@pytest.mark.parametrize(("document", "name"), [(d, name) for d, names in DOCUMENTS.items() for name in names])
def test_a_table_without_a_place_is_an_error(document: str, name: str) -> None:
    text = (ROOT / document).read_text().replace(f"<!-- table {name} -->", "")
    with pytest.raises(SystemExit, match=name):
        rewrite(document, text, load())
