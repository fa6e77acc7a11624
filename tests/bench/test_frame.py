"""The frame of the benchmarks: pairs, medians, bars, files, and subjects in processes of their own."""

import json
import sys

import pytest

from bench import frame
from bench.frame import Row, Subject, finish, ratios, summary, table


def test_ratios_are_of_neighbouring_calls_in_alternating_order():
    order = []
    found = ratios(lambda: order.append("plain"), {"a": lambda: order.append("a")}, pairs=4)
    assert order == ["plain", "plain", "a", "plain", "a", "plain"] * 2
    assert len(found["a"]) == 4


def test_twice_the_work_is_measured_as_about_twice():
    def work(n):
        return lambda: sum(range(n))

    row = summary("sum", ratios(work(200_000), {"twice": work(400_000)}, pairs=15)["twice"], "×")
    assert 1.3 < row.value < 3.0
    assert row.quartiles[0] <= row.value <= row.quartiles[1]


@pytest.mark.parametrize(
    ("value", "bar", "sense", "kept"),
    [(1.0, 1.2, "max", True), (1.3, 1.2, "max", False), (1.3, 1.2, "min", True), (1.0, None, "max", None)],
)
def test_a_bar_is_kept_in_its_own_sense(value, bar, sense, kept):
    assert Row("w", value, "×", bar, sense).kept is kept


def test_a_ratio_above_one_means_that_ours_is_better():
    assert Row("w", 2.0, "s").against("them", 6.0).ratio == 3.0
    assert Row("w", 6.0, "items/s", sense="min").against("them", 2.0).ratio == 3.0


def test_results_are_written_and_a_missed_bar_is_an_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(frame, "RESULTS", tmp_path)
    good, bad = Row("good", 1.0, "×", 1.2), Row("bad", 1.3, "×", 1.2).against("them", 2.6)
    assert finish("x", [good]) == 0
    assert finish("x", [good, bad]) == 1
    data = json.loads((tmp_path / "x.json").read_text("utf-8"))
    assert [r["work"] for r in data["rows"]] == ["good", "bad"]
    assert data["rows"][1]["ratio"] == 2.0
    assert finish("x", [good], label="other") == 0
    assert (
        float(json.loads((tmp_path / "x.other.json").read_text("utf-8"))["machine"]["float32 products"].split()[0]) > 0
    )
    printed = capsys.readouterr().out
    assert "1 bars missed" in printed
    assert "kept" in printed
    assert "MISSED" in printed


def test_a_table_names_what_was_measured():
    assert "them: 4" in table([Row("w", 2.0, "s").against("them", 4.0)])


def test_a_subject_answers_from_its_own_process_and_its_end_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = "from bench.frame import serve; serve({'version': '1'}, lambda n: {'twice': 2 * n})"
    (tmp_path / "doubling.py").write_text(code)
    (tmp_path / "broken.py").write_text("raise SystemExit('broken on purpose')")
    subject = Subject(sys.executable, "doubling")
    assert subject.about == {"version": "1"}
    assert subject.ask(n=21) == {"twice": 42}
    subject.close()
    with pytest.raises(SystemExit, match="broken on purpose"):
        Subject(sys.executable, "broken")
