"""Contrasts of latents: by hand, as edits, with a trained model's sentiment beside its controls, files and refusals."""

from dataclasses import replace

import pytest
import torch

import cutaway as ca
from cutaway.interventions.probes import difference_interval, folds
from cutaway.tasks import Labelled
from tests.conformance import subjects
from tests.directions.made import asked, reviews, seeded

NAMES = ("Mary", "John", "Anna", "Peter", "Tom", "Lucy")
TEXTS = tuple(f"{a} and {b} went to the {p}" for a in NAMES for b in NAMES if a != b for p in ("store", "park"))
LABELLED = Labelled(TEXTS, ("park",), torch.tensor([["park" in t] for t in TEXTS]), tuple(t.split()[0] for t in TEXTS))
ZOO = "miniworld/resid_post.3"


@pytest.fixture(scope="module")
def model():
    return subjects.random_llama()


@pytest.fixture(scope="module")
def dictionary(model):
    return subjects.dictionary(model.shape.d_model, n=40)


@pytest.fixture(scope="module")
def found(model, dictionary):
    return ca.features.contrast(model, dictionary, LABELLED, top=4, reading="last", samples=3)


def codes(model, d, texts):
    """The code of every token but the first, text by text."""
    return [d.encode(model.capture(t, d.reads[0])[d.reads[0]][0, 1:]).dense() for t in texts]


def test_differences_ranks_and_densities_are_those_of_codes_read_one_by_one(model, dictionary, found):
    each, y, group = codes(model, dictionary, TEXTS), LABELLED.shown[:, 0], LABELLED.group_of
    last = torch.stack([f[-1] for f in each])
    gap = last[y].mean(0) - last[~y].mean(0)
    written = gap * dictionary.decoder[0]["resid_post.1"].norm(dim=1)
    order = written.argsort(descending=True).tolist()
    assert found.index.tolist() == [*order[:4], *order[:-5:-1]]
    torch.testing.assert_close(found.difference, gap[found.index], atol=1e-5, rtol=1e-4)
    active = (torch.cat(each) != 0).float().mean(0)
    torch.testing.assert_close(found.density, active[found.index], atol=1e-5, rtol=1e-4)
    scores = torch.zeros(len(y))
    for fit, test in folds(y, group):
        own = last[fit][y[fit]].mean(0) - last[fit][~y[fit]].mean(0)
        kept = (own * dictionary.decoder[0]["resid_post.1"].norm(dim=1)).argsort(descending=True)
        kept = torch.cat([kept[:4], kept[-4:]])
        seen = last[fit][:, kept] @ own[kept]
        scores[test] = (last[test][:, kept] @ own[kept] - seen.mean()) / seen.std()
    pairs = scores[y][:, None] - scores[~y][None]
    assert float(found.auroc) == pytest.approx(float((pairs > 0).float().mean()), abs=1e-3)


def test_intervals_of_differences_cover_the_truth_over_groups():
    """Texts of one group share a shift, which makes an interval over texts too narrow."""
    hits, y = 0, torch.arange(60) % 2 == 0
    group = torch.arange(60) // 2 % 10
    for seed in range(200):
        x = (
            seeded(seed, 60, 1)
            + 0.7 * y[:, None]
            + seeded(1000 + seed, 10, 1)[group] * torch.where(y, 1.0, -1.0)[:, None]
        )
        low, high = difference_interval(x, y, group)[0].tolist()
        hits += low <= 0.7 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_steering_adds_what_changed_latents_write_and_keeps_the_error(model, dictionary, found):
    way, site = found.direction(dictionary), "resid_post.1"
    x = model.capture(TEXTS[0], site)[site]
    f, rows = dictionary.encode(x).dense(), dictionary.decoder[0][site]
    for strength in (-30.0, 30.0):
        want = f.clone()
        moved = f[:, way.index] + strength * way.weight
        want[:, way.index] = torch.maximum(moved, torch.zeros(()))
        assert bool(((moved < 0) & (f[:, way.index] > 0)).any()), "nothing is silenced"
        got = model.capture(TEXTS[0], site, way.add(strength))[site]
        torch.testing.assert_close(got[0], x[0] + (want - f) @ rows, atol=1e-4, rtol=1e-4)
    at = model.capture(TEXTS[0], site, way.add(30.0, positions=[-1]))[site]
    assert torch.equal(at[:, :-1], x[:, :-1])
    assert not torch.equal(at[:, -1], x[:, -1])
    for edits in (way.add(0.0), way.add(0.0, positions=[2])):
        assert torch.equal(model.run(TEXTS[0], edits=edits), model.run(TEXTS[0]))
    torch.testing.assert_close(way.along({site: x})[0], f[:, way.index] @ way.weight / way.weight.square().sum())


def test_latents_that_are_only_amplified_are_a_vector(model, dictionary, found):
    way = found.select(latent=list(range(4))).direction(dictionary)
    plain = model.capture(TEXTS[0], "resid_post.1", way.vector().add(3.0))["resid_post.1"]
    torch.testing.assert_close(model.capture(TEXTS[0], "resid_post.1", way.add(3.0))["resid_post.1"], plain,
                               atol=1e-4, rtol=1e-4)  # fmt: skip


def test_random_latents_are_others_of_like_density_and_norm(model, dictionary, found):
    way, chosen = found.direction(dictionary), set(found.index.tolist())
    drawn = way.random(20, seed=1)
    for own in drawn:
        assert len({*own.index.tolist()} - chosen) == len(chosen)
        assert torch.equal(own.weight, way.weight)
    assert len({tuple(own.index.tolist()) for own in drawn}) == 20
    assert torch.equal(way.random(1, seed=1)[0].index, drawn[0].index)
    big = ca.dictionaries.open(ca.zoo.dictionary(ZOO))
    texts = ca.tasks.read_labelled("world/sentiment", subjects.miniworld())
    many = ca.features.contrast(subjects.miniworld(), big, texts, samples=1)
    rate = (torch.cat(codes(subjects.miniworld(), big, texts.texts)) != 0).float().mean(0)
    for own in many.direction(big).random(3):  # others of any density are 2 log units away
        assert float((rate[own.index].log() - many.density.log()).abs().median()) < 0.4


def test_sentiment_of_a_trained_model_follows_its_latents_and_not_random_ones():
    model, big = subjects.miniworld(), ca.dictionaries.load(ZOO)
    texts = ca.tasks.read_labelled("world/sentiment", model)
    found = ca.features.contrast(model, big, texts, top=32, samples=5)
    assert float(found.auroc_interval[0]) > float(found.auroc_null.max())
    assert float(found.difference[0]) > float(found.null[0].max())
    way, facts = found.direction(big), [p.clean for p in model.world.prompts("fact", 8)]
    got = ca.directions.steer(model, asked(16), way, facts, strengths=(-10.0, 0.0, 10.0), samples=4)
    assert float(got.interval[2, 0]) > float(got.null[2].max())
    assert float(got.interval[0, 1]) < float(got.null[0].min())
    assert float(got.perplexity[2]) < 1.1
    assert not bool(got.null[1].any() | got.loss[:, 1].any())
    said = ca.directions.complete(model, way, reviews(12)[1], strengths=(10.0,), new_tokens=3, samples=1)
    good = {own: sum(any(w in t for w in ("gladly", "positive", "loved", "happy")) for t in said.texts(own))
            for own in ("plain", "10", "random")}  # fmt: skip
    assert good["plain"] <= 1 <= 10 <= good["10"]
    assert good["random"] <= 2


def test_a_saved_contrast_finds_its_dictionary_again_and_no_other(tmp_path, model, dictionary, found):
    path, own = tmp_path / "park.safetensors", tmp_path / "latents.safetensors"
    ca.dictionaries.save(dictionary, own)
    kept = ca.features.contrast(model, ca.dictionaries.open(own), LABELLED, top=4, samples=1)
    one, other = kept.save(path), kept.direction().save(tmp_path / "direction.safetensors")
    for file in (one, other):
        back = ca.directions.open(file)
        assert back.identity() == kept.direction().identity()
        assert torch.equal(model.run(TEXTS[0], edits=back.add(9.0)),
                           model.run(TEXTS[0], edits=kept.direction(dictionary).add(9.0)))  # fmt: skip
        assert str(file) in back.made.python
        with pytest.raises(ca.Refused, match="it holds a latent_direction"):
            ca.patching.intervene(model, subjects.llama_task(1), edits=(f"steer resid_post.1 1 {file}",))
    with pytest.raises(ca.Refused, match="are of the dictionary"):
        ca.directions.open(one, dictionary=ZOO)
    with pytest.raises(ca.Refused, match="does not say where"):
        ca.directions.open(found.direction().save(tmp_path / "by hand.safetensors"))
    assert ca.directions.open(tmp_path / "by hand.safetensors", dictionary=str(own)).name == "park"
    with pytest.raises(ca.Refused, match="have no addresses"):
        ca.directions.open(one, addresses="resid_post.1")
    with pytest.raises(ca.Refused, match="not open"):
        found.direction().add(1.0)


def test_what_cannot_be_contrasted_or_steered_is_refused(model, dictionary, found):
    for change, why in (
        ({"top": 0}, "as many others"),
        ({"top": 11}, "as many others"),
        ({"reading": "first"}, "read so"),
    ):
        with pytest.raises(ca.Refused, match=why):
            ca.features.contrast(model, dictionary, LABELLED, **change)
    same = replace(LABELLED, texts=tuple(t.replace("park", "store") for t in TEXTS))
    with pytest.raises(ca.Refused, match="no latent differs"):
        ca.features.contrast(model, dictionary, same, reading="last", top=4)
    way = found.direction(dictionary)
    with pytest.raises(ca.Refused, match="32 wide"):
        ca.directions.complete(subjects.miniworld(), way, ["Anna"])
    with pytest.raises(ca.Refused, match="it takes Model, Labelled, Direction"):
        ca.directions.monitor(model, LABELLED, way)
    for change in (
        {"weight": torch.zeros(8)},
        {"index": torch.zeros(8, dtype=torch.long)},
        {"matched": way.matched[:, :3]},
    ):
        with pytest.raises(ca.Refused, match=r"undefined|twice|too few"):
            replace(way, **change)
