"""Committed results: one schema, one file a benchmark, bars of the house plan, and the page generated from them."""

import json

import pytest

from bench.capture import SHAPES, WORDS
from tests.meta.tree import ROOT
from tools import benchmarks

FILES = sorted((ROOT / "bench" / "results").glob("*.json"))
ROW = {"work": str, "value": float, "unit": str, "bar": float | None, "sense": str, "peer": str | None,
       "ratio": float | None}  # fmt: skip


def read(path):
    return json.loads(path.read_text("utf-8"), parse_int=float)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_results_file_has_the_schema(path):
    data = read(path)
    assert set(data) - {"features"} == {"machine", "rows"}
    assert {"cpu", "cores", "memory", "threads", "python", "torch", "transformers", "date"} <= set(data["machine"])
    assert data["rows"]
    for row in data["rows"]:
        for name, kind in ROW.items():
            assert isinstance(row[name], kind), (row["work"], name)
        assert row["sense"] in ("max", "min")
        assert (row["peer"] is None) == (row["ratio"] is None)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_results_file_belongs_to_a_benchmark_that_can_be_run(path):
    text = (ROOT / "bench" / f"{path.stem.partition('.')[0]}.py").read_text("utf-8")
    assert 'if __name__ == "__main__":' in text


def test_capture_has_every_row_with_its_bar():
    rows = {row["work"]: row for row in read(ROOT / "bench" / "results" / "capture.json")["rows"]}
    wanted = {
        f"{name}: {words}": shape.bars.get(work) for name, shape in SHAPES.items() for work, words in WORDS.items()
    }
    assert {work: row["bar"] for work, row in rows.items()} == wanted


def test_the_page_shows_every_committed_value():
    page = benchmarks.page()
    for path in FILES:
        assert f"python -m bench.{path.stem.partition('.')[0]}" in page
        for row in read(path)["rows"]:
            assert f"| {row['work']} |" in page
    assert (ROOT / "docs" / "benchmarks.md").read_text("utf-8") == page
