"""The end card: scores with intervals, nulls and controls on tokens that were not trained on; seeds side by side."""

import json
import math

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.dictionaries import training as tr
from cutaway.dictionaries.evaluation.evidence import Evidence, encode_evidence
from cutaway.suites import dictionary_cards as cards

A = "resid_post.0"


class Fresh:
    """Batches that are a function of their number, so that none comes twice."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.rows = torch.nn.functional.normalize(torch.randn(24, 12, generator=g))
        self.number = 0

    def __iter__(self):
        return self

    def __next__(self):
        g = torch.Generator().manual_seed(self.number)
        self.number += 1
        amount = (torch.rand(256, 24, generator=g) + 0.5) * (torch.rand(256, 24, generator=g) < 0.08)
        return {A: amount @ self.rows}

    def state(self):
        return {"number": self.number}

    def restore(self, state):
        self.number = state["number"]
        return self


@pytest.fixture(scope="module")
def run():
    source = Fresh()
    recipes = [tr.autoencoder(A, 48, tr.TrainTopK(3), rate=1e-2, seed=s) for s in (0, 1)]
    plan = tr.Plan(tokens=256 * 60, select="float32", products="plain")
    done = tr.train(source, recipes, plan)
    return source, done, cards.card(done, source, tokens=2000)


def test_the_card_says_what_the_dictionary_does_on_fresh_tokens(run):
    source, done, made = run
    assert source.number == 60  # left where it was
    fresh = torch.cat([next(iter(source))[A] for _ in range(8)])[:2000][500:]
    x = done[0].dictionary.forward(fresh)
    fvu = float((fresh - x).pow(2).sum() / (fresh - fresh.mean(0)).pow(2).sum())
    row = made[0]["scores"]["FVU"]
    assert row["value"] == pytest.approx(fvu, rel=1e-4)
    assert row["interval"][0] < fvu < row["interval"][1]
    assert len(row["random"]) == 2
    assert min(row["random"]) > 2 * fvu
    assert min(row["controls"].values()) > fvu
    encoded = encode_evidence(done[0].dictionary, Evidence({A: fresh}))
    assert made[0]["scores"]["dead"]["value"] == pytest.approx(float((encoded.code.fires() == 0).float().mean()))
    low, high = made[0]["scores"]["dead"]["interval"]
    assert low <= made[0]["scores"]["dead"]["value"] <= high
    source.restore({"number": 60})


def test_seeds_of_one_recipe_are_compared_and_others_are_not(run):
    source, done, made = run
    alike = made[0]["seeds"]
    assert alike["seeds"] == [0, 1]
    assert alike["interval"][0][0] <= alike["alike"][0] <= alike["interval"][0][1]
    assert alike["alike"][0] > max(alike["null"][0])
    assert "none" in cards.card(done[:1], source, tokens=600)[0]["seeds"]


def test_the_card_is_plain_data_with_curves_and_speed(run):
    _, done, made = run
    again = json.loads(json.dumps(made[0]))
    assert again["tokens"] == 256 * 60
    assert again["tokens_per_second"] > 0
    assert again["curves"][f"{done[0].rate:.3g}"][-1]["tokens"] == 256 * 60
    assert [r["score"] for r in cards.summary(made[0])] == ["L0", "FVU", "dead"]
    with pytest.raises(Refused, match="taste"):
        cards.summary(made[0], ["taste"])


def test_the_threshold_of_a_batch_gate_gives_the_sparsity_trained_for():
    source = Fresh()
    recipe = tr.autoencoder(A, 48, tr.TrainBatchTopK(3), rate=1e-2)
    done = tr.train(source, recipe, tr.Plan(tokens=256 * 80, select="float32", products="plain"))
    gate = done.dictionary.gate
    assert gate.threshold is not None
    assert not math.isnan(gate.threshold)
    l0 = encode_evidence(done.dictionary, Evidence(next(iter(source)))).l0
    assert l0 == pytest.approx(3, abs=0.4)


def test_a_card_warns_of_what_was_trained_on_and_of_what_is_worse_than_the_mean():
    acts = torch.cat([next(Fresh())[A] for _ in range(2)])
    source = tr.Held({A: acts}, 256)
    plan = tr.Plan(tokens=256 * 4, select="float32", products="plain")
    done = tr.train(source, [tr.autoencoder(A, 24, tr.TrainTopK(3), rate=1e3)], plan)
    (made,) = cards.card(done, source, tokens=600)
    assert made["held_out"] is False
    assert [w.split(":")[0].split(" is")[0] for w in made["warnings"]] == [
        "FVU",
        "the source began anew, so these tokens were trained on",
    ]
    (fresh,) = cards.card(done, Fresh(), tokens=600)
    assert fresh["held_out"] is None
    source = tr.Held({A: torch.cat([acts] * 4)}, 256)
    done = tr.train(source, [tr.autoencoder(A, 24, tr.TrainTopK(3), rate=1e-3)], plan)
    (unseen,) = cards.card(done, source, tokens=256)
    assert unseen["held_out"] is True
    assert not unseen["warnings"]
