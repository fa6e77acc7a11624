"""Claims of an explanation, read off its numbers.

Each claim names its control, and none is made that its interval or its control's band does not support, that would be
true of any model, or where the counterfactual changes the odds by less than a factor of e (as in a random
model).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from cutaway.circuits.certify import Certificate
from cutaway.circuits.faithfulness import Faithfulness
from cutaway.core.result import Result
from cutaway.interventions.effects import Effects
from cutaway.lenses.direct_attribution import DirectAttribution
from cutaway.lenses.logit_lens import LensCurve
from cutaway.patching.group import GroupEffect
from cutaway.suites.explanation import BEHIND, Claim, Predictions, Results
from cutaway.views.band import band

MATERIAL = 1.0  # logits, or nats, between clean and corrupt below which there is too little to explain
_ROLE = re.compile(r"((first|middle|last) )?(subject|changed)|first|before|next|further|last|@-?\d+")  # of positions


def measured(result: Result) -> str:
    """Return the field of the measured effects: `exact` where `effect` holds estimates."""
    return "exact" if "exact" in result.tensors() else "effect"


def standing_out(result: Result, most: int = 3, positive: bool = True, ranked: bool = True) -> list[dict[str, Any]]:
    """Return the largest measured entries whose interval excludes zero and which lie outside the control's band, each
    with its band.

    The band is the one that pictures mark by: pooled over the cells where samples are few. If `ranked`, no entry is
    listed that lies inside the band of another that is; else each is held against its own alone. Without an interval (a
    single prompt) only the control decides.
    """
    fields, name, sign = result.tensors(), measured(result), 1 if positive else -1
    interval, null = (f"{name}_{kind}" if name == "exact" else kind for kind in ("interval", "null"))
    axes, effect = result.axes()[name], fields[name].float()
    shape = dict(zip(axes, effect.shape, strict=True))
    drawn = band(fields[null].float(), result.axes()[null], shape, "control")
    bands = torch.stack([drawn.low, drawn.high], -1).reshape(-1, 2)
    intervals, values = fields[interval].reshape(-1, 2), effect.reshape(-1)
    gap = fields.get("recovered") is not None and result.facts().get("gap")
    out, widest = list[dict[str, Any]](), 0.0
    for flat in (sign * values).nan_to_num(-math.inf).argsort(descending=True).tolist():
        value, (low, high) = float(values[flat]), intervals[flat].tolist()
        reach = max(widest if ranked else 0.0, float(bands[flat].abs().max()))
        if not sign * value > reach or (low == low and low <= 0 <= high):
            continue
        at = torch.unravel_index(torch.tensor(flat), effect.shape)
        row = {a: result.labels[a][int(i)] if a in result.labels else int(i) for a, i in zip(axes, at, strict=True)}
        if gap:
            row["recovered"] = value / gap
        out.append(row | {"effect": value, "interval": [low, high], "band": reach, "at": [int(i) for i in at]})
        widest = reach
        if len(out) == most:
            break
    return out


def claims_of(
    words: tuple[str, str], found: Results, proposed: bool, first: tuple[str, str] | None = None
) -> list[Claim]:
    """Return a claim, supported or not, about each result that is there.

    `words` are answer and foil, and `first` the tokens that they begin with, of which alone lenses speak. `proposed`
    says that neither the foil nor the counterfactual was the user's.
    """
    (answer, foil), (one, other) = words, first or words
    claims = [_predicted(found["predictions"], answer)]
    claims += [_depth(found["depth"], one)] if "depth" in found else []
    claims += [_written(found["writers"], one, other)] if "writers" in found else []
    claims += [_placed(found["resid_pre"])] if "resid_pre" in found else []
    claims += [_carried(found["heads"])] if "heads" in found else []
    claims += [_together(found["together"])] if "together" in found else []
    claims += (
        [_circuit(found["carried"], found["certificate"])] if "carried" in found and "certificate" in found else []
    )
    claims = [replace(c, method=_method(found, c.about)) for c in claims]
    heads = found.get("heads")
    if heads is None:
        return claims
    if (gap := _gap(heads)) < MATERIAL:
        unit = heads.units["effect"]
        text = f"The counterfactual takes “{answer}” back against “{foil}” by {gap:.2f} {unit} on average"
        least = f"{MATERIAL:.0f} {unit.removesuffix('s')}"
        small = Claim("the difference itself", text, f"a factor of e in the odds: {least}", False)
        return [small, *(replace(c, supported=False) for c in claims)]
    if "effect" in heads.reasons:  # where a sentence has no siblings
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
        text = f"The model says “{answer}” next with probability {share(now)}"
    else:
        first = f"“{p.labels['token'][0]}” ({share(float(p.probability[0]))})"
        text = f"The model gives “{answer}” probability {share(now)}; its first choice is {first}"
    low, high = (math.log(max(x, 1e-30) / max(1 - x, 1e-30)) for x in (after, now))
    return Claim("the prediction", text, f"after the counterfactual: {share(after)}", high - low >= MATERIAL)


def _depth(d: LensCurve, answer: str) -> Claim:
    rank, p, bounds = d.rank, d.probability, d.interval
    null = float(d.null.max())
    control, low = f"rotated bases: {_most(null)}", torch.where(bounds[:, 0].isnan(), p, bounds[:, 0])
    lasting = [i for i in range(len(rank)) if bool((rank[i:] == 0).all())]
    if not lasting:
        last = f"{share(float(p[-1]))}{_bounds(bounds[-1], share)}"
        text = f"“{answer}” leads in the lens at no depth for good (probability at the end {last})"
        return Claim("the depth", text, control, float(low[-1]) > null)
    i = lasting[0]
    if i == len(rank) - 1 and len(rank) > 1:  # the model's own prediction leads there in any model
        return Claim("the depth", f"“{answer}” leads in the lens at the end alone", control, False)
    where = "already in the embedding" if i == 0 else f"from block {d.labels['layer'][i]} on"
    text = (
        f"“{answer}” leads in the lens {where}, there with probability {share(float(p[i]))}{_bounds(bounds[i], share)}"
    )
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
    labels, last, rows = e.labels, len(e.labels["position"]) - 1, standing_out(e, most=10**6, ranked=False)
    recovered = e.tensors()["recovered"]
    control = "random steps of equal length"
    late = [i for i in range(len(recovered)) if bool((recovered[i:, -1] > 0.5).all())]
    here = next((r for r in rows if late and r["at"] == [late[0], last]), None)
    if here is None or last in (e.changed or ()) or late[0] in (0, len(recovered) - 1):
        text = "No layer but the last reads the difference at the last token"
        return Claim("the positions", text, control, False)
    gap = abs(_gap(e))
    before = max((r for r in rows if r["at"][0] == late[0] - 1), key=lambda r: r["recovered"], default=None)
    back = f"{share(here['recovered'])}{_bounds([x / gap for x in here['interval']], share)}"
    where = (
        f"From layer {labels['layer'][late[0]]} on the difference sits at {_at(labels['position'][-1])}, the last token"
    )
    text = f"{where} (restoring it there brings back {back})"
    if before is not None and before["at"][1] != last:
        text += f"; a layer before, most of it is at {_at(before['position'])}"
    return Claim("the positions", text, f"{control}: {_most(here['band'] / gap)}", True)


def _carried(h: Effects) -> Claim:
    rows = standing_out(h)
    if not rows:
        return Claim("the heads", "No head stands out", "random steps of equal length", False)
    gap = abs(_gap(h))
    shares = [f"{share(r['recovered'])}{_bounds([x / gap for x in r['interval']], share)}" for r in rows]
    parts = ", ".join(f"{r['layer']}.{r['head']} ({part})" for r, part in zip(rows, shares, strict=True))
    most = "the heads that bring back most are"
    if measured(h) == "exact":
        count = int(h.tensors()["exact"].isfinite().sum())
        most = f"of {count} heads measured (chosen by first-order estimates of all {h.effect.numel()}), {most}"
    text = f"Restored one at a time, {most} {parts}"
    return Claim("the heads", text, f"random steps of equal length: {_most(rows[-1]['band'] / gap)}", True)


def _together(g: GroupEffect) -> Claim:
    recovered, gap = float(g.recovered), _gap(g)
    null = g.null / gap
    heads = ", ".join(str(c).removeprefix("z.") for c in g.labels["component"])
    low, high = sorted(-float(x) / gap for x in g.interval)
    taken = f"{share(-recovered)}{_bounds((low, high), share)}"
    text = f"Exchanging {heads} together takes away {taken} of the difference, in sentences that did not choose them"
    control = f"{len(null)} random sets of as many heads: {share(-float(null.max()))} to {share(-float(null.min()))}"
    return Claim("the heads together", text, control, recovered < float(null.min()) and low > 0)


def _circuit(c: Faithfulness, certificate: Certificate) -> Claim:
    """Of edges that other sentences chose: what they carry with all others cut, and what cutting fewer shows."""
    carried, null, count, every = float(c.faithfulness[0]), float(c.null[0].max()), int(c.edges[0]), int(c.edges[-1])
    kept = f"{share(carried)}{_bounds(c.interval[0], share)}"
    text = (
        f"{count} of {every:,} edges ({share(count / every)}) carry {kept} of it, in sentences that did not choose them"
    )
    chance = f"{len(c.null[0])} random circuits of equal size: {_most(null)}"
    return Claim("the circuit", f"{text}; {certified(certificate)}", chance, float(c.interval[0, 0]) > max(null, 0.0))


def certified(c: Certificate) -> str:
    """Return the level of a certificate in words, with the deviation that decides it."""
    at = {"C": 0, "A": 4, "none": 4}.get(c.level, 1 + int(c.deviation[1:4].argmax()))
    off = f"off by {share(float(c.deviation[at]))}{_bounds(c.interval[at], share)} (“{c.labels['test'][at]}”)"
    return f"no certificate: {off}" if c.level == "none" else f"certificate level {c.level}: {off}"


def _method(found: Results, about: str) -> str:
    """Return the method that made the result behind a claim, as its record has it; empty without one."""
    if about not in BEHIND:
        return ""
    results: dict[str, Any] = {**found}
    return results[BEHIND[about][0]].record["method"]


def _gap(e: Effects | GroupEffect) -> float:
    """Return the mean of clean − corrupt, which every exchange between the two runs measures."""
    assert e.gap is not None
    return e.gap


def share(p: float) -> str:
    """Return a probability or share in per cent."""
    if abs(p) < 0.0005:
        return "0 %" if p == 0 else "under 0.1 %"
    return (f"{100 * p:.1f} %" if abs(p) < 0.1 else f"{100 * p:.0f} %").replace("-", "−")


def _most(p: float) -> str:
    """Return the reach of a control as a share."""
    said = share(p)
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
