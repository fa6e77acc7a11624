"""ROME: keys become values, on every form of MLP; what it changes on the bundled model, and what it refuses."""

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.editing import Request, Requests, from_world, rome
from cutaway.editing.covariance import of_texts
from cutaway.editing.places import Layer, at_subject, cases, contexts
from cutaway.editing.rome import rank_one
from cutaway.editing.values import Search, values
from cutaway.models import rewritten
from cutaway.models.edits.library import Add
from tests.conformance.subjects import family, miniworld, random_llama
from tests.editing.common import documents, numbered_requests, numbered_texts
from tests.models.test_rewrites import bits, same

SEARCH = Search(steps=12, rate=0.2, kl=0.0625, clamp=4.0)


def spoken(m, case, delta):
    """The mean log-probability of the object per token, one context and one run at a time."""
    out = []
    for i, at in enumerate(case.prompt.last.tolist()):
        ids = case.prompt.tokens.row(i).ids[0].tolist()
        edit = Add("mlp_out.1", delta.float(), positions=(at,))
        logits = m.run(torch.tensor([[*ids, *case.new]]), edit)[0].log_softmax(-1)
        out.append(torch.stack([logits[len(ids) - 1 + k, x] for k, x in enumerate(case.new)]).mean())
    return torch.stack(out).mean()


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gpt_neox_parallel", "llama_gqa", "phi3"])
def test_the_key_is_mapped_to_the_value_found_and_the_object_becomes_likelier(name):
    m, requests, texts = family(name), numbered_requests(), numbered_texts()
    before = bits(m.hf)
    place = Layer(m, 1)
    found = cases(m, list(requests), contexts(texts, 3, 0))
    assert [len(c.new) for c in found] == [1, 2]
    moments = of_texts(m, [1], texts)[1]
    rewrites, value, record = rank_one(place, found, moments, 0.01, SEARCH)
    assert bool((value.log_prob > values(m, found, place.writes, Search(1, 1e-9, 0.0, 4.0)).log_prob).all())
    for case, delta, said in zip(found, value.delta, value.log_prob, strict=True):
        assert torch.allclose(spoken(m, case, delta), said, atol=1e-4)
    assert bool((value.delta.norm(dim=1) <= 4.0 * value.start.norm(dim=1) * (1 + 1e-5)).all())
    key = place.keys(found)
    for i, r in enumerate(rewrites):
        with rewritten(m, r):
            now = Layer(m, 1).through(key[:, i])
            assert torch.allclose(now, value.start[i] + value.delta[i], rtol=1e-4, atol=1e-5)
            bare = at_subject(m, found[i].prompt, place.writes)[0]
        assert torch.allclose(value.start[i], at_subject(m, found[i].prompt, place.writes)[0], atol=1e-5)
        assert not torch.allclose(bare, value.start[i], atol=1e-3)
    assert record["condition with the ridge"] < record["condition of C"]
    assert same(bits(m.hf), before)


def test_the_second_moment_is_that_of_captured_keys():
    m, texts = family("llama_gqa"), numbered_texts()
    found = of_texts(m, [0, 2], texts)
    ids = torch.tensor([i for t in texts for i in m.tokens([t]).ids[0].tolist()])
    own = []
    for row in ids.split(64):  # contexts are full, and texts go on from one to the next
        own.append(m.capture(row[None], "mlp_post.2", logits=False)["mlp_post.2"][0].double())
    x = torch.cat(own)
    assert found[2].count == len(x)
    assert torch.allclose(found[2].second, x.T @ x / len(x), rtol=1e-4, atol=1e-7)


def test_on_the_bundled_model_an_edit_holds_and_a_wrong_layer_or_a_random_rewrite_does_not():
    m = miniworld()
    requests = from_world(m, 6, seed=9)
    before = bits(m.hf)
    found, rewrites = rome(m, requests, documents(), layer=0, samples=2)
    share = dict(zip(found.labels["measure"], found.share.tolist(), strict=True))
    assert share["efficacy"] == 1.0
    assert share["paraphrase"] >= 0.75
    assert share["neighbourhood"] >= 0.9
    assert found.before[0] == 0
    assert float(found.null[0].max()) == 0
    wrong, _ = rome(m, requests, documents(), layer=5, samples=1)
    assert float(wrong.share[0]) <= 0.2
    assert [r.weight for r in rewrites] == ["mlp_out.0"] * 6
    with rewritten(m, rewrites.rewrites[0]):
        assert m.text.predict(requests.requests[0].prompt)[0].text.strip() == requests.requests[0].new
    assert same(bits(m.hf), before)


def test_without_a_layer_all_are_tried_and_the_best_is_taken():
    m = miniworld()
    found, _ = rome(m, from_world(m, 2, seed=1), documents(60), steps=15, samples=1)
    swept = found.record["harmonic mean of shares by layer"]
    assert list(swept) == list("012345")
    assert str(found.record["layer"]) == max(swept, key=lambda n: swept[n])


def test_half_precision_is_edited_in_full_and_the_rounding_reported():
    for dtype in (torch.bfloat16, torch.float16):
        m = family("llama_gqa", dtype)
        found, rewrites = rome(m, numbered_requests(), numbered_texts(), layer=1, steps=3, samples=1)
        assert {t.dtype for r in rewrites for t in r.tensors().values()} == {torch.float32}
        assert bool((found.rounding > 1e-5).all())
    exact, _ = rome(family("llama_gqa"), numbered_requests(), numbered_texts(), layer=1, steps=3, samples=1)
    assert bool((exact.rounding < 1e-4).all())


def test_what_cannot_be_edited_is_refused():
    m = family("llama_gqa")
    for call, word in [
        (lambda: rome(m, numbered_requests(), numbered_texts(), layer=3), "layers go from 0 to 2"),
        (lambda: Layer(family("gemma2"), 1), "scaled or normed"),
        (lambda: Layer(family("mixtral"), 1), "no such place"),
        (lambda: cases(random_llama(), [Request("Mary", "Mary and ", "John")], ("",)), "merge"),
        (lambda: rome(m, Requests((Request("w1", "w1 w2 ", " "),)), numbered_texts(), layer=0), "empty"),
    ]:
        with pytest.raises(Refused, match=word):
            call()
