"""Why did the model go on with one word and not another?

One sentence is made a task (a counterfactual of equal length is proposed, siblings of the same form give intervals),
and five methods are asked: what it predicts, where along depth the answer appears, which components write it, which
positions and heads carry it, and whether those heads carry it together (on siblings that did not choose them).
Claims are then read off the numbers (`suites.claims`). An answer that the model hardly prefers is called so first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, cast

import torch

from cutaway import lenses, patching, tasks
from cutaway.core.finite import finite
from cutaway.core.record import counting
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.models.model import Model
from cutaway.suites.claims import MATERIAL, claims_of, share, standing_out
from cutaway.suites.explanation import Doubt, Explanation, Own, Predictions, Results, Verdict
from cutaway.tasks.answers import next_tokens
from cutaway.tasks.pair import Pair
from cutaway.tasks.replacements import usual
from cutaway.tasks.task import Task

Effort = Literal["quick", "normal", "thorough"]
#: effort → sentences of the form, random samples of a null
EFFORTS: dict[str, tuple[int, int]] = {"quick": (6, 1), "normal": (8, 3), "thorough": (32, 10)}
_HELD = 2  # sentences apart from those that chose the heads, below which nothing is claimed of the heads together
_HARDLY = 2.0  # times as likely as the next word, below which an answer is hardly preferred
_LARGE = 20_000_000  # parameters beyond which the default effort is quick


def explain(
    model: Model,
    prompt: str,
    *,
    target: str | None = None,
    foil: str | None = None,
    corrupt: str | None = None,
    effort: Effort | None = None,
    seed: int = 0,
    step: Callable[[str], None] = lambda text: None,
) -> Explanation:
    """Ask every method about one sentence.

    Args:
        model: a causal language model.
        prompt: the sentence; its next word is the question.
        target: the answer; the model's own prediction if not given.
        foil: the wrong answer; the best other answer after the counterfactual if not given.
        corrupt: the counterfactual sentence, if you have one.
        effort: how many siblings and random samples; quick by default for models over 20 M parameters.
        seed: of every random choice.
        step: called with a line of text at each stage of the work.

    Raises:
        Refused: no counterfactual of equal length, an answer of several tokens, an unreadable model.
    """
    if not 0 <= seed < 1 << 63:
        raise Refused(f"seed {seed}", "it is outside 0 to 2**63 − 1", "use a small whole number")
    large = sum(p.numel() for p in model.hf.parameters()) > _LARGE
    siblings, samples = EFFORTS[effort or ("quick" if large else "normal")]
    with finite("explain", model.dtype), counting() as spent:
        step("looking for a counterfactual")
        one = tasks.from_sentence(model, prompt, target, foil, corrupt=corrupt, seed=seed)
        form = tasks.with_siblings(model, one, 2 * siblings, seed)
        many = form.take(siblings)
        held = replace(form, pairs=form.pairs[siblings:]) if len(form) >= siblings + _HELD else None
        words = _words(model, one.pairs[0])
        doubt = _doubt(model, one, words[0]) if target is None else None
        results, own = _measure(model, one, many, held, samples, seed, step)
    pair = one.pairs[0]
    claims = tuple(claims_of(words, results, foil is None and corrupt is None))
    about = (model.name, pair.clean, *words, pair.corrupt, one.corruption, len(many) - 1)
    return Explanation(*about, results, own, claims, tuple(_verdicts(one)), doubt, spent)


def _measure(
    model: Model, one: Task, many: Task, held: Task | None, samples: int, seed: int, step: Callable[[str], None]
) -> tuple[Results, Own]:
    found: dict[str, Result] = {"predictions": _predictions(model, one)}
    own: dict[str, Result] = {}
    step("reading the residual stream at every depth")
    found["depth"] = lenses.logit_lens(model, many, samples=2 * samples, seed=seed)
    found["grid"] = lenses.lens_grid(model, one, samples=samples, seed=seed)
    step("splitting the answer into its components")
    found["writers"] = lenses.direct_attribution(model, many, samples=20, seed=seed)
    own["writers"] = lenses.direct_attribution(model, one, samples=20, seed=seed)
    found["neurons"] = lenses.direct_attribution(model, many, neurons=True, samples=10, seed=seed)
    step("exchanging activations with the counterfactual")
    for site in ("resid_pre", "attn_out", "mlp_out"):
        found[site] = patching.activation(model, many, site=site, samples=samples, seed=seed)
    own["resid_pre"] = patching.activation(model, one, site="resid_pre", samples=samples, seed=seed)
    found["heads"] = patching.activation(model, many, site="z", samples=samples, seed=seed)
    found["heads_noise"] = patching.activation(model, many, site="z", direction="noise", samples=samples, seed=seed)
    heads = standing_out(found["heads"], most=6)
    total = model.shape.n_layers * model.shape.n_heads
    if held is not None and heads and 2 * len(heads) <= total:
        step("exchanging the found heads together, in other sentences")
        named = ",".join(f"{r['layer']}.{r['head']}" for r in heads)
        found["together"] = patching.group(model, held, heads=named, samples=max(10, 5 * samples), seed=seed)
    return cast(Results, found), cast(Own, own)


def _predictions(model: Model, one: Task, n: int = 8) -> Predictions:
    bound = one.bind(model)
    clean, corrupt = (model.run_last(t)[0].float().softmax(-1) for t in (bound.clean, bound.corrupt))
    ids = clean.topk(min(n, len(clean))).indices
    asked = torch.stack([bound.answers[0], bound.foils[0]])
    ids = torch.cat([ids, asked[~torch.isin(asked, ids)]])
    answer, foil = (int((ids == i).nonzero()) for i in asked)
    return Predictions(
        probability=clean[ids].cpu(),
        after_corrupt=corrupt[ids].cpu(),
        labels={"token": _distinct(model.text.token_texts(ids))},
        units={"probability": "probability", "after_corrupt": "probability"},
        answer=answer,
        foil=foil,
        rank=int((clean > clean[asked[0]]).sum()),
        reasons={"probability": "the model's own probabilities of one sentence"},
        record={"control": "the corrupt sentence", "corrupt": bound.corrupt.texts[0]},
    )


def _distinct(texts: list[str]) -> list[str]:
    """Return the words as they are read; where two read the same, with the space before them."""
    seen = [_seen(t) for t in texts]
    told = [t if seen.count(t) == 1 else whole.replace(" ", "␣") for t, whole in zip(seen, texts, strict=True)]
    return [t if told.count(t) == 1 else f"{t}·{n}" for n, t in enumerate(told)]


def _doubt(model: Model, one: Task, answer: str) -> Doubt | None:
    """Says by how much an answer is ahead where that is little, and names the word that depends on the counterfactual.

    That is the likely word whose probability falls most, if the answer's own falls less; else the foil is the next one.
    """
    bound = one.bind(model)
    clean, corrupt = (model.run_last(t)[0].float().log_softmax(-1) for t in (bound.clean, bound.corrupt))
    own, falls = int(bound.answers[0]), clean - corrupt
    found = usual(model, one.pairs[0].clean, clean.topk(min(20, len(clean))).indices.tolist())
    rivals = {i: t for i, t in found.items() if i != own}
    if not rivals or float(clean[own] - clean[next(iter(rivals))]) > math.log(_HARDLY):
        return None
    named = [f"“{_seen(t)}” {share(float(clean[i].exp()))}" for i, t in list(rivals.items())[:3]]
    text = f"“{answer}” is hardly preferred: {share(float(clean[own].exp()))} against {', '.join(named)}"
    likely = [i for i in rivals if float(clean[own] - clean[i]) < math.log(10) and rivals[i].strip()]
    most = max(likely, key=lambda i: float(falls[i]), default=None)
    if most is not None and float(falls[most]) > max(MATERIAL, float(falls[own])):
        return Doubt(text, {"target": rivals[most].strip()})
    first = next((t.strip() for t in rivals.values() if t.strip() and t.strip().lower() != answer.lower()), None)
    return Doubt(text, {"foil": first} if first is not None else {})


def _verdicts(one: Task) -> list[Verdict]:
    """Compare the answer with the known truth."""
    truth, answer = one.truth, one.pairs[0].answer.strip()
    if truth is None:
        return []
    if truth.answer is None:
        return [Verdict("no known truth for this answer", None, truth.note)]
    said = truth.answer.lower() == answer.lower()
    return [Verdict("agrees with the known truth" if said else "contradicts the known truth", said, truth.note)]


def _words(model: Model, pair: Pair) -> tuple[str, str]:
    """Answer and foil as they are; in the case in which the sentences write them, if that is the same token."""
    written = {w.lower(): w for w in re.findall(r"\w+", f"{pair.corrupt} {pair.clean}")}
    said = [_seen(w) for w in (pair.answer, pair.foil)]
    forms = [w.replace(w.strip(), written.get(w.strip().lower(), w.strip())) for w in (pair.answer, pair.foil)]
    rows = [next_tokens(model, [pair.clean] * 2, texts) for texts in ((pair.answer, pair.foil), forms)]
    same = [a == b for a, b in zip(*rows, strict=True)]
    answer, foil = (f.strip() if one and f.strip() else t for t, f, one in zip(said, forms, same, strict=True))
    return answer, foil


def _seen(text: str) -> str:
    """Return a word without the space before it; invisible text is written as Python writes it."""
    return text.strip() if text.strip() and text.strip().isprintable() else repr(text)
