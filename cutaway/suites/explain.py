"""Why did the model go on with one word and not another?

One sentence is made a task (a counterfactual of equal length is proposed, siblings of the same form give intervals),
and five methods are asked: what it predicts, where along depth the answer appears, which components write it, which
positions and heads carry it, and whether those heads carry it together (on siblings that did not choose them).
`Claim`s are then read off the numbers: each names its control, and none is made that its interval or its control's band
does not support, that would be true of any model, or where the counterfactual changes the odds by less than a factor
of e (as in a model that nobody trained). An answer that the model hardly prefers is called so first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Required, TypedDict, cast

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway import lenses, patching, tasks
from cutaway.core.finite import finite
from cutaway.core.method import METHODS
from cutaway.core.record import Cost, counting
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.rung import Rung
from cutaway.interventions.effects import Effects
from cutaway.lenses.direct_attribution import DirectAttribution
from cutaway.lenses.lens_grid import LensGrid
from cutaway.lenses.logit_lens import LensCurve
from cutaway.models.model import Model
from cutaway.patching.group import GroupEffect
from cutaway.tasks.answers import next_tokens
from cutaway.tasks.pair import Pair
from cutaway.tasks.replacements import usual
from cutaway.tasks.task import Task
from cutaway.views.band import band

Effort = Literal["quick", "normal", "thorough"]
#: effort → sentences of the form, random samples of a null
EFFORTS: dict[str, tuple[int, int]] = {"quick": (6, 1), "normal": (8, 3), "thorough": (32, 10)}
UNSUPPORTED = "Not claimed, because interval or control do not support it"
#: what a claim is about → the method whose numbers it reads
BEHIND = {
    "the depth": "lenses.logit_lens",
    "the writers": "lenses.direct_attribution",
    "the positions": "patching.activation",
    "the heads": "patching.activation",
    "the heads together": "patching.group",
}
_HELD = 2  # sentences apart from those that chose the heads, below which nothing is claimed of the heads together
_HARDLY = 2.0  # times as likely as the next word, below which an answer is hardly preferred
_MATERIAL = 1.0  # logits between clean and corrupt below which there is too little to explain
_ROLE = re.compile(r"((first|middle|last) )?(subject|changed)|first|before|next|further|last|@-?\d+")  # of positions
_LARGE = 20_000_000  # parameters beyond which the default effort is quick


@dataclass(frozen=True, kw_only=True)
class Predictions(Result, kind="predictions"):
    """The most likely next words, and the same words after the corrupt prompt.

    Attributes:
        probability: the probability of each word after the clean prompt.
        after_corrupt: the same after the corrupt prompt.
        answer: the index of the answer among the words.
        foil: the index of the foil.
        rank: the number of words that are likelier than the answer.
    """

    probability: Float[Tensor, "token"]
    after_corrupt: Float[Tensor, "token"]
    answer: int
    foil: int
    rank: int


class Results(TypedDict, total=False):
    """Results of each method over the sentence and its siblings; `together` only if heads stood out."""

    predictions: Required[Predictions]
    depth: Required[LensCurve]
    grid: Required[LensGrid]
    writers: Required[DirectAttribution]
    neurons: Required[DirectAttribution]
    resid_pre: Required[Effects]
    attn_out: Required[Effects]
    mlp_out: Required[Effects]
    heads: Required[Effects]
    heads_noise: Required[Effects]
    together: GroupEffect


class Own(TypedDict):
    """The same on the sentence alone, where that is worth a look."""

    writers: DirectAttribution
    resid_pre: Effects


@dataclass(frozen=True)
class Claim:
    """A sentence of the report.

    Attributes:
        about: the result that it is about.
        text: the sentence.
        control: its control, in words.
        supported: True if the effect differs from the control.
    """

    about: str
    text: str
    control: str
    supported: bool

    @property
    def rung(self) -> Rung:
        """The rung of the method behind the claim, whose words it may use; a claim without one is observational."""
        return METHODS[BEHIND[self.about]].rung if self.about in BEHIND else "observational"


@dataclass(frozen=True)
class Doubt:
    """An answer that is hardly the likeliest, and the options of the contrast that a reader may mean."""

    text: str
    instead: dict[str, str]


@dataclass(frozen=True)
class Verdict:
    """A comparison with the known truth.

    Attributes:
        text: the verdict in words.
        agrees: True or False, or None if the truth is not known.
        detail: the truth, in words.
    """

    text: str
    agrees: bool | None
    detail: str


@dataclass(frozen=True)
class Explanation:
    """Everything `explain` found. `own` are the results on the sentence alone, `results` those over its siblings."""

    model: str
    prompt: str
    answer: str
    foil: str
    corrupt: str
    corruption: str
    siblings: int
    results: Results
    own: Own
    claims: tuple[Claim, ...]
    verdicts: tuple[Verdict, ...]
    doubt: Doubt | None = None
    spent: Cost = field(default_factory=Cost)

    @property
    def summary(self) -> list[str]:
        """The supported claims as prose, with what could not be supported said last."""
        failed = [c.about for c in self.claims if not c.supported]
        lines = [f"{c.text} ({c.control})." for c in self.claims if c.supported]
        lines = [self.doubt.text, *lines] if self.doubt is not None else lines
        return lines + ([f"{UNSUPPORTED}: {', '.join(failed)}."] if failed else [])


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
    claims = tuple(_claims(words, results, foil is None and corrupt is None))
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
    named = [f"“{_seen(t)}” {_share(float(clean[i].exp()))}" for i, t in list(rivals.items())[:3]]
    text = f"“{answer}” is hardly preferred: {_share(float(clean[own].exp()))} against {', '.join(named)}"
    likely = [i for i in rivals if float(clean[own] - clean[i]) < math.log(10) and rivals[i].strip()]
    most = max(likely, key=lambda i: float(falls[i]), default=None)
    if most is not None and float(falls[most]) > max(_MATERIAL, float(falls[own])):
        return Doubt(text, {"target": rivals[most].strip()})
    first = next((t.strip() for t in rivals.values() if t.strip() and t.strip().lower() != answer.lower()), None)
    return Doubt(text, {"foil": first} if first is not None else {})


def standing_out(result: Result, most: int = 3, positive: bool = True) -> list[dict[str, Any]]:
    """Return the largest entries whose interval excludes zero and which lie outside the control's band, each with its
    band.

    The band is the one that pictures mark by: pooled over the cells where samples are few. No entry is listed that lies
    inside the band of another that is. Without an interval (a single prompt) only the control decides.
    """
    fields = result.tensors()
    axes, effect, sign = result.axes()["effect"], fields["effect"].float(), 1 if positive else -1
    shape = dict(zip(axes, effect.shape, strict=True))
    drawn = band(fields["null"].float(), result.axes()["null"], shape, "control")
    bands = torch.stack([drawn.low, drawn.high], -1).reshape(-1, 2)
    intervals = fields["interval"].reshape(-1, 2)
    out, widest = list[dict[str, Any]](), 0.0
    for flat in (sign * effect.reshape(-1)).argsort(descending=True).tolist():
        value, (low, high) = float(effect.reshape(-1)[flat]), intervals[flat].tolist()
        reach = max(widest, float(bands[flat].abs().max()))
        if sign * value <= reach or (low == low and low <= 0 <= high):
            continue
        at = torch.unravel_index(torch.tensor(flat), effect.shape)
        row = {a: result.labels[a][int(i)] if a in result.labels else int(i) for a, i in zip(axes, at, strict=True)}
        if "recovered" in fields:
            row["recovered"] = float(fields["recovered"].reshape(-1)[flat])
        out.append(row | {"effect": value, "interval": [low, high], "band": reach, "at": [int(i) for i in at]})
        widest = reach
        if len(out) == most:
            break
    return out


# --- claims


def _claims(words: tuple[str, str], found: Results, proposed: bool) -> list[Claim]:
    answer, foil = words
    claims = [_predicted(found["predictions"], answer), _depth(found["depth"], answer)]
    claims += [_written(found["writers"], answer, foil), _placed(found["resid_pre"]), _carried(found["heads"])]
    claims += [_together(found["together"])] if "together" in found else []
    gap = _gap(found["resid_pre"])
    if gap < _MATERIAL:
        text = f"The counterfactual takes “{answer}” back against “{foil}” by {gap:.2f} logits on average"
        small = Claim("the difference itself", text, f"a factor of e in the odds: {_MATERIAL:.0f} logit", False)
        return [small, *(replace(c, supported=False) for c in claims)]
    if "effect" in found["heads"].reasons:  # where a sentence has no siblings
        claims[1:] = [
            replace(c, control=f"{c.control}; of this sentence alone, so without an interval") for c in claims[1:]
        ]
    if proposed and not claims[0].supported:  # the foil moved it, and the user did not ask for that foil
        return [replace(c, supported=False) for c in claims]
    return claims


def _predicted(p: Predictions, answer: str) -> Claim:
    i = p.answer
    now, after = float(p.probability[i]), float(p.after_corrupt[i])
    if p.rank == 0:
        text = f"The model says “{answer}” next with probability {_share(now)}"
    else:
        first = f"“{p.labels['token'][0]}” ({_share(float(p.probability[0]))})"
        text = f"The model gives “{answer}” probability {_share(now)}; its first choice is {first}"
    low, high = (math.log(max(x, 1e-30) / max(1 - x, 1e-30)) for x in (after, now))
    return Claim("the prediction", text, f"after the counterfactual: {_share(after)}", high - low >= _MATERIAL)


def _depth(d: LensCurve, answer: str) -> Claim:
    rank, p, bounds = d.rank, d.probability, d.interval
    null = float(d.null.max())
    control, low = f"rotated bases: {_most(null)}", torch.where(bounds[:, 0].isnan(), p, bounds[:, 0])
    lasting = [i for i in range(len(rank)) if bool((rank[i:] == 0).all())]
    if not lasting:
        last = f"{_share(float(p[-1]))}{_bounds(bounds[-1], _share)}"
        text = f"“{answer}” leads in the lens at no depth for good (probability at the end {last})"
        return Claim("the depth", text, control, float(low[-1]) > null)
    i = lasting[0]
    if i == len(rank) - 1 and len(rank) > 1:  # the model's own prediction leads there in any model
        return Claim("the depth", "It leads in the lens at the end alone", control, False)
    where = "already in the embedding" if i == 0 else f"from block {d.labels['layer'][i]} on"
    text = f"It leads in the lens {where}, there with probability {_share(float(p[i]))}{_bounds(bounds[i], _share)}"
    return Claim("the depth", text, control, float(low[i]) > null)


def _written(w: DirectAttribution, answer: str, foil: str) -> Claim:
    rows = standing_out(w)
    if not rows:
        return Claim("the writers", "No component stands out", "random token pairs", False)
    parts = ", ".join(f"{r['component']} {r['effect']:+.1f}{_bounds(r['interval'])}" for r in rows)
    total = float(w.total.mean())
    null = rows[-1]["band"]
    mean = "on average" if len(w.total) > 1 else "in all"
    text = f"“{answer}” over “{foil}” ({total:+.1f} logits {mean}) is written mostly by {parts}"
    if total <= 0:
        text = f"“{answer}” is behind “{foil}” by {-total:.1f} logits {mean}; most for it is written by {parts}"
    elif sum(r["effect"] for r in rows) < total / 2:
        text = f"Of “{answer}” over “{foil}” ({total:+.1f} logits {mean}), what stands out is written by {parts}"
    return Claim("the writers", text, f"toward random token pairs: at most {null:.1f}", True)


def _placed(e: Effects) -> Claim:
    """From which layer on the difference sits at the last token: where it enters is the changed word in any model."""
    labels, last, rows = e.labels, len(e.labels["position"]) - 1, standing_out(e, most=10**6)
    recovered = e.tensors()["recovered"]
    control = "random steps of equal length"
    late = [i for i in range(len(recovered)) if bool((recovered[i:, -1] > 0.5).all())]
    here = next((r for r in rows if late and r["at"] == [late[0], last]), None)
    if here is None or last in (e.changed or ()) or late[0] in (0, len(recovered) - 1):
        text = "No layer but the last reads the difference at the last token"
        return Claim("the positions", text, control, False)
    gap = abs(_gap(e))
    before = max((r for r in rows if r["at"][0] == late[0] - 1), key=lambda r: r["recovered"], default=None)
    share = f"{_share(here['recovered'])}{_bounds([x / gap for x in here['interval']], _share)}"
    where = (
        f"From layer {labels['layer'][late[0]]} on the difference sits at {_at(labels['position'][-1])}, the last token"
    )
    text = f"{where} (restoring it there brings back {share})"
    if before is not None and before["at"][1] != last:
        text += f"; a layer before, most of it is at {_at(before['position'])}"
    return Claim("the positions", text, f"{control}: {_most(here['band'] / gap)}", True)


def _carried(h: Effects) -> Claim:
    rows = standing_out(h)
    if not rows:
        return Claim("the heads", "No head stands out", "random steps of equal length", False)
    gap = abs(_gap(h))
    shares = [f"{_share(r['recovered'])}{_bounds([x / gap for x in r['interval']], _share)}" for r in rows]
    parts = ", ".join(f"{r['layer']}.{r['head']} ({share})" for r, share in zip(rows, shares, strict=True))
    text = f"Restored one at a time, the heads that bring back most are {parts}"
    return Claim("the heads", text, f"random steps of equal length: {_most(rows[-1]['band'] / gap)}", True)


def _together(g: GroupEffect) -> Claim:
    recovered, gap = float(g.recovered), _gap(g)
    null = g.null / gap
    heads = ", ".join(str(c).removeprefix("z.") for c in g.labels["component"])
    low, high = sorted(-float(x) / gap for x in g.interval)
    taken = f"{_share(-recovered)}{_bounds((low, high), _share)}"
    text = f"Exchanging {heads} together takes away {taken} of the difference, in sentences that did not choose them"
    control = f"{len(null)} random sets of as many heads: {_share(-float(null.max()))} to {_share(-float(null.min()))}"
    return Claim("the heads together", text, control, recovered < float(null.min()) and low > 0)


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


def _gap(e: Effects | GroupEffect) -> float:
    """Return the mean of clean − corrupt, which every exchange between the two runs measures."""
    assert e.gap is not None
    return e.gap


def _share(p: float) -> str:
    """Return a probability or share in per cent."""
    if abs(p) < 0.0005:
        return "0 %" if p == 0 else "under 0.1 %"
    return (f"{100 * p:.1f} %" if abs(p) < 0.1 else f"{100 * p:.0f} %").replace("-", "−")


def _most(p: float) -> str:
    """Return the reach of a control as a share."""
    said = _share(p)
    return said if said.startswith("under") else f"at most {said}"


def _bounds(interval: Any, form: Callable[[float], str] = lambda v: f"{v:.1f}") -> str:
    low, high = (float(v) for v in interval)
    return "" if low != low else f" [{form(low)}, {form(high)}]".replace("-", "−")


def _at(label: str) -> str:
    """Return a position as a quoted word without the marks of repetition, or by its role where prompts have other
    words.
    """
    if _ROLE.fullmatch(str(label)):
        return f"the {label} token" if str(label) in ("first", "next", "last", "changed") else f"the {label}"
    return f"“{str(label).split('·')[0] or label}”"
