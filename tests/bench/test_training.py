"""The benchmarks of training at tiny sizes: steps that are steps of a run, rows and bars, and errors on a truth."""

import json
from dataclasses import replace

import pytest
import torch

from bench import trainers, training, tuned
from bench.trainers import Job
from tests.meta.tree import ROOT

TINY = Job("topk", 16, 128, 4, 64)
RESULTS = ROOT / "bench" / "results"


def narrowed(trainer, x, active):
    assert trainer.narrow is not None
    trainer.narrow(x, active)


@pytest.mark.parametrize("gate", ["topk", "relu", "jumprelu", "clt topk", "clt jumprelu"])
def test_a_step_learns_from_the_batch_it_is_given(gate):
    job = replace(TINY, gate=gate, rate=1e-2)
    x = trainers.batch(job, 1)
    trainer = trainers.make("cutaway", job, x)
    if gate in ("topk", "relu"):
        before = (x - trainer.rebuilt(x)).pow(2).sum()
        for _ in range(10):
            trainer.step(x)
        assert (x - trainer.rebuilt(x)).pow(2).sum() < before
    else:
        narrowed(trainer, x, 8)
        trainer.step(x)


def test_a_narrowed_gate_lets_less_through():
    job = replace(TINY, gate="relu")
    x = trainers.batch(job, 1)
    trainer = trainers.make("cutaway", job, x)
    half = trainer.rebuilt(x).norm()
    narrowed(trainer, x, 2)
    assert trainer.rebuilt(x).norm() < half


def test_batches_of_a_seed_are_one_and_of_another_another():
    assert torch.equal(trainers.batch(TINY, 1), trainers.batch(TINY, 1))
    assert not torch.equal(trainers.batch(TINY, 1), trainers.batch(TINY, 2))


def test_each_of_our_forms_has_a_row_a_peer_with_its_own_bar():
    about = {name: {"version": "1"} for name in (*training.OURS, *training.PEERS)}
    cpu = {"cutaway": 1.0, "cutaway_bfloat16": 0.75, "saelens": 7.2, "sparsify": 2.0}
    times = {("topk", n): [{"cpu": s, "wall": s, "product": 0.5}] * 3 for n, s in cpu.items()}
    rows = training.rows_of("topk", times, about)
    assert [r.kept for r in rows] == [True, True, True, False, False, None]  # 7.2, 2.0, 50 %; 9.6, 2.67, any
    assert [r.value for r in rows if r.unit == "%"] == [50.0, 66.7]


def test_a_peer_that_is_dense_is_measured_once():
    about = {"cutaway": {"version": "1"}, "saelens": {"version": "1"}}
    once = [{"cpu": 1.0, "wall": 1.0}] * 3
    times = {("relu", "cutaway"): once, ("relu", "saelens"): once, ("relu_late", "cutaway"): once}
    assert [r.peer for r in training.rows_of("relu_late", times, about)] == ["SAELens 1"]


def test_memory_is_compared_with_each_peer():
    peaks = {"cutaway": 100.0, "cutaway_bfloat16": 100.0, "saelens": 300.0, "sparsify": 90.0}
    about = {name: {"version": "1"} for name in peaks}
    assert [r.kept for r in training.memory(peaks, about)] == [True, False] * 2


def test_the_best_rate_of_each_counts():
    errors = {"cutaway": {1e-3: 0.2, 2e-3: 0.1}, "saelens": {1e-3: 0.098}, "sparsify": {1e-3: 0.3, 2e-3: 0.2}}
    rows = tuned.rows(errors, {"saelens": "1", "sparsify": "2"})
    assert [r.ratio for r in rows] == [0.98, 2.0]
    assert [r.kept for r in rows] == [False, True]


def test_a_toy_is_learned_and_judged_on_tokens_that_are_new(monkeypatch):
    monkeypatch.setattr(tuned, "HELD_OUT", 256)
    job = replace(tuned.JOB, d=32, latents=128, tokens=128, rate=1e-2)
    errors = [tuned.trained("cutaway", replace(job, steps=n)) for n in (1, 10)]
    assert errors[1] < errors[0] < 2


def test_committed_rows_carry_the_bars_of_the_plan():
    rows = json.loads((RESULTS / "training.json").read_text("utf-8"))["rows"]
    for ours, says in training.OURS.items():
        bars = [bar for (name, _), bar in training.CORE_BARS.items() if name == ours]
        mine = [r for r in rows if r["unit"] == training.UNIT and says in r["work"]]
        assert [r["least"] for r in mine] == bars
    assert [r["bar"] for r in rows if r["unit"] == "%"] == [training.ROOFLINE, None]
    for axis in "Fk":
        assert len([w for w in training.WORKS if w[0] == axis and w[1:].isdigit()]) == 4
