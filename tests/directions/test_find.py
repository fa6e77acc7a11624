"""Directions that are found: against vectors read one text at a time, formulas by hand, and what a world knows."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import cutaway as ca
from cutaway.directions.finders import FINDERS, Sample, pairs_of
from cutaway.interventions.probes import auroc, auroc_interval, control_labels, folds, word_types
from cutaway.interventions.text_vectors import text_vectors
from cutaway.tasks import Labelled, read_labelled
from tests.conformance.subjects import NAMES, PLACES, family, miniworld, random_llama


def labelled(n=4, groups=True):
    """Sentences of several lengths, half of them about a park; a group is the first name."""
    rows = [(f"{a} and {b} went to the {p}{' with Emma' if a < b else ''}", p == "park", a)
            for a in NAMES[:n] for b in NAMES[:n] if a != b for p in ("park", "store")]  # fmt: skip
    texts, shown, group = zip(*rows, strict=True)
    return Labelled(texts, ("park",), torch.tensor(shown)[:, None], group if groups else ())


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture(scope="module")
def sample():
    g = torch.Generator().manual_seed(3)
    y = torch.arange(24) % 2 == 0
    x = torch.randn(24, 6, generator=g) + y[:, None] * torch.tensor([3.0, -1, 0, 0, 0, 0])
    return Sample(x, y, pairs_of(y, torch.arange(24)), seed=5)


def test_vectors_of_texts_are_those_of_each_text_alone(model):
    texts = labelled().texts
    found = text_vectors(model, texts, ["resid_post", "attn_out.1"], batch=40)
    assert list(map(str, found.addresses)) == ["resid_post.0", "resid_post.1", "attn_out.1"]
    for i, text in enumerate(texts):
        acts = model.capture(text, ["resid_post", "attn_out.1"])
        for j, a in enumerate(map(str, found.addresses)):
            torch.testing.assert_close(found.vectors[0, j, i], acts[a][0, 1:].mean(0), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.vectors[1, j, i], acts[a][0, -1], atol=1e-5, rtol=1e-4)
        assert list(found.tokens[i]) == model.tokens(text).ids[0].tolist()


def test_persona_readings_split_texts_at_their_response(model):
    """`response_mean`, `prompt_mean` and `prompt_last` are those of the tokens of each part, read by hand."""
    data = labelled()
    prompts = tuple(t[: t.index(" went")] for t in data.texts)
    data = Labelled(data.texts, data.concepts, data.shown, data.groups, prompts)
    readings = ("response_mean", "prompt_mean", "prompt_last", "last")
    found = text_vectors(model, data.texts, "resid_post", readings, batch=40, prompts=prompts).vectors
    for i, (text, prompt) in enumerate(zip(data.texts, prompts, strict=True)):
        n, x = model.tokens(prompt).ids.shape[1], model.capture(text, "resid_post.1")["resid_post.1"][0]
        for j, own in enumerate((x[n:].mean(0), x[1:n].mean(0), x[n - 1], x[-1])):
            torch.testing.assert_close(found[j, 1, i], own, atol=1e-5, rtol=1e-4)
    persona = ca.directions.find(model, data, finders=("mean_difference",), readings=readings, samples=1)
    y = data.shown[:, 0]
    torch.testing.assert_close(persona.vector[0], found[:, :, y].mean(2) - found[:, :, ~y].mean(2))
    with pytest.raises(ca.Refused, match="not given as prompt and response"):
        ca.directions.find(model, labelled(), readings=("response_mean",))
    for prompt, why in ((" ", "is not the prompt"), (data.texts[0], "is not the prompt"), ("Peter", "is not the")):
        with pytest.raises(ca.Refused, match=why):
            Labelled(data.texts[:1], data.concepts, data.shown[:1], (), (prompt,))
    with pytest.raises(ca.Refused, match="has no token of its own"):
        text_vectors(model, data.texts[:1], "resid_post", readings, prompts=("M",))


def test_a_found_direction_is_the_difference_of_means_and_its_auroc_counts_pairs(model):
    data = labelled()
    found = ca.directions.find(model, data, finders=("mean_difference", "contrastive_pairs"), samples=2)
    x = text_vectors(model, data.texts, "resid_post").vectors
    y, group = data.shown[:, 0], data.group_of
    difference = x[:, :, y].mean(2) - x[:, :, ~y].mean(2)
    torch.testing.assert_close(found.vector[0], difference, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.vector[1], found.vector[0], atol=1e-5, rtol=1e-4)  # every text has its twin
    torch.testing.assert_close(found.cosine, torch.ones(2, 2, 2))
    scores = torch.zeros(len(y))
    for fit, test in folds(y, group):
        assert not set(group[fit].tolist()) & set(group[test].tolist())
        own = x[1, 0][fit]
        v = own[y[fit]].mean(0) - own[~y[fit]].mean(0)
        seen = own @ v / v.norm()
        scores[test] = (x[1, 0][test] @ v / v.norm() - seen.mean()) / seen.std()
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[y].tolist() for b in scores[~y].tolist()]
    assert float(found.auroc[0, 1, 0]) == pytest.approx(np.mean(pairs), abs=1e-6)
    one = found.direction("mean_difference", "last", "resid_post.1")
    unit = one.vector[0] / one.norm[0]
    middle = x[1, 1] @ unit
    assert float(one.midpoint[0]) == pytest.approx(float(middle[y].mean() + middle[~y].mean()) / 2, abs=1e-4)
    assert (one.name, one.positive, one.family) == ("park", "park", "llama")
    assert one.record["finder"] == "mean_difference"


def test_a_direction_is_opened_from_what_was_found(tmp_path, model):
    found = ca.directions.find(model, labelled(), finders=("mean_difference", "ridge"), samples=1)
    path = found.save(tmp_path / "found.safetensors")
    opened = ca.directions.open(path, "ridge", "last", "resid_post.1")
    assert torch.equal(opened.vector[0], found.vector[1, 1, 1])
    assert ca.directions.open(path).labels["address"] == ["resid_post.0", "resid_post.1"]
    with pytest.raises(ca.Refused, match="no such entry"):
        ca.directions.open(path, "logistic")
    alone = opened.save(tmp_path / "one.safetensors")
    with pytest.raises(ca.Refused, match="holds one direction"):
        ca.directions.open(alone, "ridge")


def test_every_finder_points_where_the_classes_are_apart(sample):
    for name, finder in FINDERS.items():
        v = finder.find(sample)
        assert float(v @ sample.difference) >= 0, name
        gap = float(torch.nn.functional.normalize(v, dim=0) @ sample.difference)
        assert float(v.norm()) == pytest.approx(gap, rel=1e-4), name
        cosine = float(torch.cosine_similarity(v, torch.tensor([3.0, -1, 0, 0, 0, 0]), dim=0))
        assert (cosine > 0.75) == (name != "pca_centred_pairs"), (name, cosine)


def test_finders_are_what_their_papers_say(sample):
    x, y, pairs = sample.x.double(), sample.y, sample.pairs
    differences = (x[pairs[:, 0]] - x[pairs[:, 1]]).numpy()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    drawn = (x[order[:12]] - x[order[12:]]).numpy()
    signed = np.concatenate([differences, -differences])
    wanted = {
        "pca_centred_pairs": PCA(1).fit(differences).components_[0],
        "pca_pairs": PCA(1).fit(signed).components_[0],
        "reading_vector": PCA(1).fit(drawn).components_[0],
        "contrastive_pairs": differences.mean(0),
        "ridge": np.linalg.solve(
            (c := x - x.mean(0)).T @ c + (a := float(x.var(0).sum()) * 24 / 6) * torch.eye(6), c.T @ (y.double() - 0.5)
        ),
    }
    assert a > 0
    for name, line in wanted.items():
        cosine = torch.cosine_similarity(FINDERS[name].find(sample).double(), torch.as_tensor(line), dim=0)
        assert abs(float(cosine)) == pytest.approx(1.0, abs=1e-5), name


def test_places_without_a_difference_and_centred_pairs_are_told_by_name(model):
    found = ca.directions.find(model, labelled(), sites=("embed", "resid_post.1"), readings=("last",), samples=1)
    assert found.record["notes"][0].startswith("pca_centred_pairs: PCA on centred differences")
    tails = Labelled(tuple(f"{t}, Tom gave" for t in labelled().texts), ("park",), labelled().shown, labelled().groups)
    same = ca.directions.find(model, tails, sites=("embed", "resid_post.1"), finders=("mean_difference",), samples=1)
    assert any("zero difference: the two classes are the same at embed (last)" in n for n in same.record["notes"])
    assert same.auroc[0, 1, 0].isnan()
    assert bool(same.auroc[0, 1, 1].isfinite())
    assert same.direction("mean_difference", "last").labels["address"] == ["resid_post.1"]
    with pytest.raises(ca.Refused, match="it is zero"):
        same.direction("mean_difference", "last", "embed")


@pytest.mark.parametrize(
    ("change", "options", "why"),
    [
        (lambda d: Labelled(d.texts, d.concepts, torch.ones_like(d.shown), d.groups), {}, "every text shows"),
        (lambda d: Labelled(d.texts, d.concepts, torch.zeros_like(d.shown), d.groups), {}, "no text shows"),
        (lambda d: Labelled(d.texts, d.concepts, d.shown, ("one",) * len(d.texts)), {}, "of one group"),
        (lambda d: Labelled(("", *d.texts[1:]), d.concepts, d.shown, d.groups), {}, "text 0 is empty"),
        (lambda d: d, {"finders": ("best",)}, "no direction is found so"),
        (lambda d: d, {"readings": ("first",)}, "no text is read so"),
        (lambda d: d, {"concept": "store"}, "labelled with park"),
        (lambda d: d, {"sites": ("pattern",)}, "not \\[batch, position, width\\]"),
        (lambda d: d, {"sites": ("resid_post.0", "mlp_post.0")}, "different widths"),
        (lambda d: d, {"sites": ("resid",)}, "no site"),
    ],
)
def test_what_has_no_direction_is_refused(model, change, options, why):
    with pytest.raises(ca.Refused, match=why):
        ca.directions.find(model, change(labelled()), samples=1, **options)


@pytest.mark.parametrize("name", ["sentiment", "country", "refusal", "parity"])
def test_a_world_has_directions_that_beat_shuffled_labels(name):
    model = miniworld()
    data = read_labelled(f"world/{name}", model)
    assert len(set(data.groups)) >= 4
    found = ca.directions.find(model, data, sites=("resid_post.5",), readings=("last",), finders=("logistic",))
    assert float(found.auroc) > 0.9
    assert float(found.interval[..., 0]) > float(found.null.max()) > 0


def test_intervals_over_groups_cover_what_they_should():
    g = torch.Generator().manual_seed(0)
    y, group = torch.arange(60) % 2 == 0, torch.arange(60) // 6
    inside = 0
    for _ in range(200):
        shift = torch.randn(10, generator=g).repeat_interleave(6)
        scores = torch.randn(60, generator=g) + 0.6 * shift + y * 1.0
        low, high = auroc_interval(scores, y, group).tolist()
        inside += low <= 0.745 <= high  # the mean of many draws
    assert 0.88 <= inside / 200 <= 1.0
    tied = torch.zeros(60)
    assert float(auroc(tied, y)) == 0.5


def test_control_labels_go_by_the_rarest_token_that_other_groups_share():
    tokens = [(1, 5, 9), (1, 6, 9), (1, 5, 8), (1, 6, 7)]
    types = word_types(tokens, torch.tensor([0, 0, 1, 1]))
    assert types.tolist() == [5, 6, 5, 6]
    drawn = control_labels(types, 0.5, 8, torch.Generator().manual_seed(0))
    assert torch.equal(drawn[:, 0], drawn[:, 2])
    assert bool((drawn[:, 0] != drawn[:, 1]).all())


def test_activation_addition_is_the_difference_at_each_position(model):
    one, other = "Mary went", "John and Tom went"
    found = ca.directions.activation_addition(model, one, other, "resid_post.0")
    ids = [model.tokens(t).ids[0].tolist() for t in (one, other)]
    ids[0] += [model.tokenizer.encode(" ", add_special_tokens=False)[0]] * (len(ids[1]) - len(ids[0]))
    a, b = (model.capture(torch.tensor([row]), "resid_post.0")["resid_post.0"][0] for row in ids)
    assert found.labels["address"] == [f"resid_post.0@{p}" for p in range(1, len(ids[1]))]
    torch.testing.assert_close(found.vector, (a - b)[1:], atol=1e-5, rtol=1e-4)
    before, after = (model.capture(other, "resid_post.0", e)["resid_post.0"] for e in ((), found.add(2.0)))
    torch.testing.assert_close(after[0, 1:], before[0, 1:] + 2 * found.vector, atol=1e-4, rtol=1e-4)
    with pytest.raises(ca.Refused, match="do not differ"):
        ca.directions.activation_addition(model, one, one, "resid_post.0")
    with pytest.raises(ca.Refused, match="no token of this model is a space"):
        ca.directions.activation_addition(family("llama"), "w3 w4", "w5 w6 w7", "resid_post.0")


def test_the_causal_difference_moves_no_concept_that_is_orthogonal_to_it():
    model = miniworld()
    words = ca.tasks.concepts("capital,language")
    found = ca.directions.causal_difference(model, words, "capital")
    assert found.labels["address"] == ["resid_post.5"]
    ids = torch.tensor(words.ids(model)["capital"])
    rows = model.weights.unembed.T[ids].float()
    effect = (rows[:, 1] - rows[:, 0]) @ found.vector[0]
    assert bool((effect.mean() > 0).all())
    other = ca.interventions.causal_product.CausalProduct.of(model)
    mean = (rows[:, 1] - rows[:, 0]).mean(0)
    torch.testing.assert_close(
        found.vector[0].double(), torch.nn.functional.normalize(other.steering(mean), dim=0), atol=1e-5, rtol=1e-3
    )
    with pytest.raises(ca.Refused, match="three pairs"):
        ca.directions.causal_difference(model, words, "plural")


def test_pairs_lie_within_groups():
    y = torch.tensor([True, False, False, True, True])
    assert pairs_of(y, torch.tensor([0, 0, 0, 1, 1])).tolist() == [[0, 1]]
    assert pairs_of(y, torch.arange(5)).tolist() == [[0, 1], [3, 2]]


def test_labels_of_files_may_have_groups(tmp_path, model):
    path = tmp_path / "l.jsonl"
    line = '{{"text": "{0} went", "label": "{1}"{2}}}\n'
    path.write_text(
        "".join(line.format(PLACES[i % 6], "ab"[i % 2], f', "group": {i // 6}') for i in range(30)), "utf-8"
    )
    found = read_labelled(path, model)
    assert found.group_of.tolist() == [i // 6 for i in range(30)]
    assert found.identity()["groups"] == 5
    with path.open("a", encoding="utf-8") as f:
        f.write(line.format("river", "a", ""))
    with pytest.raises(ca.Refused, match="30 of 31 lines have a group"):
        read_labelled(path, model)
