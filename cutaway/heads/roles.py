"""Which heads move the answer's name to the end, and which tell them what to move?

The roles of heads on a task whose prompts say their answer and their foil, as in "When Mary and John went to the store,
John gave a drink to" (Wang et al. 2023, arXiv:2211.00593). A role is a row of `heads.task_roles`: from where a head of
that role looks to where, and whether it then raises the answer over the foil.

* `score[role, layer, head]`: attention from the role's query to its keys, mean over prompts; `interval`: 95 %, over
  prompts. Control (`null`): as many other tokens of the prompt that the query may look at, drawn at random, without the
  first token, where attention rests (in prompts too short for this, any tokens but the first).
* `direct[layer, head]`: the head's share of logit(answer) − logit(foil) at the end, the final norm's scale held;
  `direct_null`: of random pairs of tokens.
* `grown[layer, head]`: what `direct` gains when the name movers are removed, the norm's scale held at its value before,
  so that only what the head itself writes counts; `grown_null`: when random sets of other heads are.
* `claimed[role, layer, head]`: 1 where the interval of `score` lies above `least` and above the band of the null, and:
  a name mover raises the answer (`direct` beyond 0 and its band), a negative name mover lowers it, a foil suppressor
  looks at the foil and raises the answer over it; a backup name mover is another head that writes the answer more
  without those (`grown` beyond 0 and its band, and it then raises the answer); an S-inhibition head looks at the repeat
  from the end, below the name mover of the largest direct effect (without a name mover none is claimed); a subject head
  looks at the subject, where that is neither answer nor foil, and raises the answer (Chughtai et al. 2024,
  arXiv:2402.07321). Bands of effects are as wide as chance needs among the heads that pass by attention.
* `change[role]`: the metric's change when all heads of a role are removed at once. `looks[role]`: the change of the
  name movers' attention to the answer over the foil, which S-inhibition heads steer. Control (`change_null`,
  `looks_null`): random sets of other heads, as many of each layer where enough are left (the record
  says how they are matched).
* `how`: what stands in for a removed head: its mean z over the tokens (first and special tokens left in place), its
  value in the corrupt prompt, or zeros.
* Assumption: attention and direct effects claim, on the same prompts that `change` and `looks` are then measured on.
  They were not chosen for these, but other prompts make a fairer test: `patching.group` with the heads by name.
* Known failures: a head that looks at a name need not read it there, and one that raises it through later layers has
  no direct effect. Random sets may hold heads of the same role. Names are found by the text of a token: of names of
  several tokens only the first is looked for (`task.narrow`).
* Equivalences (tests): `direct` is the heads' part of `lenses.direct_attribution`; `change` at means is that of
  `patching.group`.
* Cost: 5 forwards, one a random set without movers, and two a role and random set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, layer_band, mean_interval, one_prompt
from cutaway.heads.task_roles import BACKUP, INHIBITION, MOVER, NAMES, ROLES, SUPPRESSOR, Looks, looks
from cutaway.heads.types import check_least, ranked
from cutaway.interventions.ablation_values import Removal, removal
from cutaway.interventions.components import RandomSets, all_components, components, random_heads
from cutaway.models.access.reading import Measure, Seen
from cutaway.models.anatomy.residual import Stream, check_sum, last_stream, logit_shares
from cutaway.models.dry import some
from cutaway.models.edits.edit import Edit
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task

_ATTENTION, _LOGITS = ("score", "interval", "null", "looks", "looks_interval", "looks_null"), ("direct", "grown")
_UNITS = {
    **dict.fromkeys(_ATTENTION, "attention"),
    **{f"{n}{part}": "logits" for n in _LOGITS for part in ("", "_interval", "_null")},
    "removed": "heads",
}
_NO_MOVER = "no name mover is claimed"


@dataclass(frozen=True, kw_only=True)
class HeadRoles(Result, kind="head_roles"):
    """Roles of every attention head on a task, and what the heads of each role do together.

    Attributes:
        score: the mean attention from the role's query to its keys.
        interval: of `score`, 95 %, over prompts.
        null: attention to as many tokens at random.
        claimed: 1 for a head that has a role, 0 for others.
        direct: the head's share of logit(answer) − logit(foil).
        grown: what that share gains without the name movers.
        change: the metric's change without the heads of a role.
        looks: the change of the name movers' attention to the answer over the foil without these heads.
        removed: number of heads of each role.
    """

    score: Float[Tensor, "role layer head"]
    interval: Float[Tensor, "role layer head bound"]
    null: Float[Tensor, "role layer head sample"]
    claimed: Float[Tensor, "role layer head"]
    direct: Float[Tensor, "layer head"]
    direct_interval: Float[Tensor, "layer head bound"]
    direct_null: Float[Tensor, "layer head sample"]
    grown: Float[Tensor, "layer head"]
    grown_interval: Float[Tensor, "layer head bound"]
    grown_null: Float[Tensor, "layer head sample"]
    change: Float[Tensor, "role"]
    change_interval: Float[Tensor, "role bound"]
    change_null: Float[Tensor, "role sample"]
    looks: Float[Tensor, "role"]
    looks_interval: Float[Tensor, "role bound"]
    looks_null: Float[Tensor, "role sample"]
    removed: Int[Tensor, "role"]

    def named(self, name: str) -> list[str]:
        """Return the heads that have a role, as `layer.head`, the largest scores first.

        Raises:
            Refused: no such role.
        """
        one = self.select(role=name)
        return ranked(one.claimed[0], one.score[0], self.labels["layer"])


@method(
    answers="Which heads move the answer's name to the end, and which tell them what to move?",
    paper="Wang et al. 2023, arXiv:2211.00593",
    cost="prompts * (6 + sample + 2 * role * (1 + sample)) * F",
    control="random_tokens",
    rung="interventional",
)
def roles(
    model: Model,
    task: Task,
    /,
    *,
    movers: tuple[str, ...] = (),
    least: float = 0.3,
    how: Literal["mean", "corrupt", "zero"] = "mean",
    samples: int = 8,
    seed: int = 0,
) -> HeadRoles:
    """Find the heads of every role on a task, and remove those of each role at once.

    Args:
        movers: these heads (`9.6,9.9`) are the name movers, in place of the claimed ones.
        least: attention that a head must give to a role's keys to be claimed.
        how: what stands in for a removed head.
        samples: how many random draws of tokens, pairs of tokens and sets of heads make the nulls.
        seed: of these.

    Raises:
        Refused: a share that no head can pass, no such head, prompts that say no answer, foil or subject, a metric of
            whole answers, or a model without exact sum or attention.
    """
    check_least("roles", least)
    bound = task.bind(model)
    if bound.steps is not None:
        what = f"roles of heads on task {task.name!r}"
        raise Refused(what, "its prompts run with their answers behind them", "use a metric of the next token")
    check_sum(model)
    heads, given = all_components(model, mlps=False), components(model, movers) if movers else []
    places = looks(model, bound, samples, seed)
    if not bool(places.there.any()):
        why = "no prompt says its answer, its foil or a subject before its end"
        raise Refused(f"roles of heads on task {task.name!r}", why, "use prompts about names that they say, as in ioi")
    found = _Evidence(model, bound, heads, places, samples, seed)
    claimed, r = found.claims(least, given), removal(model, bound, heads, how, seed)
    moves, backups = claimed[NAMES.index(MOVER)], NAMES.index(BACKUP)
    grown, growth, none = found.growth(r, moves)
    claimed[backups] &= found.backups(grown, growth["grown_null"], claimed[backups] & ~moves)
    joint, why, matched = _removed(found, r, claimed)
    named = {n: [f"{a.layer}.{a.unit}" for a in found.chosen(c)] for n, c in zip(NAMES, claimed, strict=True)}
    return HeadRoles(
        **found.fields(),
        **growth,
        **joint,
        claimed=claimed.float(),
        removed=claimed.flatten(1).sum(1),
        labels={"role": NAMES, "layer": found.layers, "bound": BOUNDS},
        units=_UNITS | {f"change{part}": bound.unit for part in ("", "_interval", "_null")},
        reasons=_reasons(places, why, none, bool(moves.any())) | one_prompt(len(bound), "score", "direct"),
        record=r.record()
        | {"prompts with the keys": dict(zip(NAMES, places.there.sum(0).tolist(), strict=True))}
        | {"heads": {n: some for n, some in named.items() if some}, "random sets": matched},
    )


def _reasons(places: Looks, why: dict[str, str], none: str, movers: bool) -> dict[str, str]:
    """Return why roles and fields have no number, interval or null."""
    few = {n: int(k) for n, k in zip(NAMES, places.there.sum(0).tolist(), strict=True) if k < 2}
    out = why | {n: "one prompt has such places" if k else "no prompt has such places" for n, k in few.items()}
    empty = places.there.any(0) & ~places.keys[:, :, 1:].any(-1).any(0).all(-1)
    out |= {n: "no prompt has as many tokens" for n, e in zip(NAMES, empty.tolist(), strict=True) if e}
    out |= {"score": "roles without places say so"} if few or bool(empty.any()) else {}
    out |= {"change": "roles without heads or random sets say so"} if why else {}
    out |= {"grown": none} if none else {}
    return out | (
        {} if movers else {"looks": _NO_MOVER, INHIBITION: out[INHIBITION] if INHIBITION in few else _NO_MOVER}
    )


class _Evidence:
    """Attention and direct effects of every head.

    Attributes:
        attention: attention to the keys of every role and draw.
        direct: each head's share of logit(answer) − logit(foil).
        direct_null: its share of the difference between random tokens, mean over prompts.
    """

    attention: Float[Tensor, "prompt role draw layer head"]
    direct: Float[Tensor, "prompt layer head"]
    direct_null: Float[Tensor, "layer head sample"]

    def __init__(
        self, model: Model, bound: Bound, heads: list[Address], places: Looks, samples: int, seed: int
    ) -> None:
        self.model, self.bound, self.heads, self.places = model, bound, heads, places
        self.samples, self.seed = samples, seed
        self.layers = list(dict.fromkeys(a.layer or 0 for a in heads))
        self.attention = places.read(model, bound, self.layers)
        g = generator(seed)
        drawn = torch.randint(model.shape.d_vocab, (2, samples, len(bound)), generator=g).to(bound.answers.device)
        self.stream = last_stream(model, bound.clean)
        self.direct = self._shares(self.stream, bound.answers[None], bound.foils[None])[0]
        self.direct_null = self._shares(self.stream, drawn[0], drawn[1]).mean(1).movedim(0, -1)

    def _shares(
        self, stream: Stream, answers: Int[Tensor, "pair prompt"], foils: Int[Tensor, "pair prompt"]
    ) -> Float[Tensor, "pair prompt layer head"]:
        """Return the shares of all heads of a run, with the final norm's scale of the run without removals."""
        names, shares, _ = logit_shares(self.model, replace(stream, scale=self.stream.scale), answers, foils)
        at = [names.index(f"head_out.{a.layer}.{a.unit}") for a in self.heads]
        return shares[..., at].cpu().unflatten(-1, (len(self.layers), -1))

    def chosen(self, where: Bool[Tensor, "layer head"]) -> list[Address]:
        """Return the heads at which a mask is True."""
        return [a for a, there in zip(self.heads, where.flatten().tolist(), strict=True) if there]

    def fields(self) -> dict[str, Any]:
        """Return the fields of attention and direct effects."""
        own, chance = self.attention[:, :, 0], self.attention[:, :, 1:].movedim(2, -1)
        there = [self.places.there[:, r].cpu() for r in range(len(ROLES))]
        each = [own[some, r] for r, some in enumerate(there)]
        return {
            "score": torch.stack([x.mean(0) for x in each]),
            "interval": torch.stack([mean_interval(x, within=(0.0, 1.0)) for x in each]),
            "null": torch.stack([chance[some, r].nanmean(0) for r, some in enumerate(there)]),
            "direct": self.direct.mean(0),
            "direct_interval": mean_interval(self.direct),
            "direct_null": self.direct_null,
        }

    def claims(self, least: float, given: Sequence[Address]) -> Bool[Tensor, "role layer head"]:
        """Return the heads that have each role by attention and direct effect; backups by attention alone.

        Name movers are the given ones, if there are any.
        """
        found = self.fields()
        band = torch.stack([layer_band(x)[1] for x in found["null"]])
        claimed = found["interval"][..., 0] > band.clamp_min(least)
        low, high = found["direct_interval"].unbind(-1)
        for r, row in enumerate(ROLES):
            if row.writes:
                least_of, most = layer_band(self.direct_null, int(claimed[r].sum()))
                claimed[r] &= low > most.clamp_min(0) if row.writes > 0 else high < least_of.clamp_max(0)
        if given:
            claimed[NAMES.index(MOVER)] = torch.tensor([a in given for a in self.heads]).reshape(band.shape[1:])
        movers = torch.where(claimed[NAMES.index(MOVER)], found["direct"], -math.inf)
        first = int(movers.argmax()) // movers.shape[1] if bool(movers.isfinite().any()) else 0
        claimed[NAMES.index(INHIBITION), first:] = False
        return claimed

    def growth(
        self, r: Removal, movers: Bool[Tensor, "layer head"]
    ) -> tuple[Float[Tensor, "prompt layer head"], dict[str, Any], str]:
        """Return what direct effects gain without the movers, per prompt and as fields, and why a null is missing."""
        answers, foils = self.bound.answers[None], self.bound.foils[None]

        def gained(places: Sequence[Address]) -> Float[Tensor, "prompt layer head"]:
            edits = [r.edit(a) for a in places]
            return self._shares(last_stream(self.model, self.bound.clean, edits=edits), answers, foils)[0] - self.direct

        gone, why = self.chosen(movers), _NO_MOVER
        grown, null = torch.full_like(self.direct, math.nan), torch.full_like(self.direct_null, math.nan)
        if gone:
            grown, random = gained(gone), self.random(gone)
            why = random.why
            for s, places in enumerate(some(random.sets)):
                drawn = torch.tensor([a in places for a in self.heads]).reshape(null.shape[:2])
                null[..., s] = gained(places).mean(0).masked_fill(drawn, math.nan)
        return grown, {"grown": grown.mean(0), "grown_interval": mean_interval(grown), "grown_null": null}, why

    def backups(
        self,
        grown: Float[Tensor, "prompt layer head"],
        null: Float[Tensor, "layer head sample"],
        asked: Bool[Tensor, "layer head"],
    ) -> Bool[Tensor, "layer head"]:
        """Return those of the heads asked that write the answer more without the movers, and then raise it."""
        (more, then), cells = (mean_interval(x)[..., 0] for x in (grown, self.direct + grown)), int(asked.sum())
        lifts = then > layer_band(self.direct_null, cells)[1].clamp_min(0)
        return asked & lifts & (more > layer_band(null, cells)[1].clamp_min(0))

    def random(self, places: Sequence[Address]) -> RandomSets:
        """Return random sets of other heads, the same at every call."""
        return random_heads(self.heads, places, self.samples, self.seed)


def _removed(
    found: _Evidence, r: Removal, claimed: Bool[Tensor, "role layer head"]
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Return the fields of joint removals, why some roles have none, and how the others' random sets are matched."""
    sets, why, variants, at = dict[str, list[Address]](), dict[str, str](), list[list[Edit]](), dict[str, int]()
    matched = dict[str, str]()
    for name, where in zip(NAMES, claimed, strict=True):
        sets[name] = found.chosen(where)
        random = found.random(sets[name]) if sets[name] else RandomSets([], "", "no head is claimed to have it")
        if random.why:
            why[name] = random.why
            continue
        matched[name], at[name] = random.matched, len(variants)
        variants += [[r.edit(a) for a in places] for places in (sets[name], *random.sets)]
    fields, samples = dict[str, Tensor](), found.samples
    for field, measure in (("change", found.bound.measure), ("looks", _looks(found, sets[MOVER]))):
        value, null = torch.full((len(NAMES),), math.nan), torch.full((len(NAMES), samples), math.nan)
        interval = torch.full((len(NAMES), 2), math.nan)
        if measure is not None and variants:
            each = sweep(found.model, found.bound.clean, [[], *variants], measure).float().cpu()
            each = (each[1:] - each[0])[:, each[0].isfinite()]  # [variant prompt]
            for name, i in at.items():
                k = NAMES.index(name)
                value[k], null[k] = each[i].mean(), each[i + 1 : i + 1 + samples].mean(1)
                interval[k] = mean_interval(each[i])
        fields |= {field: value, f"{field}_interval": interval, f"{field}_null": null}
    return fields, why, matched


def _looks(found: _Evidence, movers: list[Address]) -> Measure | None:
    """Return the movers' attention to the answer over the foil as a measurement; None without movers or names."""
    own = found.places.own(MOVER, SUPPRESSOR)
    if not movers or not bool(own.there.all(1).any()):
        return None
    layers = sorted({a.layer or 0 for a in movers})
    whole, layer, unit = own.measure(layers), [layers.index(a.layer or 0) for a in movers], [a.unit for a in movers]

    def steered(seen: Seen, prompt: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        x = whole(seen, prompt).reshape(len(prompt), 2, len(layers), -1)
        return (x[:, 0] - x[:, 1])[:, layer, unit].mean(1)

    return Measure(steered, whole.reads)
