"""Interchange interventions: a part of one prompt's activations is put into the run of another.

h ← h + (h_source − h) R Rᵀ, with R [width, rank] orthonormal (Geiger et al. 2023, arXiv:2303.02536). The base is the
corrupt prompt of a pair and the source its clean prompt, so that the counterfactual label is the pair's answer. Bases
run from the first layer and position that change, with gradients where they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Code, Keyword, Refused
from cutaway.core.stats import generator, mean_interval, share_interval
from cutaway.interventions.probes import accuracy_interval, mean_over_groups
from cutaway.models.access.reading import Measure, Seen, jointly
from cutaway.models.edits.library import Add
from cutaway.models.model import Model
from cutaway.models.sweep.partial_forward import Clean, clean_run, grow, restart
from cutaway.models.sweep.plan import can_grow, first_layer, room
from cutaway.tasks.bound import SPANS, Bound
from cutaway.tasks.task import Task

EVERY = "all"
OUTCOMES = ["margin", "top prediction", "beats the foil"]  # what `outcomes` measures
#: positions at which values are exchanged
POSITIONS = (*SPANS, EVERY)


@dataclass(frozen=True, eq=False)
class Exchange:
    """Pairs of prompts of one length, whose bases run again with values exchanged at one place.

    Attributes:
        model: the model.
        bound: the pairs.
        rows: their numbers among all pairs.
        place: the address.
        base: the activations of the bases there.
        where: the positions that are exchanged.
        step: source − base at these positions, 0 elsewhere.
        clean: the run of the bases, from which the others go on.
    """

    model: Model
    bound: Bound
    rows: tuple[int, ...]
    place: Address
    base: Float[Tensor, "pair position width"]
    where: Bool[Tensor, "pair position"]
    step: Float[Tensor, "pair position width"]
    clean: Clean

    @property
    def start(self) -> int:
        """The first position that changes."""
        return int(self.where.any(0).int().argmax())

    def run(self, change: Float[Tensor, "pair position width"]) -> Seen:
        """Run the bases with a change added at the place; gradients flow if they are enabled."""
        tokens, edit = self.bound.corrupt, Add(self.place, change, since=self.start)
        layer = first_layer(self.model, [edit])
        if not can_grow(self.model, tokens):
            return restart(self.model, tokens, [[edit]], layer, self.clean)
        return grow(self.model, tokens, [[edit]], [layer], self.start, self.clean, False, False)

    def measured(self, change: Float[Tensor, "pair position width"], measure: Measure) -> Float[Tensor, "pair *metric"]:
        """Measure the bases with a change added at the place."""
        seen = self.run(change)
        assert seen.last_logits is not None
        return measure(seen, torch.tensor(self.rows, device=seen.last_logits.device))

    def within(self, basis: Float[Tensor, "width rank"]) -> Float[Tensor, "pair position width"]:
        """Return the part of the step in the span of orthonormal columns."""
        basis = basis.to(self.step.device)
        return self.step @ basis @ basis.T


@dataclass(frozen=True)
class HeldOut:
    """The pairs to fit on, and those to test on.

    Attributes:
        fit: their numbers.
        test: those of the others; the same where there is only one pair.
        says: what was held out, in words.
        group: the group of each pair to test on.
        clustered: True if intervals are over groups, of which at least three are held out.
    """

    fit: list[int]
    test: list[int]
    says: str
    group: Int[Tensor, "test"]
    clustered: bool

    @classmethod
    def of(cls, bound: Bound, seed: int) -> HeldOut:
        """Hold out half of the groups; of a single group, half of its different clean prompts."""
        groups = [p.group for p in bound.pairs]
        several = len(set(groups)) > 1
        keys = groups if several else [p.clean for p in bound.pairs]
        names = sorted(set(keys))
        order = torch.randperm(len(names), generator=generator(seed)).tolist()
        out = {names[i] for i in order[: len(names) // 2]} or set(names)
        fit = [i for i, k in enumerate(keys) if k not in out] or list(range(len(keys)))
        test = [i for i, k in enumerate(keys) if k in out]
        says = f"{len(out)} of {len(names)} {'groups' if several else 'prompts of one group'}"
        group = torch.tensor([names.index(keys[i]) for i in test])
        return cls(fit, test, says, group, several and len(out) > 2)

    def interval(self, found: Float[Tensor, "pair *rest outcome"]) -> Float[Tensor, "*rest outcome bound"]:
        """Return the 95 % interval of the mean of each outcome over the held-out pairs: over groups, or over pairs."""
        margin, right = found[..., 0], found[..., 1:]
        if not self.clustered:
            return torch.cat([mean_interval(margin).unsqueeze(-2), share_interval(right)], -2)
        of_margin = mean_over_groups(margin.movedim(0, -1), self.group, (-math.inf, math.inf))
        shares = accuracy_interval(right.movedim(0, -1) - 0.5, torch.ones(len(right)).bool(), self.group)
        return torch.cat([of_margin.unsqueeze(-2), shares], -2)

    def record(self) -> dict[str, Any]:
        """Return what a record says of it."""
        over = "groups" if self.clustered else "pairs"
        pairs = {"fitted": len(self.fit), "tested": len(self.test)}
        return {"split": f"measured on {self.says}", "pairs": pairs, "interval": f"95 % over {over}"}


def bind_exchanges(model: Model, task: Task) -> Bound:
    """Return a task's pairs measured by the log-probability of the counterfactual label.

    Raises:
        Refused: answers of several tokens.
    """
    bound = task.bind(model, "log_prob")
    if bound.clean.tails:
        why = "its answers are of several tokens, and the label of an interchange is one"
        raise Refused(f"interchange on task {task.name!r}", why, ("use ", Code("task.narrow(model)")))
    return bound


def exchanges(
    model: Model, bound: Bound, places: Sequence[Address], positions: str, rows: Sequence[int]
) -> list[list[Exchange]]:
    """Return some pairs in batches of one length, ready to be exchanged at each place; batches of a place in a row.

    Raises:
        Refused: no such positions, or a place without vectors.
    """
    if positions not in POSITIONS:
        raise Refused(Keyword("positions", positions), "no positions have that name", f"use {', '.join(POSITIONS)}")
    for a in places:
        if not a.row.has_position or a.row.axes.split()[-1] in ("q_pos", "k_pos", "token") or a.position is not None:
            raise Refused(
                Keyword("site", str(a)), "it is no site of vectors", "use one without a position: resid_post.3"
            )
    found = list[list[Exchange]]()
    for some in _batches(model, bound, rows):
        (part,) = bound.rows(some).buckets()
        found.append(_prepared(model, part, tuple(some), places, positions))
    return [list(batches) for batches in zip(*found, strict=True)]


def _batches(model: Model, bound: Bound, rows: Sequence[int]) -> list[list[int]]:
    """Return rows of one length each, as many as run together."""
    out = list[list[int]]()
    for alike in bound.clean.rows(rows).by_length().values():
        size = max(1, room(model, bound.clean.ids.shape[1]) // bound.clean.ids.shape[1])
        out += [[rows[i] for i in alike[at : at + size]] for at in range(0, len(alike), size)]
    return out


def _prepared(
    model: Model, part: Bound, rows: tuple[int, ...], places: Sequence[Address], positions: str
) -> list[Exchange]:
    """Return the pairs of one length, ready at each place."""
    source, base = (model.capture(t, list(places), logits=False) for t in (part.clean, part.corrupt))
    where = torch.ones_like(part.clean.mask) if positions == EVERY else part.span(positions)
    layers = sorted({first_layer(model, [Add(a, torch.zeros(1))]) for a in places})
    with model.edited(), torch.no_grad():
        clean = clean_run(model, part.corrupt, layers, can_grow(model, part.corrupt))
    out = list[Exchange]()
    for a in places:
        own = base[str(a)].float()
        if own.ndim != 3:
            why = f"its activations are {list(own.shape)}, not [batch, position, width]"
            raise Refused(Keyword("site", str(a)), why, "name one unit of it")
        step = (source[str(a)].float() - own) * where[..., None].to(own.device)
        out.append(Exchange(model, part, rows, a, own, where.to(own.device), step, clean))
    return out


def outcomes(bound: Bound, model: Model) -> Measure:
    """Return the measurement of an interchange: the logit of the label − that of the foil, 1 if the label is the top
    prediction, and 1 if it beats the foil.
    """
    top, margin = (bound.measured_by(name, model).measure for name in ("accuracy", "logit_diff"))

    def each(seen: Seen, prompt: Int[Tensor, "row"]) -> Float[Tensor, "row outcome"]:
        found = margin(seen, prompt)
        return torch.stack([found, top(seen, prompt), (found > 0).to(found.dtype)], -1)

    return Measure(each, jointly([top, margin]).reads)


def outcome_fields(
    mean: Float[Tensor, "*cell outcome"],
    bounds: Float[Tensor, "*cell outcome bound"],
    null: Float[Tensor, "*cell sample outcome"],
) -> dict[str, Any]:
    """Return the outcomes as fields of a result: margin, iia and preferred, each with its interval and null."""
    fields = dict[str, Any]()
    for i, name in enumerate(("margin", "iia", "preferred")):
        own = f"{name}_" if i else ""
        fields |= {name: mean[..., i], f"{own}interval": bounds[..., i, :], f"{own}null": null[..., i]}
    return fields


def same(batches: Sequence[Exchange]) -> bool:
    """Return True if base and source have the same values there, so that an exchange changes nothing."""
    return not any(bool(e.step.any()) for e in batches)


def tried(
    batches: Sequence[Exchange], change: Callable[[Exchange], Tensor], measure: Measure
) -> Float[Tensor, "pair outcome"]:
    """Return what a measurement says of every pair under a change, in the order of the pairs' numbers."""
    with batches[0].model.edited(), torch.no_grad():
        found = torch.cat([e.measured(change(e), measure).float().cpu() for e in batches])
    return found[torch.tensor([r for e in batches for r in e.rows]).argsort()]


def class_means(batches: Sequence[Exchange], rank: int = 1) -> Float[Tensor, "width rank"]:
    """Return the directions along which the means of the classes differ most, the classes being the answers' tokens.

    Of two classes it is the line through their means. A base has its foil's class, a source its answer's.
    """
    x, y = vectors_of(batches)
    means = torch.stack([x[y == c].mean(0) for c in y.unique()])
    rows = torch.linalg.svd(means - means.mean(0), full_matrices=False).Vh
    return rows[:rank].T.contiguous()


def vectors_of(batches: Sequence[Exchange]) -> tuple[Float[Tensor, "prompt width"], Int[Tensor, "prompt"]]:
    """Return the mean vector at the exchanged positions of every base and source, and the token of its class."""
    x, y = list[Tensor](), list[Tensor]()
    for e in batches:
        share = (e.where / e.where.sum(1, keepdim=True).clamp_min(1)).unsqueeze(1)
        x += [(share @ v).squeeze(1).cpu() for v in (e.base, e.base + e.step)]
        y += [e.bound.foils.cpu(), e.bound.answers.cpu()]
    return torch.cat(x), torch.cat(y)
