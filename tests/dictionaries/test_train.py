"""Training runs: what is learned, resuming with the same bits, the probe, logs, refusals."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cutaway import streams
from cutaway.core.progress import listening
from cutaway.core.refuse import Refused
from cutaway.dictionaries import objectives as ob
from cutaway.dictionaries import training as tr
from cutaway.dictionaries.parts import described
from cutaway.dictionaries.training import adam as adams
from cutaway.dictionaries.training.recipe import recipe_of
from cutaway.dictionaries.training.update import KIND, DictionaryUpdate
from cutaway.training import Checkpoints, Loop

A, B, C, Z = "resid_post.0", "mlp_out.1", "mlp_out.2", "mlp_out.3"
D, F = 16, 64


def held(batch=128, seed=0, sites=(A,), tokens=2048):
    g = torch.Generator().manual_seed(3)
    amount = torch.rand(tokens, 32, generator=g) + 0.5
    amount *= torch.rand(tokens, 32, generator=g) < 0.06
    acts = {s: amount @ torch.nn.functional.normalize(torch.randn(32, D, generator=g)) for s in sites}
    return tr.Held(acts, batch, seed=seed)


def topk(**more):
    return tr.autoencoder(A, F, tr.TrainTopK(3), **({"rate": 3e-3} | more))


def plan(**more):
    return tr.Plan(
        **({"tokens": 128 * 24, "log_every": 4, "checkpoint_every": 8, "select": "float32", "products": "plain"} | more)
    )


def same(a, b):
    one, other = described(a)[0], described(b)[0]
    return all(torch.equal(t, other[n]) for n, t in one.items())


GATES = {
    "topk": tr.autoencoder(A, F, tr.TrainTopK(3), rate=1e-2),
    "batch": tr.autoencoder(A, F, tr.TrainBatchTopK(3), decoder="norm_aware", rate=1e-2),
    "pursuit": tr.autoencoder(A, F, tr.TrainMatchingPursuit(3), rate=1e-2),
    "relu": tr.autoencoder(A, F, tr.TrainRelu(), (ob.L1(0.4),), rate=1e-2),
    "jump": tr.autoencoder(A, F, tr.TrainJumpRelu(0.1, 0.4), (ob.L0(0.1),), rate=1e-2),
    "gated": tr.autoencoder(A, F, tr.TrainGated(), (ob.OpenGate(0.4),), rate=1e-2),
    "transcoder": tr.transcoder(A, B, F, tr.TrainTopK(3), skip=True, rate=1e-2),
    "crosscoder": tr.crosscoder([A, B], F, tr.TrainBatchTopK(4), rate=1e-2),
    "across layers": tr.cross_layer([A, B], [C, Z], F, tr.TrainTopK(3), rate=1e-2),
}


def test_every_kind_learns_and_the_dictionary_is_what_was_learned():
    source = held(sites=(A, B, C, Z))
    runs = tr.train(source, list(GATES.values()), plan(tokens=128 * 80))
    acts = source.acts
    for name, done in zip(GATES, runs, strict=True):
        curve = next(iter(done.curves.values()))
        assert curve[-1]["loss"] < curve[0]["loss"], name
        d = done.dictionary
        out = d.forward({s: acts[s] for s in d.reads})
        for s, y in out.items() if isinstance(out, dict) else [(d.writes[0], out)]:
            fvu = float((acts[s] - y).pow(2).sum() / (acts[s] - acts[s].mean(0)).pow(2).sum())
            assert fvu < 0.6, (name, s, fvu)
            assert abs(fvu - curve[-1]["fvu"]) < 0.15, (name, fvu, curve[-1]["fvu"])


@pytest.mark.parametrize(
    ("recipe", "select"),
    [
        ("topk", "float32"),
        ("batch", "bfloat16"),
        ("pursuit", "float32"),
        ("jump", "float32"),
        ("gated", "float32"),
        ("across layers", "bfloat16"),
    ],
)
def test_a_killed_run_goes_on_with_the_same_bits(recipe, select, tmp_path):
    sites, recipe = (A, B, C, Z), GATES[recipe]
    whole = tr.train(held(sites=sites), recipe, plan(select=select), out=tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill(p):
        if p.tokens >= 128 * 12:
            raise Killed

    with pytest.raises(Killed):
        tr.train(held(sites=sites), recipe, plan(select=select), out=tmp_path / "part", progress=kill)
    again = tr.train(held(sites=sites), recipe, plan(select=select), out=tmp_path / "part")
    assert same(whole.dictionary, again.dictionary)
    assert [c["loss"] for c in whole.curves[f"{whole.rate:.3g}"]] == [
        c["loss"] for c in again.curves[f"{again.rate:.3g}"]
    ]
    logs = [[json.loads(x) for x in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("whole", "part")]
    steps = [[(x["step"], x.get("loss")) for x in log] for log in logs]
    assert steps[0] == steps[1]


def test_a_checkpoint_of_the_first_layout_is_taken_up(tmp_path):
    """`data/unfinished` was written before the loop had a room of its own, inside the probe of learning rates."""
    g = torch.Generator().manual_seed(3)
    amount = (torch.rand(512, 16, generator=g) + 0.5) * (torch.rand(512, 16, generator=g) < 0.1)
    acts = {A: amount @ torch.nn.functional.normalize(torch.randn(16, 8, generator=g))}
    recipe, how = tr.autoencoder(A, 12, tr.TrainTopK(2)), plan(tokens=32 * 48)
    shutil.copytree(Path(__file__).parent / "data" / "unfinished", tmp_path / "run")
    again = tr.train(tr.Held(acts, 32), recipe, how, out=tmp_path / "run")
    whole = tr.train(tr.Held(acts, 32), recipe, how)
    assert (again.tokens, again.rate, len(again.curves)) == (32 * 48, whole.rate, 3)
    other = described(whole.dictionary)[0]
    assert all(torch.allclose(t, other[n], atol=1e-5) for n, t in described(again.dictionary)[0].items())


def _during_a_step(monkeypatch):
    """Ctrl-C between the two dictionaries of the twelfth step."""
    step, calls = tr.Learner.step, iter(range(1000))

    def interrupted(self, *given):
        if next(calls) == 2 * 11 + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *given)

    monkeypatch.setattr(tr.Learner, "step", interrupted)


def _in_the_source(monkeypatch):
    """Ctrl-C while a batch is made, after the source has counted it."""
    give, calls = tr.Held.__next__, iter(range(1000))

    def interrupted(self):
        batch = give(self)
        if next(calls) == 68:
            os.kill(os.getpid(), signal.SIGINT)
        return batch

    monkeypatch.setattr(tr.Held, "__next__", interrupted)


@pytest.mark.parametrize(("when", "steps"), [(_during_a_step, 12), (_in_the_source, 68)])
def test_an_interrupted_run_is_saved_as_of_its_last_whole_step(when, steps, monkeypatch, tmp_path):
    recipes, how = [topk(seed=0), topk(seed=1)], plan(tokens=128 * 72, checkpoint_every=1000)
    whole = tr.train(held(), recipes, how, out=tmp_path / "whole")
    when(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        tr.train(held(), recipes, how, out=tmp_path / "part")
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Checkpoints(tmp_path / "part", KIND).read()[1]["step"] == steps
    again = tr.train(held(), recipes, how, out=tmp_path / "part")
    assert all(same(a.dictionary, b.dictionary) for a, b in zip(whole, again, strict=True))


def test_a_step_that_is_half_done_is_not_saved(monkeypatch, tmp_path):
    step, calls = tr.Learner.step, iter(range(1000))

    def torn(self, *given):
        if next(calls) == 2 * 11 + 1:
            raise KeyboardInterrupt  # as a second Ctrl-C would
        return step(self, *given)

    monkeypatch.setattr(tr.Learner, "step", torn)
    with pytest.raises(KeyboardInterrupt):
        tr.train(held(), [topk(seed=0), topk(seed=1)], plan(), out=tmp_path)
    assert Checkpoints(tmp_path, KIND).read()[1]["step"] == 8


def test_checkpoints_come_by_time_as_well(tmp_path):
    kept = []

    def look(p):
        kept.append(Checkpoints(tmp_path, KIND).exist() and Checkpoints(tmp_path, KIND).read()[1]["step"])

    tr.train(held(), topk(), plan(checkpoint_every=1000, checkpoint_seconds=1e-9), out=tmp_path, progress=look)
    assert kept == [3, 7, 11, 15, 19, 23]  # each step; the report comes before its own checkpoint


def test_moments_that_a_source_has_are_taken_and_no_batch_is_read_for_them():
    class Counted(tr.Held):
        def moments(self):
            return {s: streams.Moments(D).update(x) for s, x in self.acts.items()}

    given = Counted(held().acts, 128)
    seen = []
    tr.train(given, topk(), plan(tokens=128 * 8), progress=lambda p: seen.append((p.tokens, given.number)))
    assert seen[0] == (128 * 4, 4)
    update = DictionaryUpdate([topk()], plan(), "cpu")
    Loop(update, Counted(held().acts, 128), plan()).start()
    learner, x = update.entries[0].learner, given.acts[A].double()
    assert torch.allclose(learner.mean[A], (x.mean(0) * learner.scale[A]).float(), atol=1e-5)
    assert learner.scale[A] == pytest.approx(D**0.5 / float(x.norm(dim=1).mean()))
    assert learner.variance == pytest.approx(float(x.var(0, correction=0).sum()) * learner.scale[A] ** 2)


def test_a_finished_run_is_not_trained_further(tmp_path):
    first = tr.train(held(), topk(), plan(tokens=128 * 20), out=tmp_path)
    again = tr.train(held(), topk(), plan(tokens=128 * 20), out=tmp_path)
    assert same(first.dictionary, again.dictionary)
    assert again.tokens == 128 * 20


def test_dictionaries_on_one_stream_are_those_of_single_runs():
    recipes = [topk(seed=0), topk(seed=1), tr.autoencoder(A, F, tr.TrainRelu(), (ob.L1(0.4),), rate=1e-3)]
    together = tr.train(held(), recipes, plan())
    alone = [tr.train(held(), r, plan()) for r in recipes]
    assert all(same(a.dictionary, b.dictionary) for a, b in zip(together, alone, strict=True))
    assert not same(together[0].dictionary, together[1].dictionary)


def test_the_probe_tries_three_rates_keeps_the_best_and_reports_all(tmp_path):
    done = tr.train(held(), topk(rate=None), plan(tokens=128 * 72), out=tmp_path)
    assert len(done.curves) == 3
    rates = sorted(float(r) for r in done.curves)
    assert rates[1] / rates[0] == pytest.approx(3, rel=1e-2)
    assert rates[2] / rates[1] == pytest.approx(3, rel=1e-2)
    lengths = {r: len(c) for r, c in done.curves.items()}
    assert [r for r, n in lengths.items() if n == max(lengths.values())] == [f"{done.rate:.3g}"]
    events = [
        x for x in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if x.get("event") == "probe"
    ]
    assert min(events[0]["losses"], key=events[0]["losses"].get) == f"{done.rate:.3g}"


def test_the_probe_drops_a_rate_that_explodes():
    source = held()
    source.acts[A] = source.acts[A] * 1e3
    done = tr.train(source, topk(rate=None, scaled=False), plan(tokens=128 * 24))
    assert torch.isfinite(done.dictionary.encoder[0][A]).all()


def test_a_loss_that_is_no_number_changes_nothing_and_three_of_them_end_the_run():
    source = held()
    good = tr.train(held(), topk(), plan(tokens=128 * 10))
    learner = tr.Learner(topk(), tr.SiteMoments.of(source.acts))
    before = {n: w.detach().clone() for n, w in learner.weights.items()}
    assert learner.step({A: torch.full((4, D), float("nan"))}, 1e-3, 0.0) is None
    assert all(torch.equal(w.detach(), before[n]) for n, w in learner.weights.items())
    source.acts[A] = source.acts[A].clone()
    source.acts[A][::7] = float("inf")
    with pytest.raises(Refused, match="no number"):
        tr.train(source, topk(), plan())
    assert good.tokens == 1280


def test_silent_latents_are_counted_in_tokens_and_brought_back():
    acts = held().acts[A]
    recipe = tr.autoencoder(A, F, tr.TrainTopK(3), (ob.AuxK(k=8, after=500),), rate=1e-2)
    learner = tr.Learner(recipe, tr.SiteMoments.of({A: acts}))
    with torch.no_grad():
        learner.weights["encoder.0"][:40] *= 1e-3  # positive on some tokens, never among the largest
    for i in range(4):
        learner.step({A: acts[i * 128 : (i + 1) * 128]}, 0.0, 0.0)
    silent = learner.buffers["silent.0"]
    assert silent[:40].tolist() == [512] * 40
    assert bool((silent[40:] < 512).any())
    before = learner.weights["decoder.0"].detach().clone()
    learner.step({A: acts[:128]}, 1e-2, 0.0)
    moved = (learner.weights["decoder.0"].detach() - before).abs().sum(1) > 1e-4
    assert bool(moved[:40].any())
    learner.recipe = tr.autoencoder(A, F, tr.TrainTopK(3), ())
    before = learner.weights["decoder.0"].detach().clone()
    learner.adam = adams.Adam({n: w.detach() for n, w in learner.weights.items()}, learner.recipe.adam)
    learner.step({A: acts[:128]}, 1e-2, 0.0)
    assert not bool(((learner.weights["decoder.0"].detach() - before).abs().sum(1)[:40] > 1e-4).any())


def test_dense_form_gives_way_to_the_sparse_one_as_codes_get_sparse():
    acts = held().acts[A]
    learner = tr.Learner(tr.autoencoder(A, F, tr.TrainRelu(), (ob.L1(0.0),)), tr.SiteMoments.of({A: acts}))
    learner.step({A: acts[:128]}, 0.0, 0.0)
    assert learner.dense == [True]
    with torch.no_grad():
        learner.weights["b_enc.0"].fill_(-50.0)
    learner.step({A: acts[:128]}, 0.0, 0.0)
    assert learner.dense == [False]
    with torch.no_grad():
        learner.weights["b_enc.0"].fill_(5.0)
    learner.step({A: acts[:128]}, 0.0, 0.0)
    assert learner.dense == [True]


def test_the_log_has_a_line_a_time_and_progress_is_told(tmp_path):
    seen, told = [], []
    with listening(lambda done, total: told.append((done, total))):
        tr.train(held(), topk(), plan(), out=tmp_path, progress=seen.append)
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "precision"
    body = [x for x in lines if "loss" in x]
    assert [x["step"] for x in body] == [4, 8, 12, 16, 20, 24]
    assert {"tokens", "rate", "factor", "fvu", "l0", "silent", "terms", "tokens_per_second"} <= set(body[0])
    assert all(x["l0"] <= 3 for x in body)
    assert told[-1] == (128 * 24, 128 * 24)
    assert seen[-1].seconds_left == 0
    assert seen[0].tokens_per_second > 0


def test_the_schedule_rises_and_falls():
    p = tr.Plan(tokens=1000, warmup=0.1, decay=0.2)
    factors = [p.factor(i, 100) for i in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(factors[10:81]) == {1.0}
    assert factors[99] == pytest.approx(1 / 20)
    assert p.probing(100) == 25
    assert p.probing(10_000) == 200


def test_fused_adam_is_there_and_its_fallback_agrees(monkeypatch):
    assert adams.has_fused("cpu", torch.float32)
    one = tr.train(held(), topk(), plan(tokens=128 * 5)).dictionary

    def missing(*_):
        raise AttributeError("no such operation")

    monkeypatch.setattr(adams, "_fused", missing)
    adams.has_fused.cache_clear()
    try:
        assert not adams.has_fused("cpu", torch.float32)
        other = tr.train(held(), topk(), plan(tokens=128 * 5)).dictionary
    finally:
        adams.has_fused.cache_clear()
    assert all(torch.allclose(t, described(other)[0][n], atol=1e-5) for n, t in described(one)[0].items())


@pytest.mark.parametrize("name", GATES)
def test_recipes_are_plain_data(name):
    recipe = GATES[name]
    assert recipe_of(json.loads(json.dumps(recipe.as_dict()))) == recipe


def test_a_source_that_ends_ends_the_run():
    class Short(tr.Held):
        def __next__(self):
            if self.number >= 7:
                raise StopIteration
            return super().__next__()

    done = tr.train(Short(held().acts, 128), topk(), plan(log_every=5))
    assert done.tokens == 7 * 128
    assert done.curves[f"{done.rate:.3g}"][-1]["tokens"] == 7 * 128


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: tr.train([torch.zeros(4, D)], topk(), plan()), "cursor"),
        (lambda: tr.train(held(), [], plan()), "recipe"),
        (lambda: tr.train(held(), tr.autoencoder(B, F, tr.TrainTopK(3)), plan()), "mlp_out.1"),
        (lambda: tr.autoencoder(A, F, tr.TrainTopK(F + 1)), "k = 65"),
        (lambda: tr.autoencoder(A, F, tr.TrainTopK(0)), "larger k"),
        (lambda: tr.autoencoder(A, 0, tr.TrainTopK(1)), "more latents"),
        (lambda: topk(rate=-1.0), "learning rate -1.0"),
        (lambda: tr.autoencoder(A, F, tr.TrainRelu(), (ob.L1(-1.0),)), "weight -1.0"),
        (lambda: tr.train(held(), topk(), plan(), out="/proc/xx"), "cannot be made"),
        (lambda: tr.train(held(), topk(), plan(), device="nowhere"), "device 'nowhere'"),
        (lambda: tr.Plan(tokens=9, checkpoint_seconds=0.0), "checkpoint_seconds"),
        (lambda: tr.autoencoder(A, F, tr.TrainGroupMax(7)), "groups"),
        (lambda: tr.autoencoder("somewhere.0", F, tr.TrainTopK(7)), "somewhere"),
        (lambda: tr.Plan(tokens=0), "tokens=0"),
        (lambda: tr.train(held(), topk(), tr.Plan(tokens=9)), "one batch of the source has"),
        (lambda: tr.Plan(tokens=9, decay=1.5), "decay"),
        (lambda: tr.autoencoder(A, F, tr.TrainTopK(3), (ob.L0(1.0),)), "L0"),
        (lambda: tr.autoencoder(A, F, tr.TrainGated(), ()), "gated"),
        (lambda: tr.autoencoder(A, F, tr.TrainTopK(3), (ob.Matryoshka((8, 64)),)), "Matryoshka"),
        (lambda: tr.autoencoder(A, F, tr.TrainRelu(), decoder="norm_aware"), "norm-aware"),
        (lambda: tr.transcoder(A, B, F, tr.TrainTopK(3), subtract=True), "subtract"),
        (lambda: tr.transcoder(A, B, F, tr.TrainMatchingPursuit(3)), "unit rows"),
        (lambda: tr.autoencoder(A, F, tr.TrainMatchingPursuit(3), (ob.AuxK(),)), "AuxK"),
        (lambda: tr.cross_layer([A], [B, C], F, tr.TrainTopK(3)), "cross-layer"),
        (lambda: tr.Held({A: torch.zeros(4, 2)}, 5), "batches"),
        (lambda: tr.recipe_of({**topk().as_dict(), "gating": {"kind": "Maybe"}}), "Maybe"),
        (lambda: tr.recipe_of({"gating": {"kind": "TopK", "k": 1}}), "'blocks' is missing"),
        (lambda: tr.recipe_of({**topk().as_dict(), "colour": 1}), "'colour'"),
        (lambda: tr.recipe_of({**topk().as_dict(), "adam": {"beta": 1}}), "cannot be read"),
        (lambda: tr.transcoders([A], [B, C], F, tr.TrainTopK(3)), "as many"),
        (lambda: ob.term_of({"kind": "Spliced"}), "Spliced"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(Refused, match=word):
        call()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    tr.train(held(), topk(), plan(), out=tmp_path, stop_after=5)
    with pytest.raises(Refused, match="other recipes"):
        tr.train(held(), topk(seed=5), plan(), out=tmp_path)
    with pytest.raises(Refused, match="other plan"):
        tr.train(held(), topk(), plan(tokens=128 * 61), out=tmp_path)
    tr.train(held(), topk(seed=5), plan(), out=tmp_path, resume=False, stop_after=3)


def test_lines_of_the_log_are_told_and_go_to_wandb(monkeypatch, tmp_path):
    class Run:
        lines, closed = [], False

        def log(self, data, step):
            self.lines.append((step, data))

        def finish(self):
            Run.closed = True

    asked = {}
    fake = SimpleNamespace(init=lambda **given: asked.update(given) or Run())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with tr.wandb_log("project", {"k": 3}) as on_log:
        tr.train(held(), topk(), plan(), out=tmp_path, on_log=on_log)
        assert not Run.closed
    assert Run.closed
    assert asked == {"project": "project", "config": {"k": 3}}
    kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [step for step, _ in Run.lines] == [line["step"] for line in kept]
    for (_, sent), line in zip(Run.lines, kept, strict=True):
        if "event" in line:
            assert sent == {f"event/{line['event']}": 1.0}
        else:
            assert sent["0@0.003/fvu"] == line["fvu"]
            assert sent["0@0.003/terms/AuxK"] == line["terms"]["AuxK"]
            assert sent["tokens"] == line["tokens"]
            assert all(isinstance(v, int | float) for v in sent.values())


def test_without_wandb_its_log_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(Refused, match="not installed"), tr.wandb_log("project", {}):
        pass


def test_annealing_goes_from_the_norm_to_the_power():
    term = ob.L1(1.0, rise=0.1, power=0.2, anneal=0.5)
    assert [round(term.power_at(done), 6) for done in (0, 0.1, 0.35, 0.6, 1)] == [1, 1, 0.6, 0.2, 0.2]
    assert ob.L1(1.0, power=0.5).power_at(0) == 0.5
