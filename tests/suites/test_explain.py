"""Explain: its words come from its numbers, its claims from their controls, and an untrained model gets none."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import cutaway as ca
from cutaway import patching, tasks
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.rung import exceeding
from cutaway.core.stats import null_band
from cutaway.suites import claims
from cutaway.suites import explain as suite
from cutaway.suites.explain import EFFORTS, explain
from cutaway.suites.explanation import UNSUPPORTED, Explanation
from cutaway.tasks.pair import Pair
from tests.conformance import subjects

CAPITAL = "The capital of Norway is"


@cache
def told(prompt: str = CAPITAL, **options: Any) -> Explanation:
    return explain(subjects.miniworld(), prompt, effort="quick", **options)


def results(e: Explanation) -> list[Result]:
    return [*e.results.values(), *e.own.values()]


def numbers(text: str, names: Iterable[str]) -> list[str]:
    """The numbers in a sentence that are not parts of a quoted word or of a component's name."""
    text = re.sub(r"“[^”]*”", " ", text)
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w.])", " ", text)
    return re.findall(r"[-−+]?\d+(?:\.\d+)?(?: %)?", text)


#: claim → the result it is read off, and the fields that it may quote
SOURCES = {
    "the prediction": ("predictions", ("probability", "after_corrupt")),
    "the depth": ("depth", ("probability", "interval", "null")),
    "the writers": ("writers", ("effect", "interval", "null")),
    "the positions": ("resid_pre", ("recovered", "interval")),
    "the heads": ("heads", ("exact", "exact_null")),
    "the heads together": ("together", ("recovered", "interval", "null")),
    "the circuit": ("carried", ("faithfulness", "interval", "null")),
}


def spoken(e: Explanation, about: str) -> set[str]:
    """Every number that a claim may quote, in every form in which prose writes numbers."""
    name, fields = SOURCES[about]
    result = e.results[name]
    values = {x for f in fields for x in getattr(result, f).reshape(-1).double().tolist() if x == x}
    interval, null = (result.tensors().get(f"{fields[0]}_{k}", result.tensors().get(k)) for k in ("interval", "null"))
    if null is not None and "effect" in result.tensors() and name != "together":
        bands = null_band(null.reshape(result.effect.numel(), -1))[0]
        values |= set(bands.abs().reshape(-1).tolist())
    if (gap := getattr(result, "gap", None)) is not None:
        gap = abs(gap)
        values |= {float(x) / gap for t in (null, interval, torch.tensor(list(values))) for x in t.reshape(-1)}
    values |= {float(result.total.mean())} if name == "writers" else set()
    forms = {claims.share, "{:+.1f}".format, "{:.1f}".format} if name == "writers" else {claims.share}
    counts = {str(len(result.null))} if name == "together" else set()
    if name == "carried":
        of, every = result.edges.tolist()
        values |= {of / every, *e.results["certificate"].deviation.tolist()}
        values |= set(e.results["certificate"].interval.flatten().tolist())
        counts |= {str(of), str(len(result.null[0])), f"{every:,}"[:1], f"{every:,}"[2:]}
    counts |= {str(int(result.exact.isfinite().sum())), str(result.exact.numel())} if name == "heads" else set()
    return {f(sign * v) for v in values for sign in (1, -1) for f in forms} | counts | {"0.1 %"}


@pytest.mark.parametrize(("prompt", "options"), [(CAPITAL, {"circuit": True}), ("7 + 5 =", {})])
def test_prose_holds_only_numbers_that_are_in_the_results(prompt, options):
    e = told(prompt, **options)
    assert len(e.summary) >= 4
    names = [str(n) for r in results(e) for a in ("component", "layer") for n in r.labels.get(a, ())]
    names += [f"{i}.{h}" for i in range(12) for h in range(8)]
    for claim in e.claims:
        for number in numbers(f"{claim.text} ({claim.control})", names):
            assert number in spoken(e, claim.about), (number, claim.text, claim.control)


def test_every_claim_names_its_control_and_stands_beside_it():
    e = told()
    assert {c.about for c in e.claims} >= {"the prediction", "the depth", "the writers", "the positions", "the heads"}
    for c in e.claims:
        assert c.control
        assert not exceeding(f"{c.text} ({c.control})", c.rung), c
        assert not c.supported or any(ch.isdigit() for ch in c.control), c
        assert not c.supported or f"{c.text} ({c.control})." in e.summary
    for r in results(e):
        assert "null" in r.tensors() or r.record["control"]
        assert "interval" in r.tensors() or r.reasons[r.main]


def test_the_claims_follow_from_the_numbers():
    e = explain(subjects.miniworld(), CAPITAL)
    p, depth, positions = (e.results[n] for n in ("predictions", "depth", "resid_pre"))
    assert p.labels["token"][p.answer].strip() == e.answer
    with torch.no_grad():
        ids = torch.tensor([subjects.miniworld().tokenizer(CAPITAL)["input_ids"]])
        own = subjects.miniworld().hf(ids).logits[0, -1].softmax(-1)
    assert float(p.probability[p.answer]) == pytest.approx(float(own.max()), rel=1e-4)
    led = next(i for i in range(len(depth.rank)) if bool((depth.rank[i:] == 0).all()))
    text = next(c.text for c in e.claims if c.about == "the depth")
    assert f"from block {depth.labels['layer'][led]} on" in text
    place = next(c.text for c in e.claims if c.about == "the positions")
    assert "enters" not in " ".join(e.summary), "it enters at the changed word in any model"
    late = int(re.search(r"From layer (\d+) on", place)[1])
    assert bool((positions.recovered[late:, -1] > 0.5).all())
    assert not bool(positions.recovered[late - 1, -1] > 0.5)


def test_no_effect_is_listed_inside_the_band_of_its_control_or_of_another_listed():
    for name in ("resid_pre", "heads", "writers"):
        result = told().results[name]
        rows = claims.standing_out(result, most=10**6)
        n = result.effect.shape
        layers = torch.arange(n[0]).repeat_interleave(n[1]) if len(n) == 2 else None  # as pictures pool
        effect, null = (result.exact, result.exact_null) if name == "heads" else (result.effect, result.null)
        bands = null_band(null.reshape(effect.numel(), -1), groups=layers)[0].reshape(*n, 2)
        assert rows
        for row in rows:
            assert row["interval"][0] > 0
            assert row["effect"] == pytest.approx(float(effect[tuple(row["at"])]))
            assert row["effect"] > float(bands[tuple(row["at"])].abs().max())
        assert min(r["effect"] for r in rows) > rows[-1]["band"], "as printed: effects beside one bound"


def test_words_are_as_strong_as_the_numbers():
    found = told().results
    writers, depth, heads = found["writers"], found["depth"], found["heads"]
    assert "on average) is written mostly by" in claims._written(writers, "oslo", "bergen").text
    small = claims._written(replace(writers, total=10 * writers.total), "oslo", "bergen").text
    assert "mostly" not in small, "what stands out is less than half of it"
    assert "what stands out is written by" in small
    assert claims._depth(depth, "oslo").supported
    wide = replace(depth, interval=depth.interval * torch.tensor([0.0, 1.0]))
    assert not claims._depth(wide, "oslo").supported, "the interval reaches into the control"
    gap, (row, *_) = heads.gap, claims.standing_out(heads)
    low, high = (claims.share(x / gap) for x in row["interval"])
    assert (
        f"{row['layer']}.{row['head']} ({claims.share(row['recovered'])} [{low}, {high}])"
        in claims._carried(heads).text
    )
    assert (claims._most(1e-5), claims._most(0.5), claims.share(-0.015)) == ("under 0.1 %", "at most 50 %", "−1.5 %")


def test_heads_together_are_measured_on_sentences_that_did_not_choose_them():
    e = told()
    chosen, measured = (e.results[n].record["subjects"]["task"] for n in ("heads", "together"))
    assert chosen["prompts"] == EFFORTS["quick"].siblings == e.siblings + 1
    assert measured["prompts"] >= 2
    assert measured["hash"] != chosen["hash"]
    text = next(c.text for c in e.claims if c.about == "the heads together")
    assert text.endswith("in sentences that did not choose them")
    assert "together" not in told(target="paris").results, "no sentence of the form is left"


def test_an_answer_that_is_hardly_preferred_is_called_so_first(monkeypatch):
    """The likeliest word is ahead of the next by a little: say so, and offer the word that depends on the subject."""
    model = subjects.miniworld()
    run = model.run_last

    def doubtful(prompts, edits=()):
        logits = run(prompts, edits).clone()
        logits[:, model.text.token_id("the")] = logits.amax(-1) + 0.1
        return logits

    monkeypatch.setattr(model, "run_last", doubtful)

    def doubt_of(one, answer):
        return suite._doubt(
            model, one, answer, *(model.run_last(t)[0] for t in (one.pairs[0].clean, one.pairs[0].corrupt))
        )

    one = tasks.from_sentence(model, CAPITAL, target="the", corrupt=CAPITAL.replace("Norway", "France"))
    doubt = doubt_of(one, suite._words(model, one.pairs[0])[0])
    assert doubt is not None
    assert doubt.instead == {"target": "oslo"}
    assert doubt.text.startswith("“The” is hardly preferred: 52 % against “oslo” 4"), (
        "one token, written as in the sentence"
    )
    assert doubt_of(tasks.from_sentence(model, CAPITAL, target="oslo"), "oslo") is not None
    monkeypatch.undo()
    assert doubt_of(tasks.from_sentence(model, CAPITAL), "oslo") is None
    assert told().doubt is None


def test_a_word_is_quoted_in_the_case_of_its_token():
    model = subjects.random_llama()
    pair = Pair(
        "Then Mary and John went to the store", "Then Mary and Tom went to the store", " then", " john", joined=True
    )
    assert suite._words(model, pair) == ("then", "john"), "“Then” and “John” are other tokens"
    assert suite._words(model, Pair(pair.clean, pair.corrupt, " Mary", " John", joined=True)) == ("Mary", "John")
    assert suite._distinct([" the", "the", " The"]) == ["␣the", "the", "The"]


@pytest.mark.parametrize(("seed", "spread"), [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 3.0), (5, 3.0)])
def test_nothing_is_claimed_of_a_model_that_nobody_trained(seed, spread):
    model = subjects.random_llama(seed, spread)
    e = explain(model, "Mary and John went, John gave to", effort="quick", seed=seed)
    said = [c for c in e.claims if c.supported]
    gap = e.results["resid_pre"].gap
    assert gap >= 1 or not said, said
    assert spread > 1 or not said
    if not said:
        assert [s for s in e.summary if "hardly preferred" not in s] == [
            f"{UNSUPPORTED}: {', '.join(c.about for c in e.claims)}."
        ]


def test_a_target_that_the_model_does_not_say_is_not_called_what_it_says():
    e = told(target="paris")
    assert (e.answer, e.siblings) == ("paris", 0)
    text = e.claims[0].text
    assert text.startswith("The model gives “paris” probability")
    assert "first choice is “oslo”" in text
    assert "leads in the lens" not in " ".join(e.summary), "siblings whose answer is right say nothing of a wrong one"
    assert float(e.results["writers"].total[0]) == pytest.approx(float(e.own["writers"].total[0]))


def test_a_target_may_be_written_as_people_write():
    e = told(target="Oslo")
    assert e.answer.lower() == "oslo"
    assert e.claims[0].text.startswith("The model says")
    assert e.siblings > 0


def test_siblings_ask_the_same_question():
    model = subjects.miniworld()
    one = tasks.from_sentence(model, CAPITAL)
    many = tasks.with_siblings(model, one, 8)
    assert many.pairs[0] == one.pairs[0]
    for pair in many.pairs[1:]:
        assert re.fullmatch(r"The capital of \w+ is", pair.clean)
        assert pair.clean != CAPITAL
        assert model.run_last(pair.clean).argmax() == model.text.token_id(pair.answer.strip())
    p = one.pairs[0]  # answers given bare, as in a file, are spelled the same way
    bare = tasks.Task("bare", (replace(p, answer=p.answer.strip(), foil=p.foil.strip(), joined=False),))
    assert tasks.with_siblings(model, bare, 8).pairs[1:] == many.pairs[1:]


def test_an_answer_of_several_tokens_is_one_answer_and_lenses_speak_of_its_first():
    model = subjects.miniworld()
    e = told(target="oslo paris")
    p, gap = e.results["predictions"], e.results["heads"].gap
    ids = torch.tensor([model.tokenizer(f"{e.prompt} oslo paris")["input_ids"]])
    with torch.no_grad():
        logs = model.hf(ids).logits[0].log_softmax(-1)
    whole = float(logs[-3, ids[0, -2]] + logs[-2, ids[0, -1]])
    assert (e.answer, p.labels["token"][p.answer]) == ("oslo paris", "oslo paris")
    assert float(p.probability[p.answer]) == pytest.approx(math.exp(whole), rel=1e-3)
    assert e.claims[0].text.startswith(
        "The model gives “oslo paris” probability under 0.1 %; its first choice is “oslo”"
    )
    texts = {c.about: c.text for c in e.claims}
    assert texts["the depth"].startswith("“oslo” leads")
    assert texts["the writers"].startswith("“oslo” over “athens”")
    assert gap == pytest.approx(float((e.results["heads"].clean - e.results["heads"].corrupt).mean()))
    assert e.results["heads"].units["effect"] == "nats"
    tiny: Any = {**e.results, "heads": replace(e.results["heads"], gap=0.25)}
    small = claims.claims_of((e.answer, e.foil), tiny, False)[0]
    assert (small.about, small.control) == ("the difference itself", "a factor of e in the odds: 1 nat")
    assert "by 0.25 nats on average" in small.text


@pytest.mark.parametrize("effort", list(EFFORTS))
def test_effort_decides_siblings_samples_and_cells(effort):
    e = explain(subjects.random_llama(), "Mary went, Mary gave to", effort=effort)
    scale, streams, heads = EFFORTS[effort], e.results["resid_pre"], e.results["heads"]
    assert e.siblings <= scale.siblings - 1
    assert streams.null.shape[-1] == scale.samples
    assert e.results["depth"].null.shape[-1] == 2 * scale.samples
    assert streams.record["options"]["samples"] == scale.samples
    assert ("exact" in heads.tensors()) == bool(scale.cells)
    assert streams.record["options"]["null_cells"] == scale.cells


def test_estimates_choose_what_is_measured_and_it_is_what_patching_measures():
    e, model = told(), subjects.miniworld()
    heads, whole = e.results["heads"], explain(model, CAPITAL, effort="thorough").results["heads"]
    seen = heads.exact.isfinite()
    assert int(seen.sum()) == EFFORTS["quick"].cells
    one = tasks.from_sentence(model, CAPITAL)
    many = tasks.with_siblings(model, one, 2 * EFFORTS["quick"].siblings).take(EFFORTS["quick"].siblings)
    exact = patching.activation(model, many, site="z", samples=1).effect
    torch.testing.assert_close(heads.exact[seen], exact[seen], rtol=1e-4, atol=1e-4)
    (first, *_), (same, *_) = claims.standing_out(heads), claims.standing_out(whole)
    told_by = [claims.claims_of(("oslo", "athens"), {**e.results, "heads": h}, False) for h in (heads, whole)]
    methods = [next(c.method for c in made if c.about == "the heads") for made in told_by]
    assert methods == ["patching.attribution", "patching.activation"]
    assert first["at"] == same["at"], "the head that brings back most"


def test_results_come_one_after_the_other_and_claims_only_of_what_is_there():
    seen: list[Explanation] = []
    last = explain(subjects.miniworld(), CAPITAL, effort="quick", each=seen.append)
    counts = [len(e.results) + len(e.own) for e in seen]
    assert counts == sorted(set(counts)), "each brings something new"
    assert counts[0] == 1
    assert [e.complete for e in seen] == [False] * (len(seen) - 1) + [True]
    assert (seen[-1].summary, seen[-1].siblings) == (last.summary, last.siblings)
    of = {name: about for about, (name, _) in SOURCES.items()}
    for e in seen:
        assert {of[n] for n in e.results if n in of} == {c.about for c in e.claims}
        assert [c for c in e.claims if c in last.claims] == list(e.claims), "no claim is taken back"


def test_the_same_seed_tells_the_same_story():
    again = explain(subjects.miniworld(), CAPITAL, effort="quick")
    assert again.summary == told().summary
    for a, b in zip(results(again), results(told()), strict=True):
        for name, t in a.tensors().items():
            assert torch.equal(t.nan_to_num(-7.0), b.tensors()[name].nan_to_num(-7.0))


def test_steps_are_told():
    steps: list[str] = []
    explain(subjects.random_llama(), "Mary went, Mary gave to", effort="quick", step=steps.append)
    assert len(steps) >= 4
    assert all(steps)


@pytest.mark.parametrize(
    ("options", "why"),
    [({"seed": -1}, "outside"), ({"seed": 2**70}, "outside"), ({"corrupt": CAPITAL}, "does not change"),
     ({"corrupt": "The capital is"}, "tokens"), ({"target": "oslo", "foil": "Oslo"}, "same token"),
     ({"target": "oslo paris", "foil": "oslo"}, "beginning"), ({"target": ""}, "no token"),
     ({"foil": "oslo"}, "less likely")],
)  # fmt: skip
def test_wrong_options_are_refused(options, why):
    with pytest.raises(Refused) as refusal:
        explain(subjects.miniworld(), CAPITAL, effort="quick", **options)
    assert why in refusal.value.why
    assert refusal.value.instead


def test_an_encoder_is_refused():
    with pytest.raises(Refused):
        explain(subjects.family("bert"), "w5 w6 w7", effort="quick")


# --- against the truth of the bundled world


@cache
def people() -> list[Any]:
    """Questions about people whose facts the model was trained on."""
    return list(ca.tasks.load("facts", subjects.miniworld(), 10, seed=3, split="train").pairs)


def test_verdicts_agree_with_known_facts():
    model, right = subjects.miniworld(), []
    for pair in people():
        one = tasks.from_sentence(model, pair.clean)
        verdicts = suite._verdicts(one)
        assert one.truth is not None
        right.append(len(verdicts) == 1 and all(v.agrees for v in verdicts))
        person = model.world.person[one_name(pair.clean)]
        known = one.pairs[0].answer.strip().lower() in {*person.facts.values(), model.world.country(person).lower()}
        assert (len(verdicts) > 0 and verdicts[0].agrees is True) == known
    assert sum(right) >= 8, right


def one_name(sentence: str) -> str:
    """The person that a sentence is about."""
    known = {p.name.lower(): p.name for p in subjects.miniworld().world.people}
    return next(known[w.lower()] for w in re.findall(r"\w+", sentence) if w.lower() in known)


def test_a_false_answer_contradicts_the_truth():
    e = told(target="paris")
    assert [v.agrees for v in e.verdicts][:1] in ([False], [None])
    assert told().verdicts[0].agrees is True
    assert "oslo" in told().verdicts[0].detail.lower()


def test_no_truth_is_claimed_of_what_the_world_does_not_know():
    e = told("and of the")
    assert e.verdicts == ()


def test_answers_that_begin_alike_are_explained():
    """Neither word's first token is among the likeliest, and both are the same."""
    found = explain(subjects.miniworld(), CAPITAL, target="drink oslo", foil="drink paris", effort="quick")
    p = found.results["predictions"]
    assert [p.labels["token"][i] for i in (p.answer, p.foil)] == ["drink oslo", "drink paris"]
    assert "writers" not in found.results, "both are written by the same first token"


def test_the_head_that_a_program_is_made_of_is_claimed():
    found = explain(ca.load("compiled/reverse", check=False), "a b c =", effort="quick")
    assert (found.answer, found.foil) == ("c", "b")
    heads = next(c for c in found.claims if "the heads that bring back most" in str(c))
    assert "1.0 (100 %" in str(heads)
