"""Absorption where it is planted, probing where the answer is known, and the first-letter task."""

from dataclasses import replace

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.dictionaries import SparseCode, autoencoder
from cutaway.dictionaries.benchmarks import absorption
from cutaway.dictionaries.evaluation.absorption import absorbed, own_latents, planted_absorption
from cutaway.dictionaries.evaluation.controls import random_dictionary
from cutaway.dictionaries.evaluation.evidence import EncodedEvidence, Evidence, encode_evidence
from cutaway.dictionaries.evaluation.letters import letter_evidence, letter_scores
from cutaway.dictionaries.evaluation.probing import pooled, probing_of
from cutaway.dictionaries.gates import TopK
from cutaway.interventions.probes import choose
from tests.dictionaries.evaluation import made


def seen_code(d, x: torch.Tensor, f: torch.Tensor, **given) -> EncodedEvidence:
    return EncodedEvidence(d, Evidence({made.SITE: x}, **given), SparseCode.from_dense(f), {made.SITE: x})


def plain(rows: torch.Tensor):
    zero = torch.zeros(len(rows))
    return autoencoder(made.SITE, rows, rows, zero, torch.zeros(rows.shape[1]), TopK(1))


def slowly(f, rows, x, w, own):
    """The definition, token by token (SAEBench's, with decoder rows of any length)."""
    w = w / w.norm()
    full, fraction = [], []
    for t in range(len(x)):
        put = [float(f[t, i] * (rows[i] @ w)) for i in range(len(rows))]
        cosine = [float(rows[i] @ w / rows[i].norm()) for i in range(len(rows))]
        reading = float(x[t] @ w)
        top = max(range(len(rows)), key=lambda i: put[i] if f[t, i] != 0 else float("-inf"))
        silent = all(f[t, i] == 0 for i in own)
        full.append(silent and reading > 0 and cosine[top] >= 0.025 and put[top] / reading >= 0.4)
        mine = sum(put[i] for i in own)
        rest = sorted(
            (put[i] for i in range(len(rows)) if i not in own and cosine[i] >= 0.1 and put[i] > 0), reverse=True
        )
        others = sum(rest[:3])
        if reading <= 0 or mine >= reading or others / reading < 0.4:
            fraction.append(0.0)
        elif mine <= 0:
            fraction.append(1.0)
        else:
            taken = min(others, reading - mine)
            fraction.append(min(1.0, max(0.0, taken / (taken + mine))))
    return full, fraction


@pytest.mark.parametrize("seed", range(3))
def test_absorption_is_what_its_definition_says(seed):
    g = generator(seed)
    rows = torch.randn(9, 4, generator=g) * torch.rand(9, 1, generator=g) * 2
    f = torch.rand(120, 9, generator=g) * (torch.rand(120, 9, generator=g) < 0.35)
    f[:, 8] *= -1  # a signed code
    f[f.abs().sum(1) == 0, 0] = 1.0
    x = f @ rows + 0.3 * torch.randn(120, 4, generator=g)
    w = torch.randn(4, generator=g)
    own = torch.tensor([1, 4])
    got = absorbed(SparseCode.from_dense(f), rows, x, w, own)
    full, fraction = slowly(f, rows, x, w, own.tolist())
    assert got.full.tolist() == full
    assert got.fraction.tolist() == pytest.approx(fraction, abs=1e-5)
    assert seed or 0 < sum(fraction) < 120


def test_the_latents_of_a_concept_are_found():
    g = generator(0)
    f = (torch.rand(1200, 40, generator=g) < 0.1).float()
    shows = torch.rand(1200, generator=g) < 0.3
    half = torch.rand(1200, generator=g) < 0.5
    f[:, 7] = shows & half
    f[:, 21] = shows & ~half
    assert set(own_latents(SparseCode.from_dense(f), shows).tolist()) == {7, 21}
    f[:, 7], f[:, 21] = shows.float(), 0
    assert own_latents(SparseCode.from_dense(f), shows).tolist() == [7]


def test_planted_absorption_is_found_and_its_absence_too():
    """The toy of the paper: a dictionary with (parent + child) absorbs on all tokens of the child."""
    truth = absorption(parent=0.3, child=0.1, seed=1)
    e = Evidence.gather(truth.batches(1000), 6000)
    assert e.truth is not None
    f, w = e.truth.dense(), truth.directions
    faithful = seen_code(plain(w), e.of("x"), f, truth=e.truth)
    both = f.clone()
    both[f[:, 1] > 0, 0] = 0  # the child's latent carries the parent, the parent's latent is silent
    absorbing = seen_code(plain(torch.stack([w[0], w[0] + w[1], w[2], w[3]])), e.of("x"), both, truth=e.truth)
    good, bad = (planted_absorption(s, w, truth.law) for s in (faithful, absorbing))
    assert good["full absorption"].value == 0
    assert good["absorption fraction"].value == 0
    child = float((f[:, 1] > 0).sum() / (f[:, 0] > 0).sum())
    assert bad["full absorption"].value == pytest.approx(child)
    assert bad["absorption fraction"].value == pytest.approx(child)
    assert (good["own latents"].value, bad["own latents"].value) == (1, 2)
    assert good.labels["control"] == ["features without children"]
    assert good.control.tolist()[:2] == [[0], [0]]
    random = encode_evidence(random_dictionary(plain(w), e, 1.0), e)
    assert planted_absorption(faithful, w, truth.law, null=[random]).null.shape == (3, 1)
    with pytest.raises(Refused, match="no true code"):
        planted_absorption(replace(faithful, evidence=Evidence({"x": e.of("x")})), w, truth.law)
    few = Evidence.gather(truth.batches(60), 60)
    with pytest.raises(Refused, match="fires"):
        planted_absorption(encode_evidence(plain(w), few), w, truth.law)


def spelled():
    """Words whose activation is their letter's direction and one of their own; four of z are absorbed."""
    g = generator(3)
    words = [f"{letter}{a}{b}" for letter in "smtz" for a in "aeiou" for b in "bcdfghjklmnpqrstvwxy"]
    letters = torch.tensor(["smtz".index(w[0]) for w in words])
    eye = torch.eye(8)
    x = 4 * eye[letters] + 0.3 * torch.randn(len(words), 8, generator=g)
    f = torch.zeros(len(words), 6)
    f[torch.arange(len(words)), letters] = 4.0
    absorbing = torch.tensor([w[:3] in ("zab", "zac", "zeb", "zef") for w in words])
    f[absorbing, 3] = 0
    f[absorbing, 5] = 4.0
    rows = torch.stack([*eye[:4], eye[4], 0.9 * eye[3] + 0.4 * eye[5]])
    return words, x, f, rows


def test_letters_that_are_absorbed_are_found():
    words, x, f, rows = spelled()
    s = seen_code(plain(rows), x, f)
    null = encode_evidence(random_dictionary(plain(rows), s.evidence, 1.0, seed=2), s.evidence)
    got = letter_scores(s, words, null=[null], seed=1)
    told = got.record["letters"]
    assert set(told) == {"s", "m", "t", "z"}
    assert all(v["probe F1"] > 0.9 for v in told.values())
    assert [told[k]["full"] for k in "smt"] == [0, 0, 0]
    assert 0 < told["z"]["full"] < 0.15
    assert got["full absorption"].value == pytest.approx(told["z"]["full"] / 4)
    assert got.null.shape == (3, 1)
    noise = seen_code(plain(rows), torch.randn(x.shape, generator=generator(0)), f)
    with pytest.raises(Refused, match="F1"):
        letter_scores(noise, words)
    with pytest.raises(Refused):
        letter_scores(s, words[:5])


def test_words_are_read_at_their_last_token():
    from tests.conformance.subjects import NAMES, PLACES, THINGS, random_llama

    model = random_llama()
    words = [*NAMES, *PLACES, *THINGS, "Mary", "x1", "ba", "Annapark"]
    e, kept = letter_evidence(model, "resid_post.0", words, template=" {word} is", examples=2, batch=5, seed=4)
    assert kept == [*NAMES, *PLACES, *THINGS, "ba", "Annapark"]
    assert len(e) == 22
    again, _ = letter_evidence(model, "resid_post.0", words, template=" {word} is", examples=2, batch=22, seed=4)
    assert torch.allclose(e.of("resid_post.0"), again.of("resid_post.0"), atol=1e-5)
    alone, _ = letter_evidence(model, "embed", words, template=" {word} is", examples=1)
    mary = model.capture(" Mary", "embed")["embed"][0, -1]
    assert torch.allclose(alone.of("embed")[0], mary, atol=1e-6)
    for wrong in (["ab"] * 30, ["a b"] * 30):
        with pytest.raises(Refused):
            letter_evidence(model, "embed", wrong)
    with pytest.raises(Refused, match="the template"):
        letter_evidence(model, "embed", words, template="what")


def texts(seed: int = 0):
    """Texts of five tokens; concept 0 is latent 2, concept 1 is a direction that no latent has."""
    g = generator(seed)
    labels = torch.rand(160, 2, generator=g) < 0.5
    f = torch.rand(800, 12, generator=g) * (torch.rand(800, 12, generator=g) < 0.3)
    groups = torch.arange(800) // 5
    f[:, 2] = labels[groups, 0].float() * (1 + torch.rand(800, generator=g))
    x = torch.randn(800, 6, generator=g) * 2
    x[:, 1] += 1.5 * (2 * labels[groups, 1].float() - 1)
    x[:, 3] += 1.5 * (2 * labels[groups, 0].float() - 1)
    return seen_code(plain(torch.eye(12)[:, :6]), x, f, sequence=groups), labels


def test_probing_reads_what_is_there_and_stands_beside_a_linear_probe():
    s, labels = texts()
    got = probing_of(s, labels, random=[s], ks=(1, 3), samples=3)
    assert got.labels["method"] == ["latents", "neurons", "pca", "random 0", "linear probe", "frequent class"]
    latents, linear, frequent = (got.labels["method"].index(n) for n in ("latents", "linear probe", "frequent class"))
    assert got.each[latents, 0, 0] == 1.0
    assert got.each[latents, 0, 1] < 0.75
    assert got.each[linear, 0].min() > 0.8
    assert torch.equal(got.accuracy[linear, 0], got.accuracy[linear, 1])
    assert abs(float(got.null[latents, 0].mean()) - 0.5) < 0.2
    assert 0.3 < float(got.accuracy[frequent, 0]) < 0.7
    assert (got.interval[..., 0] <= got.accuracy + 1e-6).all()
    assert got.record["texts"] == {"train": 120, "test": 40}


def test_pooling_and_choosing_by_brute_force():
    g = generator(1)
    f = torch.rand(30, 5, generator=g) * (torch.rand(30, 5, generator=g) < 0.5)
    groups = torch.arange(30) // 7
    want = torch.stack([f[groups == i].mean(0) for i in range(5)])
    assert torch.allclose(pooled(SparseCode.from_dense(f), groups), want, atol=1e-6)
    y = torch.tensor([True, False, True, False, False])
    gap = (want[y].mean(0) - want[~y].mean(0)).abs()
    assert choose(want, y, 2).tolist() == gap.argsort(descending=True)[:2].tolist()


def test_probing_refusals():
    s, labels = texts()
    for wrong in (labels[:50], torch.ones(160, 1).bool()):
        with pytest.raises(Refused):
            probing_of(s, wrong)
    with pytest.raises(Refused, match="no sequences"):
        probing_of(replace(s, evidence=Evidence({made.SITE: torch.zeros(800, 6)})), labels)
