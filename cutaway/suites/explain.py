"""Why did the model go on with one word and not another?

One sentence is made a task (a counterfactual of equal length is proposed, siblings of the same form give intervals),
and five methods are asked: what it predicts, where along depth the answer appears, which components write it, which
positions and heads carry it, and whether those heads carry it together. `Claim`s are then read off the numbers: each
names its control, and none is made that its interval or control does not support, or where the counterfactual changes
the odds by less than a factor of e (as in a model that nobody trained).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Required, TypedDict, cast

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway import lenses, patching, tasks
from cutaway.core.finite import finite
from cutaway.core.record import Cost, counting
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.lenses.direct_attribution import DirectAttribution
from cutaway.lenses.lens_grid import LensGrid
from cutaway.lenses.logit_lens import LensCurve
from cutaway.models.model import Model
from cutaway.patching.activation import HeadEffects, PositionEffects
from cutaway.patching.group import GroupEffect
from cutaway.tasks.pair import Pair
from cutaway.tasks.task import Task

Effort = Literal["quick", "normal", "thorough"]
#: effort → siblings of the sentence, random samples of a null
EFFORTS: dict[str, tuple[int, int]] = {"quick": (4, 2), "normal": (8, 3), "thorough": (32, 10)}
_MATERIAL = 1.0  # logits between clean and corrupt below which there is too little to explain
_LARGE = 20_000_000  # parameters beyond which the default effort is quick


@dataclass(frozen=True, kw_only=True)
class Predictions(Result, kind="predictions"):
    """The most likely next words, and the same words after the corrupt prompt."""

    probability: Float[Tensor, "token"]
    after_corrupt: Float[Tensor, "token"]


class Results(TypedDict, total=False):
    """What each method found over the sentence and its siblings; `together` only if heads stood out."""

    predictions: Required[Predictions]
    depth: Required[LensCurve]
    grid: Required[LensGrid]
    writers: Required[DirectAttribution]
    neurons: Required[DirectAttribution]
    resid_pre: Required[PositionEffects]
    attn_out: Required[PositionEffects]
    mlp_out: Required[PositionEffects]
    heads: Required[HeadEffects]
    heads_noise: Required[HeadEffects]
    together: GroupEffect


class Own(TypedDict):
    """The same on the sentence alone, where that is worth a look."""

    writers: DirectAttribution
    resid_pre: PositionEffects


@dataclass(frozen=True)
class Claim:
    """One sentence read off the numbers, the control it stands beside, and whether the two differ."""

    about: str
    text: str
    control: str
    supported: bool


@dataclass(frozen=True)
class Verdict:
    """A comparison with the known truth: True agrees, False disagrees, None cannot be told."""

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
    spent: Cost = field(default_factory=Cost)

    @property
    def summary(self) -> list[str]:
        """The supported claims as prose, with what could not be supported said last."""
        failed = [c.about for c in self.claims if not c.supported]
        lines = [f"{c.text} ({c.control})." for c in self.claims if c.supported]
        return lines + ([f"Not told apart from their controls: {', '.join(failed)}."] if failed else [])


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
        step: told what is being done.

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
        many = tasks.with_siblings(model, one, siblings, seed)
        results, own = _measure(model, one, many, samples, seed, step)
    pair = one.pairs[0]
    claims = tuple(_claims(one, results))
    return Explanation(
        model.name, pair.clean, *_words(pair), pair.corrupt, one.corruption, len(many) - 1,
        results, own, claims, tuple(_verdicts(one, results)), spent,
    )  # fmt: skip


def _measure(
    model: Model, one: Task, many: Task, samples: int, seed: int, step: Callable[[str], None]
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
    if heads and 2 * len(heads) <= total:
        step("exchanging the found heads together")
        named = ",".join(f"{r['layer']}.{r['head']}" for r in heads)
        found["together"] = patching.group(model, many, heads=named, samples=5 * samples, seed=seed)
    return cast(Results, found), cast(Own, own)


def _predictions(model: Model, one: Task, n: int = 8) -> Predictions:
    bound = one.bind(model)
    clean, corrupt = (model.run_last(t)[0].float().softmax(-1) for t in (bound.clean, bound.corrupt))
    ids = clean.topk(min(n, len(clean))).indices
    asked = torch.stack([bound.answers[0], bound.foils[0]])
    ids = torch.cat([ids, asked[~torch.isin(asked, ids)]])
    answer, foil = ((ids == i).nonzero().item() for i in asked)
    return Predictions(
        probability=clean[ids].cpu(),
        after_corrupt=corrupt[ids].cpu(),
        labels={"token": _distinct(model.token_texts(ids))},
        units={"probability": "probability", "after_corrupt": "probability"},
        record={"no_interval": "the model's own probabilities of one sentence", "control": "the corrupt sentence",
                "corrupt": bound.corrupt.texts[0], "answer": answer, "foil": foil,
                "rank of the answer": int((clean > clean[asked[0]]).sum())},
    )  # fmt: skip


def _distinct(texts: list[str]) -> list[str]:
    seen = [t.strip() or repr(t) for t in texts]
    return [t if seen.count(t) == 1 else f"{t}·{n}" for n, t in enumerate(seen)]


def standing_out(result: Result, most: int = 3, positive: bool = True) -> list[dict[str, Any]]:
    """The largest entries whose interval excludes zero and whose effect exceeds every sample of their control.

    Without an interval (a single prompt) only the control decides.
    """
    out = []
    for row in result.top(10**6, by="effect", largest=positive):
        low, high = row["interval"]
        away = (low > 0 or high < 0) if low == low else True
        if row["effect"] * (1 if positive else -1) > 0 and away and abs(row["effect"]) > max(map(abs, row["null"])):
            out.append(row)
    return out[:most]


# --- claims


def _claims(one: Task, found: Results) -> list[Claim]:
    answer, foil = _words(one.pairs[0])
    claims = [_predicted(found["predictions"], answer), _depth(found["depth"], answer)]
    claims += [_written(found["writers"], answer, foil), _placed(found["resid_pre"]), _carried(found["heads"])]
    claims += [_together(found["together"])] if "together" in found else []
    gap = float(found["resid_pre"].record["clean − corrupt"])
    if gap >= _MATERIAL:
        return claims
    text = f"The counterfactual takes “{answer}” back against “{foil}” by {gap:.2f} logits on average"
    small = Claim("the difference itself", text, f"a factor of e in the odds: {_MATERIAL:.0f} logit", False)
    return [small, *(replace(c, supported=False) for c in claims)]


def _predicted(p: Predictions, answer: str) -> Claim:
    i = p.record["answer"]
    now, after = float(p.probability[i]), float(p.after_corrupt[i])
    if p.record["rank of the answer"] == 0:
        text = f"The model says “{answer}” next with probability {_share(now)}"
    else:
        first = f"“{p.labels['token'][0]}” ({_share(float(p.probability[0]))})"
        text = f"The model gives “{answer}” probability {_share(now)}; its first choice is {first}"
    return Claim("the prediction", text, f"after the counterfactual: {_share(after)}", now > after)


def _depth(d: LensCurve, answer: str) -> Claim:
    rank, p, bounds = d.rank, d.probability, d.interval
    null = float(d.null.max())
    lasting = [i for i in range(len(rank)) if bool((rank[i:] == 0).all())]
    if not lasting:
        text = f"“{answer}” is the top of the lens at no depth that lasts (last probability {_share(float(p[-1]))})"
        return Claim("the depth", text, f"rotated bases: at most {_share(null)}", float(p[-1]) > null)
    i = lasting[0]
    where = "already in the embedding" if i == 0 else f"from block {d.labels['layer'][i]} on"
    text = f"It leads in the lens {where}, there with probability {_share(float(p[i]))}{_bounds(bounds[i], _share)}"
    return Claim("the depth", text, f"rotated bases: at most {_share(null)}", float(p[i]) > null)


def _written(w: DirectAttribution, answer: str, foil: str) -> Claim:
    rows = standing_out(w)
    if not rows:
        return Claim("the writers", "No component stands out", "random token pairs", False)
    parts = ", ".join(f"{r['component']} {r['effect']:+.1f}{_bounds(r['interval'])}" for r in rows)
    total = float(w.total.mean())
    null = max(max(map(abs, r["null"])) for r in rows)
    text = f"“{answer}” over “{foil}” ({total:+.1f} logits in all) is written mostly by {parts}"
    if total <= 0:
        text = f"“{answer}” is behind “{foil}” by {-total:.1f} logits; most for it is written by {parts}"
    return Claim("the writers", text, f"toward random token pairs: at most {null:.1f}", True)


def _placed(e: PositionEffects) -> Claim:
    recovered, labels = e.recovered, e.labels
    rows = _carrying(e)
    early = [r for r in rows if r["layer"] == labels["layer"][0]]
    if not early:
        return Claim("the positions", "No position stands out", "random steps of equal length", False)
    first = max(early, key=lambda r: r["recovered"])
    last = labels["position"][-1]
    late = [i for i in range(len(recovered)) if bool((recovered[i:, -1] > 0.5).all())]
    moved = f", and from layer {labels['layer'][late[0]]} on it sits at the last token “{_bare(last)}”" if late else ""
    gap = float(e.record["clean − corrupt"])
    null = max(abs(x) for r in early for x in r["null"]) / abs(gap)
    place, share = _bare(first["position"]), _share(first["recovered"])
    text = f"The difference enters at “{place}” (restoring it there brings back {share})"
    return Claim("the positions", text + moved, f"random steps of equal length: at most {_share(null)}", True)


def _carrying(e: PositionEffects) -> list[dict[str, Any]]:
    """The places that stand out and carry more than a tenth of the difference: what is less may be rounding."""
    return [r for r in standing_out(e, most=10**6) if r["recovered"] > 0.1]


def _carried(h: HeadEffects) -> Claim:
    rows = standing_out(h)
    if not rows:
        return Claim("the heads", "No head stands out", "random steps of equal length", False)
    parts = ", ".join(f"{r['layer']}.{r['head']} ({_share(r['recovered'])})" for r in rows)
    null = max(abs(x) for r in rows for x in r["null"]) / abs(float(h.record["clean − corrupt"]))
    text = f"Restored one at a time, the heads that bring back most are {parts}"
    return Claim("the heads", text, f"random steps of equal length: at most {_share(null)}", True)


def _together(g: GroupEffect) -> Claim:
    recovered, gap = float(g.recovered), float(g.record["clean − corrupt"])
    null = g.null / gap
    heads = ", ".join(str(c).removeprefix("z.") for c in g.labels["component"])
    text = f"Exchanging {heads} together takes away {_share(-recovered)} of the difference"
    low, high = float(null.min()), float(null.max())
    control = f"{len(null)} random sets of as many heads: {_share(-high)} to {_share(-low)}"
    return Claim("the heads together", text, control, recovered < low)


def _verdicts(one: Task, found: Results) -> list[Verdict]:
    """What the known truth says about the answer and about the positions that must matter."""
    truth, pair = one.truth, one.pairs[0]
    if truth is None:
        return []
    answer = pair.answer.strip()
    if truth.answer is None:
        return [Verdict("no known truth for this answer", None, truth.note)]
    said = truth.answer.lower() == answer.lower()
    verdicts = [Verdict("agrees with the known truth" if said else "contradicts the known truth", said, truth.note)]
    rows = _carrying(found["resid_pre"])
    layers, positions = found["resid_pre"].labels["layer"], found["resid_pre"].labels["position"]
    subject = [i for i, p in enumerate(positions) if _is_changed(found["resid_pre"], i)]
    early = {positions.index(r["position"]) for r in rows if r["layer"] == layers[0]}
    late = {positions.index(r["position"]) for r in rows if r["layer"] == layers[-1]}
    right = bool(early) and early <= set(subject) and late >= {len(positions) - 1}
    changed = " and ".join(f"“{old}” → “{new}”" for old, new in dict.fromkeys(pair.changes()))
    detail = f"only {changed} tells the two sentences apart, and the answer is read at the last token"
    text = "positions agree with the known truth" if right else "positions do not agree with the known truth"
    return [*verdicts, Verdict(text, right, detail)]


def _words(pair: Pair) -> tuple[str, str]:
    """Answer and foil, in the case in which the sentences write them."""
    written = {w.lower(): w for w in re.findall(r"\w+", f"{pair.corrupt} {pair.clean}")}
    answer, foil = (w.strip() for w in (pair.answer, pair.foil))
    return written.get(answer.lower(), answer), written.get(foil.lower(), foil)


def _is_changed(e: PositionEffects, position: int) -> bool:
    return position in e.record["changed positions"]


def _share(p: float) -> str:
    """A probability or share in per cent."""
    if abs(p) < 0.0005:
        return "0 %" if p == 0 else "under 0.1 %"
    return f"{100 * p:.1f} %" if abs(p) < 0.1 else f"{100 * p:.0f} %"


def _bounds(interval: Any, form: Callable[[float], str] = lambda v: f"{v:.1f}") -> str:
    low, high = (float(v) for v in interval)
    return "" if low != low else f" [{form(low)}, {form(high)}]"


def _bare(label: str) -> str:
    """A position's label without the marks of repetition and variation."""
    return str(label).rstrip("*").split("·")[0] or str(label)
