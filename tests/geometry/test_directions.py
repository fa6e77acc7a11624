"""Concept directions, dimensionality and similarity against plain computations and planted truths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import cutaway as ca
from cutaway.core.files import write_tensors
from cutaway.core.refuse import Refused
from cutaway.core.stats import rotation
from cutaway.core.subject import SUBJECTS
from cutaway.geometry import concepts, dimensionality, of_vocabulary, read_directions, similarity
from cutaway.geometry.similarity import _last_tokens, cka
from cutaway.geometry.toys import pentagon
from cutaway.interventions.causal_product import CausalProduct
from cutaway.tasks.concepts import Concepts
from cutaway.tasks.concepts import concepts as named
from tests.conformance.subjects import corpus, miniworld, random_llama

PAIRS = (("Mary", "John"), ("Anna", "Peter"), ("Tom", "Lucy"), ("Paul", "Emma"))
OTHER = (("store", "park"), ("school", "river"), ("market", "garden"))


def planted(strength: float):
    """A model in whose unembedding the pairs of one concept differ by one vector, and what that vector is."""
    model, g = random_llama(), torch.Generator().manual_seed(1)
    rows = model.hf.lm_head.weight.data
    rows.copy_(torch.randn(rows.shape, generator=g) @ torch.randn(32, 32, generator=g))  # nothing like white
    step = torch.randn(32, generator=g)
    for a, b in PAIRS:
        rows[model.text.token_id(b)] = rows[model.text.token_id(a)] + strength * step
    return model, step


def test_concepts_have_names_and_those_of_a_world_need_its_model():
    assert ("hot", "cold") in named("antonym").pairs[0]
    assert named("spanish,plural").names == ("spanish", "plural")
    found = named("world", miniworld())
    assert ("Norway", "Oslo") in found.pairs[found.names.index("capital")]
    assert found.made is not None
    assert eval(found.made.python, {"ca": ca, "model": miniworld()}) == found


def test_a_planted_concept_has_one_direction_and_others_have_none():
    model, step = planted(2.0)
    found = concepts(model, Concepts(("planted", "other"), (PAIRS, OTHER)), samples=8)
    assert float(found.alignment[0]) == pytest.approx(1.0, abs=1e-4)
    assert float(found.interval[0, 0]) > float(found.null[0].max())
    assert float(found.null.abs().max()) < 0.6
    assert abs(float(found.alignment[1])) < 0.6
    cos = torch.cosine_similarity(found.direction[0], step, dim=0)
    assert float(cos) == pytest.approx(1.0, abs=1e-5)


def test_with_whitened_rows_both_products_agree():
    model = random_llama()
    white = CausalProduct.of(model).whiten(model.weights.unembed.detach().T).float()
    with torch.no_grad():
        model.hf.lm_head.weight.copy_(white)
    found = concepts(model, Concepts(("one", "other"), (PAIRS, OTHER)), samples=2)
    torch.testing.assert_close(found.cosine, found.plain_cosine, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.alignment, found.plain_alignment, rtol=0, atol=1e-4)


def test_cosines_are_those_of_a_plain_computation():
    model, _ = planted(0.3)
    found = concepts(model, Concepts(("planted", "other"), (PAIRS, OTHER)), samples=2)
    w = model.weights.unembed.T.double().detach().numpy()
    inverse = np.linalg.inv(np.cov(w.T, bias=True))
    means, leave_out = [], []
    for pairs in (PAIRS, OTHER):
        x = np.stack([w[model.text.token_id(b)] - w[model.text.token_id(a)] for a, b in pairs])
        rest = [(np.delete(x, i, 0).mean(0), x[i]) for i in range(len(x))]
        leave_out.append(np.mean([r @ inverse @ y / math.sqrt((r @ inverse @ r) * (y @ inverse @ y)) for r, y in rest]))
        means.append(x.mean(0))
    a, b = means
    cosine = a @ inverse @ b / math.sqrt((a @ inverse @ a) * (b @ inverse @ b))
    assert found.alignment.tolist() == pytest.approx(leave_out, abs=1e-5)
    assert float(found.cosine[0, 1]) == pytest.approx(cosine, abs=1e-5)
    assert float(found.plain_cosine[0, 1]) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
    product = CausalProduct.of(model)
    raised = product.steering(torch.from_numpy(a))
    assert float(raised @ torch.from_numpy(b)) == pytest.approx(a @ inverse @ b, rel=1e-6)


def test_words_of_several_tokens_are_left_out_and_small_vocabularies_refused():
    model = random_llama()
    mixed = Concepts(("kept", "gone"), ((*PAIRS, ("incomprehensible", "store")), (("xylophone", "quagmire"),)))
    found = concepts(model, mixed, samples=2)
    assert found.labels["concept"] == ["kept"]
    assert found.record["pairs"] == {"kept": 4}
    assert list(found.record["left out"]) == ["gone"]
    with pytest.raises(Refused, match="single tokens"):
        concepts(model, Concepts(("gone",), ((("xylophone", "quagmire"),),)))
    with pytest.raises(Refused, match="no concept"):
        named("plurall")


def test_dimensionality_of_known_sets_of_directions():
    found = dimensionality(torch.eye(6) @ rotation(6, torch.Generator().manual_seed(0)), samples=2)
    assert found.dimensionality.tolist() == pytest.approx([1.0] * 6, abs=1e-5)
    assert float(found.total) == pytest.approx(6.0, abs=1e-4)
    assert float(found.nearest.max()) < 1e-5
    assert found.welch == 0.0
    found = dimensionality(pentagon(torch.Generator().manual_seed(0)), samples=2)
    assert found.dimensionality.tolist() == pytest.approx([0.4] * 5, abs=1e-5)
    assert found.nearest.tolist() == pytest.approx([math.cos(math.pi / 5)] * 5, abs=1e-5)
    assert found.spread.tolist() == pytest.approx([found.welch] * 5, abs=1e-5)  # a tight frame meets the bound
    assert found.welch == pytest.approx(math.sqrt(3 / 8))


@pytest.mark.parametrize(("n", "d"), [(64, 48), (256, 128), (1024, 256)])
def test_the_bounds_hold_every_set_and_are_reached_by_random_ones(n, d):
    found = dimensionality(torch.randn(n, d, generator=torch.Generator().manual_seed(n)), samples=4)
    assert found.johnson_lindenstrauss == pytest.approx(math.sqrt(4 * math.log(n) / d))
    assert float(found.nearest.max()) < found.johnson_lindenstrauss, "random sets do, and so some set does"
    assert float(found.null.max()) < found.johnson_lindenstrauss
    assert float(found.nearest.max()) > 0.6 * found.johnson_lindenstrauss, "chance comes near to it"
    assert float(found.spread.square().mean().sqrt()) > found.welch, "no set lies below"
    assert float(found.spread.mean()) == pytest.approx(1 / math.sqrt(d), rel=0.05)
    crowded = torch.nn.functional.normalize(1 + torch.randn(n, d, generator=torch.Generator().manual_seed(d)), dim=1)
    assert float(dimensionality(crowded, samples=2).mean_nearest) > found.johnson_lindenstrauss, "it can be left"


def test_dimensionality_of_some_of_many_is_that_of_plain_loops():
    rows = torch.randn(40, 7, generator=torch.Generator().manual_seed(2))
    rows[11] = 0
    found = dimensionality(rows, most=5, samples=2)
    w = np.delete(rows.double().numpy(), 11, 0)
    unit = w / np.linalg.norm(w, axis=1, keepdims=True)
    chosen = [int(n) if int(n) < 11 else int(n) - 1 for n in found.labels["direction"]]
    assert chosen == [0, 10, 19, 28, 38]
    for k, i in enumerate(chosen):
        others = [j for j in range(39) if j != i]
        cos = np.array([unit[i] @ unit[j] for j in others])
        own = (w[i] @ w[i]) / sum((unit[i] @ row) ** 2 for row in w)
        assert float(found.nearest[k]) == pytest.approx(np.abs(cos).max(), abs=1e-5)
        assert float(found.spread[k]) == pytest.approx(math.sqrt((cos**2).mean()), abs=1e-5)
        assert float(found.dimensionality[k]) == pytest.approx(own, abs=1e-5)
    assert (found.directions, found.width, found.record["zero rows"]) == (39, 7, 1)
    away = dimensionality(rows + 100, most=5, samples=2)
    assert float(away.spread.min()) > 0.9
    alike, moved = (dimensionality(r, centred=True, most=5, samples=2) for r in (rows[:11], rows[:11] + 100))
    assert torch.allclose(alike.spread, moved.spread, atol=1e-3)
    with pytest.raises(Refused, match="two or more"):
        dimensionality(torch.eye(3)[:1])


def test_cka_is_that_of_a_plain_computation_and_without_bias():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 50, generator=g).double(), torch.randn(30, 50, generator=g).double()
    k, m = ((a @ a.T) - (a @ a.T).diagonal().diag() for a in (x, y))

    def dependence(k, m):  # over all distinct indices, as Song et al. define it
        n, ones = len(k), torch.ones(len(k)).double()
        a, b = torch.trace(k @ m), (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return (a + b - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))

    wanted = dependence(k, m) / (dependence(k, k) * dependence(m, m)).sqrt()
    assert float(cka(k, m)) == pytest.approx(float(wanted), abs=1e-10)
    assert abs(float(wanted)) < 0.2  # plain CKA of 30 rows in 50 dimensions is above 0.5


def rotated_twin():
    """A model and the same in a basis that was turned, norms taken out, so that nothing but the basis differs."""
    one, two = random_llama(), random_llama()
    q = rotation(32, torch.Generator().manual_seed(5))
    with torch.no_grad():
        for hf in (one.hf, two.hf):
            for name, p in hf.named_parameters():
                if "norm" in name:
                    p.fill_(1.0)
        for name, p in two.hf.named_parameters():
            if "embed_tokens" in name or "lm_head" in name or any(s in name for s in ("q_", "k_", "v_", "gate", "up")):
                p.copy_(p @ q)
            elif "o_proj" in name or "down" in name:
                p.copy_(q.T @ p)
    return one, two


def test_a_turned_twin_has_the_same_space_and_other_units():
    one, two = rotated_twin()
    texts = corpus()[:24]
    assert torch.allclose(one.run_last(texts[:2]), two.run_last(texts[:2]), atol=1e-3)
    same, turned = (similarity(one, other, texts, samples=2) for other in (one, two))
    for found in (same, turned):
        assert found.cka.diagonal().tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
        assert found.svcca.diagonal().tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
        assert float(found.null.abs().max()) < 0.3
    assert same.matched.diagonal().tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    assert float(turned.matched.diagonal().max()) < 0.9
    assert float((turned.matched - turned.rotated_null.mean(-1)).abs().max()) < 0.1  # no more than in any other basis
    with pytest.raises(Refused, match="64 such words"):
        similarity(one, two, texts[:4])


def test_rows_are_the_last_tokens_of_the_same_words():
    model, texts = random_llama(), ["Then Mary gave xylophones to John .", "Anna went"]
    tokens = model.tokens(texts)
    for i, ends in enumerate(_last_tokens(tokens, texts)):
        words = texts[i].split()
        assert len(ends) == len(words)
        for (end, column), word in zip(sorted(ends.items()), words, strict=True):
            upto = model.text.tokenizer.decode(tokens.ids[i, 1 : column + 1])
            assert upto == texts[i][:end]
            assert upto.endswith(word)


def test_directions_are_read_from_models_and_files(tmp_path):
    model, rows = random_llama(), torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(of_vocabulary(model).rows, model.weights.unembed.T)
    assert torch.equal(of_vocabulary(model, "embed").rows, model.weights.embed)
    write_tensors(tmp_path / "a.safetensors", {"W_dec": rows, "b": rows[0], "W_enc": rows.T}, {})
    assert torch.equal(read_directions(tmp_path / "a.safetensors", "W_dec").rows, rows)
    opened = SUBJECTS["directions"].open
    for flags in (("a.safetensors", None), ("nowhere", None), ("embed", "W_dec")):
        where = str(tmp_path / flags[0]) if flags[0].endswith("s") else flags[0]
        with pytest.raises(Refused):
            opened({"directions": where, "directions_tensor": flags[1]}, {"model": model})
