"""Directions that are selected by their effects, and forms of intervention on them: one prompt at a time, by weights,
and in a world whose behaviours are known."""

import pytest
import torch
import transformers as tf

import cutaway as ca
from cutaway.directions.behaviour import common_end, first_tokens
from cutaway.directions.forms import FORMS
from cutaway.models.edits.rewrites import rewritten
from cutaway.tasks import Labelled, read_labelled
from tests.conformance.subjects import chatting, family, miniworld, random_llama
from tests.directions.test_find import labelled

VERDICTS = (("happy", "loved", "positive", "gladly"), ("upset", "hated", "negative", "never"))


def forked(texts=None):
    """Sentences that end alike, with the class before the end."""
    texts = texts or labelled()
    return Labelled(tuple(f"{t}, Tom gave" for t in texts.texts), texts.concepts, texts.shown, texts.groups)


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture(scope="module")
def refusal():
    texts = read_labelled("world/refusal", miniworld())
    return texts, ca.directions.select(miniworld(), texts)


def odds(model, text, ids, edits=()):
    p = model.run_last(text, edits=edits)[0].softmax(-1)[ids].sum()
    return float(p.log() - (1 - p).log())


def test_scores_are_those_of_one_prompt_at_a_time(model):
    data = forked()
    found = ca.directions.select(model, data, words=("book", "ring"), samples=1)
    assert found.labels["position"] == list(common_end(model.tokens(list(data.texts))))[-3:]
    assert found.record["zero difference"] == [f"resid_pre.0@{p}" for p in found.labels["position"]]
    assert any("zero difference" in n for n in found.record["notes"])
    assert bool(found.bypass[:, 0].isnan().all())
    ids = first_tokens(model, data.texts[0], ("book", "ring"))
    assert {model.tokenizer.decode([i]).strip() for i in ids.tolist()} == {"book", "ring"}
    seen = [i for i, g in enumerate(data.groups) if g in found.groups]
    assert 0 < len(seen) < len(data.texts)
    one = found.direction(-2, 1)
    ablated = one.at("resid_pre", "attn_out", "mlp_out", model=model).project_out()
    tested = [i for i in seen if data.groups[i] not in _found_on(model, data, found)]
    shown, bare = ([data.texts[i] for i in tested if bool(data.shown[i, 0]) == k] for k in (True, False))
    wanted = {
        "bypass": [odds(model, t, ids, ablated) for t in shown],
        "induce": [odds(model, t, ids, one.add()) for t in bare],
        "kl": [
            float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum())
            for t in bare
            for p, q in [(model.run_last(t)[0], model.run_last(t, edits=ablated)[0])]
        ],
    }
    cell = found.select(position=-2, layer=1)
    for name, values in wanted.items():
        assert float(getattr(cell, name)) == pytest.approx(sum(values) / len(values), abs=1e-3), name
    plain = [sum(odds(model, t, ids) for t in some) / len(some) for some in (shown, bare)]
    assert found.plain.tolist() == pytest.approx(plain, abs=1e-3)


def _found_on(model, data, found):
    """The groups whose texts give the candidates, known by their difference of means."""
    from itertools import combinations

    x = model.capture([*data.texts], ["resid_pre.1@-2"], logits=False)["resid_pre.1@-2"].float()
    y = data.shown[:, 0]
    for n in range(1, len(found.groups)):
        for some in combinations(found.groups, n):
            own = torch.tensor([g in some for g in data.groups])
            if torch.allclose(x[own & y].mean(0) - x[own & ~y].mean(0), found.direction(-2, 1).vector[0], atol=1e-4):
                return some
    raise AssertionError("the candidate is no difference of means of whole groups")


def test_the_filters_choose_the_least_bypass(model):
    found = ca.directions.select(model, forked(), words=("book",), depth=1.0, samples=1)
    allowed = (found.kl <= 0.1) & (found.induce >= 0)
    assert torch.equal(found.passes, allowed)
    if found.best:
        assert float(found.select(position=found.best[0], layer=found.best[1]).bypass) == float(
            found.bypass[allowed].min()
        )
    assert not bool(ca.directions.select(model, forked(), words=("book",), depth=0.0, samples=1).passes.any())


def test_a_selected_direction_is_opened_by_position_and_address(tmp_path, refusal):
    _, found = refusal
    path = found.save(tmp_path / "selected.safetensors")
    one = ca.directions.open(path, None, "-1", "resid_pre.5")
    assert torch.equal(one.vector[0], found.vector[-1, 5])
    assert one.record["position"] == -1
    with pytest.raises(ca.Refused, match="passes all filters"):
        ca.directions.open(path)
    with pytest.raises(ca.Refused, match="none of the candidates"):
        ca.directions.open(path, None, "-1", "resid_post.5")


def test_refusal_of_a_world_is_removed_by_what_is_affine_and_not_by_what_is_zero(refusal):
    texts, found = refusal
    assert not found.best  # ablation to zero brings refusals about
    assert float(found.bypass[-1, 5]) < float(found.null[-1, 5].min())
    assert float(found.induce[-1, 5]) > 0 > float(found.induce_null[-1, 5].max())
    one = found.direction(-1, 5)
    got = ca.directions.intervene(miniworld(), texts, one, foils=("sure",), forms=("add", "zero", "affine"), samples=2)
    assert got.record["texts"]["with"] >= 60
    assert got.share[0].tolist() == [1.0, 0.0]
    add, zero, affine = got.share[1:]
    assert float(add[1]) >= 0.9
    assert float(got.null[1, 1].max()) <= 0.1  # of random directions of the same length
    assert float(zero[1]) > 0.5  # benign requests are refused: zero lies on that side
    assert affine.tolist() == [0.0, 0.0]
    assert float(got.other[3].min()) == 1.0
    assert float(got.kept[3]) >= 0.98
    assert float(got.null[3, 0].min()) == 1.0
    assert 0.3 < float(got.zero[0]) < 1
    assert "affine" in got.finding


def test_one_direction_flips_sentiment_of_a_template_that_it_was_not_found_on():
    texts = read_labelled("world/sentiment", miniworld())
    others = texts.of_groups(*(f"template {k}" for k in (1, 2, 3)))
    options = {"sites": ("resid_pre.3",), "readings": ("mean",), "finders": ("mean_difference",), "samples": 1}
    one = ca.directions.find(miniworld(), others, **options).direction()
    got = ca.directions.intervene(
        miniworld(), texts, one, words=VERDICTS[0], foils=VERDICTS[1],
        forms=("add", "subtract"), strength=4.0, samples=3,
    )  # fmt: skip
    assert got.record["texts"] == {"means": 192, "with": 32, "without": 32}
    assert float(got.share[1, 1]) >= 0.95  # negative reviews turn positive
    assert float(got.other[2, 0]) >= 0.95  # and the other way
    assert float(got.null[1, 1].max()) <= 0.1  # of random directions of the same length
    assert float(got.other_null[2, 0].max()) <= 0.1


def test_shares_are_those_of_the_likeliest_token_and_weights_are_the_projection(model):
    data = forked()
    one = ca.directions.direction({"resid_pre.1": torch.linspace(-1, 1, 32)}, "park")
    first = [model.tokenizer.decode([i]).strip() for i in model.run_last(list(data.texts)).argmax(-1).tolist()]
    word = max(set(first), key=first.count)
    got = ca.directions.intervene(model, data, one, words=(word,), samples=1)
    assert any("does not say on which groups" in n for n in got.record["notes"])
    names = got.labels["form"]
    assert names == ["none", *FORMS]
    zero, weights = names.index("zero"), names.index("weights")
    for field in ("share", "null", "kept", "kl", "perplexity"):
        a, b = getattr(got, field)[[zero, weights]]
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    again = ca.directions.intervene(model, data, one, words=(word,), samples=1, seed=1)
    assert not torch.equal(got.share, again.share) or not torch.equal(got.null, again.null)
    halves = [r.record["texts"]["with"] for r in (got, again)]
    assert sum(halves) <= len(data.texts)


def test_an_untied_copy_has_two_weights_also_in_files(tmp_path):
    model = miniworld()
    one = ca.directions.direction({"resid_pre.5": torch.linspace(-1, 1, 128)})
    copy, prompt = ca.models.untied(model), "User: How do I thank my cousin? Assistant:"
    assert ca.models.untied(copy) is copy
    assert torch.equal(copy.run(prompt), model.run(prompt))
    edits = one.at("embed", "attn_out", "mlp_out", model=model).project_out()
    with rewritten(copy, *ca.directions.orthogonalised(copy, one)) as changed:
        changed.hf.save_pretrained(tmp_path)
    reloaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    with torch.no_grad():
        logits = reloaded(model.tokens(prompt).ids).logits
    torch.testing.assert_close(logits, model.run(prompt, edits=edits), atol=1e-3, rtol=1e-3)
    assert torch.equal(copy.run(prompt), model.run(prompt))


def test_texts_are_put_into_a_chat_template():
    model = chatting()
    found = ca.directions.select(model, labelled(), words=("book",), samples=1)
    end = len(model.tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"])
    assert found.labels["position"][0] == -end
    plain = ca.directions.select(model, forked(), words=("book",), chat=False, samples=1)
    assert plain.labels["position"] == ca.directions.select(random_llama(), forked(), samples=1).labels["position"]


@pytest.mark.parametrize(
    ("change", "options", "why"),
    [
        (lambda d: Labelled(d.texts, d.concepts, torch.ones_like(d.shown), d.groups), {}, "every text shows"),
        (lambda d: Labelled(("", *d.texts[1:]), d.concepts, d.shown, d.groups), {}, "text 0 is empty"),
        (lambda d: d, {"words": ("",)}, "merges with the end"),
        (lambda d: d, {"last": 99}, "position"),
        (lambda d: d, {"layers": (7,)}, "layer"),
        (forked, {"layers": (0,)}, "the same stream at all"),
        (lambda d: d, {"concept": "store"}, "labelled with park"),
    ],
)
def test_what_has_no_candidates_is_refused(model, change, options, why):
    with pytest.raises(ca.Refused, match=why):
        ca.directions.select(model, change(labelled()), samples=1, **options)


@pytest.mark.parametrize(
    ("direction", "options", "why"),
    [
        ({"attn_out.1": 32}, {}, "not the residual stream"),
        ({"resid_pre.1": 16}, {}, "16 wide"),
        ({"resid_pre.1": 32}, {"forms": ("magic",)}, "no such form"),
        ({"resid_pre.1": 32}, {"words": (" ",)}, "a word is missing"),
    ],
)
def test_what_no_form_is_of_is_refused(model, direction, options, why):
    one = ca.directions.direction({a: torch.ones(n) for a, n in direction.items()}, "park")
    with pytest.raises(ca.Refused, match=why):
        ca.directions.intervene(model, labelled(), one, samples=1, **options)


def test_texts_that_the_direction_was_found_on_are_no_test(refusal):
    texts, found = refusal
    with pytest.raises(ca.Refused, match="none is left for a test"):
        ca.directions.intervene(miniworld(), texts.of_groups(*found.groups), found.direction(-1, 5))
    with pytest.raises(ca.Refused, match="no text is of other"):
        texts.of_groups("other")
    with pytest.raises(ca.Refused, match=r"normed|tied|positions"):
        ca.directions.intervene(
            family("gemma2"), Labelled(("w3 w4", "w5 w6") * 8, ("x",), torch.tensor([[True], [False]] * 8)),
            ca.directions.direction({"resid_pre.1": torch.ones(family("gemma2").shape.d_model)}),
            words=("w9",), forms=("weights",), samples=1,
        )  # fmt: skip
