"""Edits of many requests together: MEMIT, EMMET and AlphaEdit, held against ROME and against what is stated of them."""

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.editing import alpha_edit, emmet, from_world, memit
from cutaway.editing.batch_edits import spread
from cutaway.editing.covariance import of_texts
from cutaway.editing.places import Layer, cases, contexts
from cutaway.editing.rome import rank_one
from cutaway.editing.solve import Equality, Ridge
from cutaway.editing.values import Found, Search
from cutaway.models import rewritten
from tests.conformance.subjects import family, miniworld
from tests.editing.common import documents, numbered_requests, numbered_texts
from tests.models.test_rewrites import bits, same

SEARCH = Search(steps=4, rate=0.2, kl=0.0, clamp=4.0)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama_gqa"])
def test_of_one_request_and_layer_memit_without_weight_and_emmet_are_rome_for_the_same_value(name):
    m, texts = family(name), numbered_texts()
    found = cases(m, list(numbered_requests())[:1], contexts(texts, 0, 0))
    moments, place = of_texts(m, [1], texts), Layer(m, 1)
    (want,), value, _ = rank_one(place, found, moments[1], 0.01, SEARCH)
    seen = m.capture(found[0].prompt.tokens, "resid_post.1", logits=False)["resid_post.1"]
    stream = seen[:, int(found[0].prompt.last[0])].double()
    at_stream = Found(stream, value.delta, value.log_prob)  # the same step, from the residual stream
    for constrain in (lambda c, note: Ridge(c, 0.0), lambda c, note: Equality(c)):
        (got,), (note,) = spread([place], found, at_stream, moments, 0.01, constrain)
        u, v = got.tensors().values()
        a, b = want.tensors().values()
        assert torch.allclose(u @ v, a @ b, rtol=1e-3, atol=1e-6)
        assert note["condition with the ridge"] < note["condition of C"]


def test_each_layer_takes_its_share_and_the_last_one_closes_the_gap():
    m, texts = family("llama_gqa"), numbered_texts()
    found = cases(m, list(numbered_requests()), contexts(texts, 0, 0))
    places, moments = [Layer(m, 0), Layer(m, 1)], of_texts(m, [0, 1], texts)

    def now():
        seen = [m.capture(c.prompt.tokens, "resid_post.1", logits=False)["resid_post.1"] for c in found]
        return torch.stack([x[0, int(c.prompt.last[0])] for x, c in zip(seen, found, strict=True)]).double()

    start = now()
    value = Found(start, torch.full_like(start, 0.05), torch.zeros(2))
    rewrites, _ = spread(places, found, value, moments, 0.01, lambda c, note: Equality(c))
    with rewritten(m, *rewrites):
        assert torch.allclose(now(), start + 0.05, atol=1e-4)
    assert [r.weight for r in rewrites] == ["mlp_out.0", "mlp_out.1"]


@pytest.mark.parametrize("edit", [memit, emmet, alpha_edit])
def test_facts_written_together_hold_on_the_bundled_model_and_random_rewrites_do_not(edit):
    m, requests = miniworld(), from_world(miniworld(), 3, seed=9)
    before = bits(m.hf)
    found, rewrites = edit(m, requests, documents(), layers=(0,), samples=1)
    assert float(found.share[0]) >= 2 / 3 > float(found.null[0].max()) + 0.3
    assert float(found.before[0]) == 0
    assert len(rewrites) == 1
    assert same(bits(m.hf), before)


def test_layers_that_cannot_be_are_refused():
    m = family("llama_gqa")
    for layers, word in (((1, 0), "ascend"), ((1, 3), "layers go from 0 to 2")):
        with pytest.raises(Refused, match=word):
            memit(m, numbered_requests(), numbered_texts(), layers=layers)
