"""Search: every way of it against the same by hand."""

from __future__ import annotations

import shutil

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.features import FeatureStore, effects, search
from cutaway.features.store.meta import Label
from tests.features.common import brute, dictionaries, found, model


def test_by_label(store, tmp_path):
    shutil.copytree(store.folder, tmp_path / "copy")
    copy = FeatureStore(tmp_path / "copy")
    copy.meta.put([Label("some", 3, "rule", "after “ the”"), Label("few", 4, "rule", "the token is “ store”")])
    assert [(h.dictionary, h.latent) for h in search.by_label(copy, "store")] == [("few", 4)]
    assert search.by_label(copy, "nothing") == []
    with pytest.raises(Refused, match="no word"):
        search.by_label(copy, " ")


def test_by_peak_token_and_phrase(store):
    known, ids = store.latents("few"), store.column("ids")
    (token,) = store.token_ids(" store")
    hits = search.by_peak_token(store, " store", "few")
    for hit in hits[:5]:
        own = [int(ids[e.context, e.position]) == token for e in known.top(hit.latent)]
        assert hit.score == pytest.approx(sum(own) / len(own))
    assert hits[0].score == max(h.score for h in hits) > 0
    with pytest.raises(Refused, match="tokens here"):
        search.by_peak_token(store, " store store", "few")
    code = found(brute().codes["few"], store)
    first, second = store.token_ids(" park"), store.token_ids(" river")
    at = (ids[:, :-1] == first[0]) & (ids[:, 1:] == second[0])
    share = (code[:, 1:][at] != 0).double().mean(0)
    for hit in search.by_phrase(store, " park river", "few")[:6]:
        assert hit.score == pytest.approx(float(share[hit.latent] - known.density[hit.latent]), abs=1e-6)
    with pytest.raises(Refused, match="not in the corpus"):
        search.by_phrase(store, " park zzz park", "few")


def test_by_a_text_a_word_and_likeness(store):
    d, m, known = dictionaries()["some"], model(), store.latents("some")
    hits = search.by_text(store, "Mary went to the store", m, d, "some", most=24)
    acts = m.capture("Mary went to the store", "resid_post.1")["resid_post.1"][0]
    value = d.encode(acts).dense()[1:].abs().amax(0)  # without the beginning of the text
    score = value / known.tensors["largest"].clamp_min(1e-30) * -known.density.clamp_min(1 / known.tokens).log10()
    assert [h.latent for h in hits] == score.argsort(descending=True)[: len(hits)].tolist()
    assert [h.score for h in hits] == pytest.approx(score.sort(descending=True).values[: len(hits)].tolist(), rel=1e-4)
    rows = m.hf.lm_head.weight * m.hf.model.norm.weight
    effect = d.decoder[0]["resid_post.1"] @ rows.T
    effect = (effect - effect.mean(1, keepdim=True)) / effect.std(1, correction=0, keepdim=True)
    want = effect[:, m.text.token_id(" store")].sort(descending=True)
    hits = search.by_raised_word(store, " store", m, d, "some", most=24)
    assert [h.latent for h in hits] == want.indices.tolist()
    assert [h.score for h in hits] == pytest.approx(want.values.tolist(), rel=1e-3, abs=1e-4)
    own = d.decoder[0]["resid_post.1"]
    cosine = torch.nn.functional.cosine_similarity(own, own[7][None], dim=1)
    hits = search.by_likeness(store, 7, d, "some", most=99)
    assert [h.latent for h in hits] == [i for i in cosine.argsort(descending=True).tolist() if i != 7]
    with pytest.raises(Refused, match="this one"):
        search.by_text(store, "Mary", m, dictionaries()["few"], "some")


@pytest.mark.parametrize("name", ["miniworld/transcoders", "miniworld/resid_post.3"])
def test_rows_of_all_latents_are_those_of_each(name):
    m, d = ca.load("miniworld"), ca.dictionaries.load(name)
    some = list(range(0, d.n_latents, 97))
    one_by_one = torch.stack([effects.writes_to_logits(m, d, i) for i in some])
    torch.testing.assert_close(effects.rows_to_logits(m, d)[some], one_by_one)
