"""Models that learned programs: they answer prompts that they were not trained on, and their recipe remakes them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors.torch import load_file

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.models.edits.wiring import wiring
from cutaway.models.model import Model
from cutaway.training import Checkpoints
from cutaway.zoo.compiled import PROGRAMS, structural
from cutaway.zoo.learned import train as recipe
from cutaway.zoo.learned.entry import DATA

TINY = recipe.Settings(batch=4, steps=4)


@cache
def model(name: str) -> Model:
    return ca.load(f"learned/{name}", check=False)


def accuracy(of: Model, seed: int) -> float:
    bound = ca.tasks.load(of.program.name, of, n=128, seed=seed).bind(of, "accuracy")
    return float(of.measure(bound.clean, bound.measure).mean())


@pytest.mark.parametrize("name", PROGRAMS)
def test_shipped_models_answer_held_out_prompts_and_have_the_edges_of_the_compiled_program(name):
    of, compiled = model(name), ca.load(f"compiled/{name}", check=False)
    assert accuracy(of, 11) >= 0.98
    assert wiring(of).edges == wiring(compiled).edges
    assert of.tokenizer.get_vocab() == compiled.tokenizer.get_vocab()
    with pytest.raises(Refused, match="not compiled"):
        structural(of, wiring(of))


def test_shipped_files_are_the_weights_of_every_program_and_small():
    assert {p.stem for p in DATA.iterdir()} == set(PROGRAMS)
    assert sum(p.stat().st_size for p in DATA.iterdir()) < 2_000_000
    first = dict(recipe.initial_model(PROGRAMS["reverse"], recipe.Settings()).named_parameters())
    assert {n: t.shape for n, t in load_file(DATA / "reverse.safetensors").items()} == {
        n: p.shape for n, p in first.items()
    }
    assert not torch.equal(
        load_file(DATA / "reverse.safetensors")["transformer.wte.weight"], first["transformer.wte.weight"]
    )


def test_batches_ask_what_the_program_answers_and_nothing_else():
    program = PROGRAMS["reverse"]
    tokens, asked = next(recipe.Prompts(program, 8, 0))
    words = (None, None, *program.words)
    for ids, targets in zip(tokens.tolist(), asked.tolist(), strict=True):
        said = [words[i] for i in ids[1:]]
        right = [program.answer(said[: n + 1]) for n in range(len(said))]
        assert [None if t == recipe.UNASKED else words[t] for t in targets] == [None, *right]
    again = recipe.Prompts(program, 8, 0).restore({"step": 1})
    later = recipe.Prompts(program, 8, 0)
    next(later)
    assert torch.equal(next(again), next(later))


def test_a_run_taken_up_again_gives_the_same_weights_and_an_ordinary_folder(tmp_path):
    program = PROGRAMS["shift"]
    recipe.train(tmp_path / "whole", program, settings=TINY, threads=1)
    recipe.train(tmp_path / "halves", program, settings=TINY, threads=1, stop_after=2)
    assert not (tmp_path / "halves" / "model.safetensors").exists()
    recipe.train(tmp_path / "halves", program, settings=TINY, threads=1)
    whole, halves = (Checkpoints(tmp_path / n, recipe.LearnedUpdate.kind).read() for n in ("whole", "halves"))
    assert whole[1]["step"] == 4
    assert all(torch.equal(t, halves[0][n]) for n, t in whole[0].items())
    got = ca.load(tmp_path / "whole", check=False)
    assert got.tokens("a b").ids.tolist() == model("shift").tokens("a b").ids.tolist()


@pytest.mark.wide
@pytest.mark.parametrize("name", ["shift", "parity"])
def test_the_recipe_makes_a_model_that_answers(name, tmp_path):
    of = ca.load(ca.zoo.entry(f"learned/{name}").train(tmp_path, threads=1), check=False)
    of.program = PROGRAMS[name]
    assert accuracy(of, 12) >= 0.95


def test_an_unknown_task_is_refused():
    with pytest.raises(Refused, match="did you mean learned/reverse"):
        ca.zoo.entry("learned/revers")
    with pytest.raises(Refused, match="no task has that name"):
        ca.tasks.load("shift", model("reverse"))
