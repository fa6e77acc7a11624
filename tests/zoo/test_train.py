"""The recipe: seeded, resumable to the bit, exported as a Hugging Face model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cutaway.core.refuse import Refused
from cutaway.training import Checkpoints
from cutaway.zoo.miniworld import train as recipe

TINY = recipe.Settings(layers=1, width=32, heads=2, mlp=32, block=32, batch=2, steps=5, finish=2, warmup=2)


def run(folder, **options):
    return recipe.train(folder, settings=TINY, threads=1, checkpoint_every=100, **options)


def test_a_run_taken_up_again_gives_the_same_weights(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "halves", stop_after=3)
    assert not (tmp_path / "halves" / "model.safetensors").exists()
    run(tmp_path / "halves")
    whole, halves = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    assert any(key.startswith("optimizer/1") for key in whole)
    assert all(torch.equal(whole[key], halves[key]) for key in whole)


def test_a_run_of_the_first_layout_is_taken_up(tmp_path):
    """Before the common loop, the header held one record and `checkpoint.json` a copy of it."""
    whole = run(tmp_path / "whole")
    part = run(tmp_path / "part", stop_after=3)
    tensors, new = Checkpoints(part, recipe.KIND).read()
    old = {n: new[n] for n in ("step", "seconds", "loss", "log", "threads", "settings")}
    save_file(tensors, part / "checkpoint.safetensors", {"record": json.dumps(old | {"corpus": new["source"]})})
    (part / "checkpoint.json").write_text(json.dumps(old))
    assert recipe.summary(part)["steps"] == 3
    run(part)
    one, other = (load_file(f / "model.safetensors") for f in (whole, part))
    assert all(torch.equal(t, other[n]) for n, t in one.items())


def test_progress_is_told_and_globals_are_left_alone(tmp_path):
    from dataclasses import replace

    told: list[recipe.Progress] = []
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    recipe.train(tmp_path, settings=replace(TINY, steps=30, finish=10), threads=1, progress=told.append)
    assert [p.step for p in told] == [20, 40]
    assert told[-1].seconds_left == 0
    assert told[0].tokens_per_second > 0
    assert told[1].loss < told[0].loss
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_the_export_loads_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    ids = AutoTokenizer.from_pretrained(folder)("The capital of Norway is", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, ids.shape[1], model.config.vocab_size)
    assert (folder / "world.json").exists()
    assert not list(folder.glob("*.bin")) + list(folder.glob("*.pt"))


def test_other_settings_are_refused(tmp_path):
    from dataclasses import replace

    run(tmp_path, stop_after=2)
    with pytest.raises(Refused, match="settings"):
        recipe.train(tmp_path, settings=replace(TINY, batch=3), threads=1)


def test_an_unfinished_run_can_be_exported(tmp_path):
    run(tmp_path / "run", stop_after=2)
    recipe.export_checkpoint(tmp_path / "run", tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert recipe.summary(tmp_path / "run")["steps"] == 2


def test_the_rate_warms_up_decays_and_finishes():
    settings = recipe.Settings()
    assert recipe.rate(0, 0, settings) == pytest.approx(1 / settings.warmup)
    assert recipe.rate(1000, 1000, settings) == 1.0
    assert recipe.rate(6300, 6300, settings) == pytest.approx(0.5)
    assert recipe.rate(8999, 8999, settings) == pytest.approx(0.02)
    assert recipe.rate(9000, 9000, settings) == pytest.approx(0.1)
