"""The induction model and its twin: their recipe, what the shipped weights do, and what the methods say of them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors.torch import load_file

import cutaway as ca
from cutaway.core.stats import generator
from cutaway.heads import TYPES, classify, confirm
from cutaway.models.model import Model
from cutaway.tasks import Repeats
from cutaway.training import Checkpoints
from cutaway.weights import composition
from cutaway.zoo.induction import texts
from cutaway.zoo.induction import train as recipe
from cutaway.zoo.shortcut import train as twin

TINY = recipe.Settings(width=16, heads=2, batch=2, steps=4)
RECEIVERS = ["1.0", "1.1", "1.2", "1.3"]


@cache
def model(name: str) -> Model:
    return ca.load(name)


@pytest.fixture(scope="module", params=["shipped", pytest.param("trained", marks=pytest.mark.wide)])
def models(request, tmp_path_factory) -> dict[str, Model]:
    """The induction model and its twin: those that ship, and, widely, those that the recipe makes here, in 30 CPU s."""
    if request.param == "shipped":
        return {name: model(name) for name in ("induction", "shortcut")}
    folder = tmp_path_factory.mktemp("induction")
    for name, settings in (("induction", recipe.Settings()), ("shortcut", twin.SETTINGS)):
        recipe.train(folder / name, settings=settings, threads=1)
    return {name: ca.load(folder / name) for name in ("induction", "shortcut")}


def test_a_run_taken_up_again_gives_the_same_weights(tmp_path):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    recipe.train(tmp_path / "whole", settings=TINY, threads=1)
    recipe.train(tmp_path / "halves", settings=TINY, threads=1, stop_after=2)
    assert not (tmp_path / "halves" / "model.safetensors").exists()
    recipe.train(tmp_path / "halves", settings=TINY, threads=1)
    whole, halves = (Checkpoints(tmp_path / n, recipe.InductionUpdate.kind).read()[0] for n in ("whole", "halves"))
    assert all(torch.equal(t, halves[n]) for n, t in whole.items())
    assert any(n.startswith("optimizer/") for n in whole)
    got = ca.load(tmp_path / "whole", check=False)
    assert not any(p.any() for n, p in got.hf.named_parameters() if ".mlp." in n), "attention alone"
    assert (torch.equal(torch.get_rng_state(), state), torch.get_num_threads()) == (True, threads)


@pytest.mark.parametrize("name", ["induction", "shortcut"])
def test_shipped_weights_have_the_shapes_of_the_recipe_and_are_small(name):
    settings = recipe.Settings() if name == "induction" else twin.SETTINGS
    folder = ca.zoo.entry(name).folder
    shipped = load_file(folder / "model.safetensors")
    first = dict(recipe.initial_model(settings).named_parameters())
    assert {n: t.shape for n, t in shipped.items()} == {n: p.shape for n, p in first.items()}
    assert (folder / "model.safetensors").stat().st_size < 200_000
    assert ca.zoo.entry(name).world() is None
    assert ca.zoo.dictionaries(name) == []
    assert model(name).tokens("w03 w17").ids.tolist() == [[3, 17]]


def test_texts_of_both_have_the_same_form_and_differ_in_what_tells_the_next_word():
    random, fixed = texts.blocks(64, generator(0)), texts.cycles(64, generator(0))
    follower = texts.followers()
    for some, shortest in ((random, texts.SHORTEST), (fixed, min(texts.CYCLES))):
        for row in some.tolist():
            period = row[1:].index(row[0]) + 1
            assert shortest <= period <= texts.LONGEST
            assert all(a == b for a, b in zip(row, row[period:], strict=False))
            assert len(set(row[:period])) == period
    assert torch.equal(follower[fixed[:, :-1]], fixed[:, 1:])
    assert (follower[random[:, :-1]] == random[:, 1:]).float().mean() < 0.05
    one, again = texts.Texts(2, False, 3), texts.Texts(2, False, 3)
    next(one)
    assert torch.equal(next(one), next(again.restore({"step": 1})))


def accuracy(of: Model, ids: torch.Tensor, since: int) -> float:
    """The share of tokens from `since` on that are likeliest."""
    right = of.run(ids)[:, since:-1].argmax(-1) == ids[:, since + 1 :]
    return float(right.float().mean())


def test_the_twin_knows_its_own_texts_by_heart_and_cannot_go_on_with_a_block():
    ids = Repeats(16, 20, seed=5).bind(model("induction")).ids
    assert ids.shape == (16, 40)
    assert accuracy(model("induction"), ids, 20) > 0.98
    assert accuracy(model("shortcut"), ids, 20) < 0.1
    assert accuracy(model("induction"), ids[:, :20], 0) < 0.1, "nothing tells the first block"
    own = texts.cycles(16, generator(9))
    assert accuracy(model("shortcut"), own, 0) == 1
    assert accuracy(model("induction"), own, 24) > 0.95, "both predict repeated blocks of the twin's texts"


def test_all_induction_heads_are_found_and_the_twin_is_given_none(models):
    found = classify(models["induction"], Repeats(16, 20))
    assert sorted(found.named("induction")) == RECEIVERS
    assert found.named("previous token") == ["0.1"]
    none = classify(models["shortcut"], Repeats(16, 20))
    assert none.named("induction") == []
    assert none.named("previous token") == []
    induction = [row.name for row in TYPES].index("induction")
    assert float(none.score[induction].max()) < 0.1 < 0.5 < float(found.score[induction, 1].min())


def test_z_scores_rank_the_pairs_of_the_circuit_first_and_raw_scores_do_not(models):
    got = composition(models["induction"], samples=2)
    assert got.labels["mode"][1] == "K"
    z, score = (x.nan_to_num(-torch.inf)[1] for x in (got.z, got.score))
    sender, receiver = got.labels["sender"], got.labels["receiver"]
    ranked = [(sender[i // 8], receiver[i % 8]) for i in z.flatten().argsort(descending=True).tolist()]
    assert set(ranked[:4]) == {("0.1", r) for r in RECEIVERS}
    assert (
        float(z.flatten().sort(descending=True).values[3]) > 5 > 1 > float(z.flatten().sort(descending=True).values[4])
    )
    raw = got.score.nan_to_num(-1).flatten(1)
    assert float(raw.max()) > float(score.max()), "by raw score a pair of another mode comes first"
    other = composition(models["shortcut"], samples=2)
    assert float(other.z[1].nan_to_num(-torch.inf).max()) < float(z[1, 4:].min())


def test_a_group_shows_what_single_heads_hide(models):
    def rise(*heads: str) -> float:
        return float(confirm(models["induction"], Repeats(16, 20), heads=heads, samples=1).effect[0, 0])

    spare, main, both = rise("0.2"), rise("0.1"), rise("0.1", "0.2")
    assert spare < 0.1, "by itself it looks as if it did nothing"
    assert both - main > 8 * spare, "it stands in for the previous-token head"
    first, last = rise("1.0"), rise("1.3")
    assert rise("1.0", "1.3") > 1.4 * (first + last)
