"""The card of a latent against numbers by hand, and what is left out where something is missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.dictionaries.gates import Relu
from cutaway.dictionaries.transforms import autoencoder
from cutaway.features import FeatureCard, card, effects, harvest, swaps
from cutaway.features.store.meta import Label
from cutaway.models.edits.library import Add
from cutaway.models.tokens import batch
from cutaway.streams import from_texts
from cutaway.views.draw.terminal import terminal
from cutaway.views.spec import fields
from tests.features.common import KEEP, MASKING, PACKING, brute, dictionaries, found, made, model, texts

LATENT, SITE = 11, "resid_post.1"


@pytest.fixture(scope="module")
def whole(store):
    return card(store, LATENT, model(), dictionaries()["some"], dictionary="some", samples=3)


def test_where_it_fires(store, whole):
    code = found(brute().codes["some"], store)
    values = code[..., LATENT][code[..., LATENT] != 0].double()
    assert float(whole.density) == pytest.approx(len(values) / store.counted)
    assert float(whole.histogram.sum()) == pytest.approx(1.0)
    exact = np.quantile(values.numpy(), [0.1, 0.5, 0.9, 0.99], method="inverted_cdf")
    assert whole.quantile.tolist() == pytest.approx(exact.tolist(), rel=1e-4)
    assert bool((whole.quantile_interval[:, 0] <= whole.quantile).all())
    assert bool((whole.quantile <= whole.quantile_interval[:, 1]).all())
    assert whole.activation[0] == whole.activation.max()
    centre = whole.labels["offset"].index("0")
    torch.testing.assert_close(whole.window[:, centre], whole.activation)
    examples = [*store.latents("some").top(LATENT)[:6], *store.latents("some").sampled(LATENT)]
    for row, words, e in zip(whole.window, whole.labels["window"], examples, strict=True):
        around = torch.nn.functional.pad(code[e.context, :, LATENT], (3, 3))[e.position : e.position + len(row)]
        torch.testing.assert_close(row[row.isfinite()], around[row.isfinite()], rtol=2e-3, atol=1e-6)
        ids = store.context(e.context)["ids"]
        assert words[centre] == store.texts(ids[ids >= 0])[e.position]
        assert row.isnan().tolist() == [w == "" for w in words]


def test_what_it_writes_and_is_like(whole):
    d, m = dictionaries()["some"], model()
    own = d.decoder[0][SITE][LATENT]
    rows = m.hf.lm_head.weight * m.hf.model.norm.weight
    effect = rows @ own
    effect = (effect - effect.mean()) / effect.std()
    assert whole.raises.tolist() == pytest.approx(effect.topk(8).values.tolist(), abs=1e-4)
    assert whole.lowers.tolist() == pytest.approx(effect.topk(8, largest=False).values.tolist(), abs=1e-4)
    assert whole.labels["raised"][0] == m.text.token_texts([int(effect.argmax())])[0]
    assert bool((whole.raises_null[0] >= whole.raises_null[-1]).all()), "ranks are those of random directions"
    cosine = torch.nn.functional.cosine_similarity(d.decoder[0][SITE], own[None], dim=1)
    cosine[LATENT] = -2
    assert whole.neighbour.tolist() == pytest.approx(cosine.topk(8).values.tolist(), abs=1e-5)
    assert whole.labels["neighbours"][0] == f"latent {int(cosine.argmax())}"


def test_what_fires_with_it(store, whole):
    active = (found(brute().codes["some"], store).flatten(0, 1) != 0).double()
    own = active[:, LATENT]
    for name, share, null in zip(whole.labels["partner"], whole.together, whole.together_null, strict=True):
        other = active[:, int(name.split()[1])]
        assert float(share) == pytest.approx(float((other * own).sum() / own.sum()))
        assert bool(((null >= 0) & (null <= 1)).all())


def test_ablation_is_a_run_without_what_the_latent_adds(store, whole):
    d, m, changes = dictionaries()["some"], model(), []
    for e in effects.chosen_examples(store.latents("some"), LATENT, 6):
        ids = store.context(e.context)["ids"]
        tokens = batch([ids[ids >= 0].tolist()])
        x = m.capture(tokens, SITE)[SITE]
        f = d.encode(x.flatten(0, 1)).dense()[:, LATENT]
        clean = m.run(tokens)[0]
        changed = m.run(tokens, Add(SITE, -(f[:, None] * d.decoder[0][SITE][LATENT])[None]))[0]
        loss = [torch.nn.functional.cross_entropy(y[e.position : -1], tokens.ids[0, e.position + 1 :])
                for y in (clean, changed)]  # fmt: skip
        raised = (m.hf.lm_head.weight * m.hf.model.norm.weight @ d.decoder[0][SITE][LATENT]).topk(8).indices
        if e.position + 1 < tokens.ids.shape[1]:
            changes.append([float(loss[1] - loss[0]), float((changed - clean)[e.position, raised].mean())])
    by_hand = torch.tensor(changes).mean(0)
    torch.testing.assert_close(whole.change, by_hand, atol=2e-4, rtol=1e-3)
    assert whole.change_null.shape == (2, 3)
    assert len(set(whole.change_null[0].tolist())) == 3
    assert whole.record["cost"]["forwards"] > 0


def test_a_card_is_shown_and_saved(store, whole, tmp_path):
    back = ca.open(whole.save(tmp_path / "a.safetensors"))
    assert isinstance(back, FeatureCard)
    assert (back.labels, back.latent, back.dictionary) == (whole.labels, LATENT, "some")
    assert all(terminal(whole, field) is not None for field in fields(whole))
    assert "Lucy" in whole._repr_html_()
    again = card(store, LATENT, model(), dictionaries()["some"], dictionary="some", samples=3)
    assert all(torch.equal(t.nan_to_num(), again.tensors()[n].nan_to_num()) for n, t in whole.tensors().items())


def test_without_a_model_there_are_reasons(tmp_path):
    store = made(tmp_path / "a", texts()[:20], tokens=300)
    store.meta.put([Label("some", LATENT, "me", "what I think")])
    alone = card(store, LATENT, dictionary="some")
    assert alone.said == "what I think (me)"
    assert (alone.raises, alone.neighbour, alone.change) == (None, None, None)
    assert {"raises", "neighbour", "change"} <= set(alone.reasons)
    half = card(store, LATENT, source=dictionaries()["some"], dictionary="some")
    assert half.neighbour is not None
    written = card(store, 3, model(), dictionaries()["few"], dictionary="few", samples=2, contexts=2)
    assert written.raises is not None, "what an MLP's output adds to the stream"


def test_cards_that_cannot_be_are_refused(store):
    with pytest.raises(Refused, match="active on none"):
        card(store, 23, dictionary="some")
    with pytest.raises(Refused, match="no such latent"):
        card(store, 24, dictionary="some")
    with pytest.raises(Refused, match="this one"):
        card(store, 3, model(), dictionaries()["few"], dictionary="some")


def test_minimal_pairs_are_runs_with_another_token_at_the_peak(store):
    m, d, known = model(), dictionaries()["some"], store.latents("some")
    examples, g = known.top(LATENT)[:3], torch.Generator().manual_seed(0)
    change, chance, near = swaps.swapped(m, store, d, LATENT, examples, 2, 5, g)
    assert (change.shape, chance.shape) == ((3, 2), (3, 5))
    table = torch.nn.functional.normalize(m.hf.model.embed_tokens.weight.detach(), dim=1)
    by_hand = list[float]()
    for e in examples:
        ids = store.context(e.context)["ids"]
        row = ids[ids >= 0].tolist()
        near_first = (table @ table[row[e.position]]).argsort(descending=True).tolist()
        chosen = [i for i in near_first if i != row[e.position] and i not in m.tokenizer.all_special_ids][:2]
        values = list[float]()
        for token in chosen:
            changed = torch.tensor([[*row[: e.position], token, *row[e.position + 1 :]]])
            x = m.capture(changed, SITE, logits=False)[SITE][0, e.position]
            values.append((float(d.encode(x[None]).dense()[0, LATENT]) - e.value) / e.value)
        by_hand.append(sum(values) / 2)
        assert e is not examples[0] or near == chosen
    torch.testing.assert_close(change[:, 0], torch.tensor(by_hand), atol=1e-4, rtol=1e-4)
    same, _, _ = swaps.swapped(m, store, d, LATENT, examples, 2, 5, torch.Generator().manual_seed(0))
    assert torch.equal(same, change)


def test_minimal_pairs_tell_a_latent_of_a_token_from_one_of_a_context(tmp_path):
    """Planted: a latent that reads the embedding of one token, and one that is always active."""
    m = model()
    token = m.text.token_id(texts()[0].split()[0])
    own = m.hf.model.embed_tokens.weight.detach()[token]
    rows = torch.stack([own / own.norm(), *torch.zeros(4, len(own))])
    bias = torch.tensor([-0.9 * float(own.norm()), 1.0, 2.0, 3.0, 4.0])
    planted = autoencoder("resid_pre.0", rows, rows, bias, torch.zeros(32), Relu())
    store = harvest(m, planted, from_texts(texts()), tmp_path / "a", packing=PACKING, masking=MASKING, keep=KEEP)
    of_token, always = (card(store, i, m, planted, tokens=3, samples=3, contexts=3) for i in (0, 1))
    assert of_token.swap.tolist() == pytest.approx([-1.0, -1.0])
    assert of_token.swap_null.unique().tolist() == [-1.0]
    assert always.swap.tolist() == pytest.approx([0.0, 0.0])
    assert always.swap_null.unique().tolist() == [0.0]
    assert m.text.token_texts([token])[0].strip() in of_token.labels["swapped"][0]
