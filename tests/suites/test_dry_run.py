"""Dry runs: what a call will cost, told without making it. The conformance suite holds the forwards of every method."""

from __future__ import annotations

import json
import shlex

import pytest
import torch

import cutaway as ca
from cutaway.cli import app
from cutaway.core.record import counting
from cutaway.core.refuse import Refused
from cutaway.models import dry
from cutaway.models.access.reading import Measure, Reads
from cutaway.models.edits.library import Scale
from cutaway.models.sweep.executor import sweep
from cutaway.suites.dry_run import DryRun, _Live, dry_run
from tests.conformance import subjects

CAPITAL = "The capital of Norway is"


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(dry, "_POSITIONS", 1)


def test_prompts_of_several_lengths_and_a_metric_that_ends_early_are_counted():
    model, task = subjects.random_llama(), subjects.uneven_task()
    told = dry_run(ca.patching.activation, model, task, site="z")
    found = ca.patching.activation(model, task, site="z")
    assert told.forwards == pytest.approx(found.record["cost"]["forwards"], rel=1e-9)
    assert told.spent_forwards < told.forwards / 2
    tokens, place = task.bind(model).clean, ca.models.Model.places(model, "resid_mid.1")[0]
    measure = Measure(lambda seen, prompt: seen.activations[str(place)][:, -1].sum(-1), Reads(False, (place,)))
    variants = [[Scale(f"z.{i}.{h}", 0.5)] for i in (0, 1) for h in range(4)]
    with counting() as real:
        values = sweep(model, tokens, variants, measure)
    with dry.planning() as planned, counting() as spent:
        made = sweep(model, tokens, variants, measure)
    assert spent.forwards + planned.forwards == pytest.approx(real.forwards, rel=1e-9)
    assert planned.forwards > 0
    assert made.shape == values.shape


def test_what_a_folder_keeps_is_not_planned_again_and_nothing_is_kept_of_a_dry_run(tmp_path):
    model, task = subjects.random_llama(), subjects.llama_task()
    with ca.resuming(tmp_path):
        before = dry_run(ca.patching.activation, model, task, site="z")
        assert list(tmp_path.iterdir()) == []
        ca.patching.activation(model, task, site="z")
        kept = {p: p.read_bytes() for p in tmp_path.iterdir()}
        after = dry_run(ca.patching.activation, model, task, site="z")
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == kept
    assert after.batch == 0
    assert after.forwards < before.forwards / 3


def test_a_dry_run_changes_nothing():
    model, task = subjects.random_llama(), subjects.llama_task()
    first = ca.patching.activation(model, task)
    before = model.fingerprint(fresh=True)
    dry_run(ca.patching.activation, model, task)
    assert model.fingerprint(fresh=True) == before
    assert torch.equal(ca.patching.activation(model, task).effect, first.effect)
    assert dry.planned() is None


def test_what_the_call_refuses_is_refused():
    model, task = subjects.random_llama(), subjects.llama_task()
    for options in ({"site": "nonsense"}, {"sample": 1}, {"samples": 0}, {"window": 3}):
        with pytest.raises(Refused) as run:
            ca.patching.activation(model, task, **options)
        with pytest.raises(Refused) as told:
            dry_run(ca.patching.activation, model, task, **options)
        assert str(told.value) == str(run.value)
    with pytest.raises(Refused, match="no model and prompts"):
        dry_run(len, [1])
    assert dry.planned() is None


def test_a_refusal_that_made_up_numbers_may_have_caused_is_told_and_not_raised():
    model, task = subjects.random_llama(), subjects.llama_task()

    def call(model, task):
        result = ca.patching.activation(model, task)
        raise Refused("a call", f"{result.effect.numel()} numbers do not suit", "give others")

    told = dry_run(call, model, task)
    assert "do not suit" in told.says[0]
    assert told.forwards == dry_run(ca.patching.activation, model, task).forwards


def test_what_cannot_be_told_is_said_in_words():
    from tests.conformance.rows import given

    none = dry_run(ca.dictionaries.geometry, *given("dictionaries.geometry", "miniworld"))
    assert (none.forwards, none.seconds, none.memory) == (0, None, None)
    assert "no model runs" in str(none)
    unknown = DryRun("m", None, None, None, None, 0, 0, None, 0, 0, ("forwards are unknown",))
    assert "forwards are unknown" in str(unknown)
    assert "None" not in str(unknown)


def test_memory_is_that_of_tensors_that_live_at_once():
    weight = torch.ones(1000)
    with _Live([weight]) as live:
        a = torch.zeros(100)
        b = a + 1
        del a
        c = torch.cat([b, b])
        weight[:10].add(1)
    assert live.most == 4 * 310
    assert c.numel() == 200


def test_explain_is_planned_with_its_last_part():
    model = subjects.miniworld()
    told = dry_run(ca.explain, model, CAPITAL, effort="quick")
    spent = ca.explain(model, CAPITAL, effort="quick").spent
    assert told.call == "explain"
    assert told.spent_forwards < 0.8 * spent.forwards
    assert told.forwards == pytest.approx(spent.forwards, rel=0.25)  # the heads that are found decide the rest


@pytest.mark.parametrize("command", ["patch --task facts --task-n 4 --site z", f"explain '{CAPITAL}' --effort quick"])
def test_the_command_says_it_and_stops(command, capsys, tmp_path):
    out = "" if command.startswith("explain") else f" --out {tmp_path / 'a.safetensors'}"
    assert app.main(shlex.split(f"{command}{out} --dry-run --json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["forwards"] > told["spent_forwards"] > 0
    assert told["memory"] > told["weights"] > 0
    assert list(tmp_path.iterdir()) == []
    if out:
        assert app.main(shlex.split(f"{command} --dry-run")) == 0
        shown = capsys.readouterr().out
        said = [line.split()[0] for line in shown.splitlines() if not line.startswith(" ")]
        assert said == ["patching.activation:", "forwards", "seconds", "memory", "measured", "spent"]
        assert app.main(shlex.split(f"{command} --samples 0 --dry-run")) == 2
