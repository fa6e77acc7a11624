"""The benchmarks of sweeps at tiny sizes: rows and bars a peer, numbers that must agree, memory that is really seen."""

import json

import pytest
import torch

from bench import growth, sweepers, sweeps, works
from bench.frame import options, pythons
from tests.meta.tree import ROOT
from tools import benchmarks

TINY = {"layers": 2, "positions": 5, "prompts": 1, "width": 64, "vocabulary": 96}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tiny"))
    sweeps.save(folder, n_layer=works.LAYERS, n_embd=24, n_head=works.HEADS, vocab_size=64, n_positions=32)
    return sweepers.prepare("cutaway", folder)


def test_every_work_is_measured_and_returns_a_number_a_cell(subject):
    _, plain, jobs = subject
    assert set(jobs) == set(works.WORKS)
    assert plain().shape == (1, works.POSITIONS, 64)
    for work in ("resid", "heads", "attribution", "attribution_called"):
        values = jobs[work].run()
        assert values.shape == (works.WORKS[work].cells,)
        assert bool(values.isfinite().all()), work
        assert float(values.std()) > 0


def test_the_attribution_that_is_measured_is_the_one_of_the_method(subject):
    jobs = subject[2]
    assert torch.allclose(jobs["attribution"].run(), jobs["attribution_called"].run(), atol=1e-6)


def test_other_numbers_than_ours_stop_the_benchmark():
    sweeps.check("them", "resid", [0.1, 0.2, 0.3, 0.4], [0.1, 0.3], [0, 4, 2])
    with pytest.raises(SystemExit, match="them returns other numbers for resid"):
        sweeps.check("them", "resid", [0.1, 0.2, 0.3, 0.4], [0.1, 0.2], [0, 4, 2])


def test_each_peer_has_a_row_with_its_own_bar():
    about = {name: {"version": "1", "says": {}} for name in ("cutaway", *sweeps.PEERS)}
    pairs = {("resid", name): [(20.0, 20.0)] * 3 for name in about}
    pairs["resid", "nnsight"] = [(50.0, 50.0)] * 3
    pairs["resid", "textbook"] = [(600.0, 600.0)] * 3
    rows = {r.peer: r for r in sweeps.rows("resid", pairs, about)}
    assert rows["nnsight 1, batched invokes"].kept is False  # 2.5 times as much, and 3 is the bar
    assert rows["textbook loop over transformer-lens 1"].kept is True
    assert rows["pyvene 1"].kept is True  # no bar on the ratio, and our own is kept
    assert [r.peer for r in sweeps.rows("heads", {("heads", "cutaway"): [(31.0, 1.0)] * 3}, about)] == [None]


def test_only_peers_whose_environment_is_given_are_measured():
    chosen = options("Something.").parse_args(["--python-a", "/a/python"])
    found = pythons(chosen, {"x": "a", "y": "b"})
    assert set(found) == {"cutaway", "x"}


def test_committed_rows_carry_the_bars_of_the_plan():
    rows = json.loads((ROOT / "bench" / "results" / "sweeps.json").read_text("utf-8"))["rows"]
    for work in works.WORKS.values():
        mine = [r for r in rows if r["work"] == work.words]
        assert {r["bar"] for r in mine} == {work.bar}, work.words
        assert sorted(r["least"] for r in mine if r["least"] is not None) == sorted(work.least.values())


def test_the_readme_shows_every_sweep():
    text = benchmarks.readme()
    assert text == (ROOT / "README.md").read_text("utf-8")
    assert all(f"| {work.words} |" in text for work in works.WORKS.values())


def test_growth_is_measured_at_four_points_of_every_size():
    assert {len(points) for points in growth.POINTS.values()} == {4}
    assert set(growth.POINTS) == set(growth.BASE)
    assert all(growth.BASE[axis] in points for axis, points in growth.POINTS.items())


def test_a_residual_sweep_is_timed_and_its_variants_are_cells():
    model, clean, corrupt = growth.build(**TINY)
    pairs, seconds = growth.compare(model, clean, corrupt, 2, calls=1)
    assert len(pairs) == len(seconds) == 2
    assert min(seconds) > 0
    run, variants = growth.job("by_position", model, clean, corrupt)
    assert len(variants) == 2 * 5
    swept, alone = run(), growth.alone(model, corrupt, variants)
    assert torch.allclose(swept, alone, atol=1e-5)


def test_the_peak_of_memory_is_seen():
    size = 64 << 20
    assert 0.9 * size < growth.grown(lambda: torch.ones(size // 4).sum()) < 2 * size
    rows, _ = growth.peak("resid", "sweep", TINY)
    assert rows == 2
