"""Which activations carry what another checkpoint does better (or worse)?

Cross-model activation patching, CMAP (Prakash et al. 2024, arXiv:2402.14811): on the same prompts, one activation at a
time of the model (`model`, for example a base model) is replaced by its value in another checkpoint of the same
architecture (`other`, for example the fine-tuned one).

* `effect` = metric(patched) − metric(model), mean over prompts, in the metric's unit; `recovered` is its share of
  metric(other) − metric(model): 1 means that this place alone turns the one model's answer into the other's.
* A stream site gives [layer, position], a head site [layer, head] at all positions at once.
* `interval`: 95 %, over prompts. Control (`null`): a step of the same length in a random direction.
* `other`: a folder, a Hugging Face id or a zoo name; or `shuffled`, the model itself with the entries of every weight
  matrix in random order: what a place loses if nothing but the statistics of the weights stays.
* Known failures: activations of two checkpoints share a basis only if one was trained from the other; after much
  training, or between seeds, a patch measures the mismatch of bases. Refused: other architectures, other tokenizers,
  the same weights, and checkpoints between which the metric does not differ.
* Equivalences (tests): `resid_post` of the last layer and position gives the other stream through this model's
  unembedding; where the checkpoints differ in one head only, that head recovers everything.
* Cost: one forward of the other model, then one of this model a cell and sample, from the patched layer on.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address, component_axis, unit_axis
from cutaway.core.method import PINNED, method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.sites import site as site_row
from cutaway.core.stats import BOUNDS, generator, mean_interval
from cutaway.interventions.ablation_values import RandomStep
from cutaway.interventions.components import positions
from cutaway.interventions.paired_runs import measured
from cutaway.interventions.spans import position_names
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Replace
from cutaway.models.loading.load import load
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task
from cutaway.zoo import find

SHUFFLED = "shuffled"


@dataclass(frozen=True, kw_only=True)
class CrossHeads(Result, kind="cross_model_heads"):
    """Effect of one head's activation from another checkpoint, at all positions at once."""

    effect: Float[Tensor, "layer head"]
    interval: Float[Tensor, "layer head bound"]
    null: Float[Tensor, "layer head sample"]
    recovered: Float[Tensor, "layer head"]
    own: Float[Tensor, "prompt"]
    other: Float[Tensor, "prompt"]


@dataclass(frozen=True, kw_only=True)
class CrossPositions(Result, kind="cross_model_positions"):
    """Effect of one stream activation from another checkpoint, at one layer and position."""

    effect: Float[Tensor, "layer position"]
    interval: Float[Tensor, "layer position bound"]
    null: Float[Tensor, "layer position sample"]
    recovered: Float[Tensor, "layer position"]
    own: Float[Tensor, "prompt"]
    other: Float[Tensor, "prompt"]


@method(
    answers="Which activations carry what another checkpoint does better (or worse)?",
    paper="Prakash et al. 2024, arXiv:2402.14811",
    cost="prompts * (5 + (1 + samples) * layers * max(1, head, position)) * F",
    control="random_direction",
    rung="interventional",
)
def cross_model(
    model: Model,
    task: Task,
    /,
    *,
    other: str = SHUFFLED,
    site: str = "z",
    samples: int = 4,
    seed: int = 0,
) -> CrossHeads | CrossPositions:
    """Take one activation at a time from another checkpoint.

    Args:
        other: the checkpoint that gives: a folder, a Hugging Face id, a zoo name, or `shuffled`.
        site: a head site such as z (patched by layer and head) or a stream site (by layer and position).
        samples: how many random steps of equal length make the null of each place.
        seed: of the random steps.

    Raises:
        Refused: another site, or a checkpoint of other shape, other tokens, or without any difference.
    """
    by_head = _by_head(site)
    bound = task.bind(model)
    giver = _giver(model, other)
    _same_kind(model, giver, bound)
    own, given = (bound.metric(m.run_last(bound.clean)).float().cpu() for m in (model, giver))
    gap = float((given - own).mean())
    if not abs(gap) >= 1e-6:
        why = f"the metric differs by {gap:.2g} between the two"
        raise Refused(f"patching {model.name} from {other!r}", why, "use a task on which they differ")
    mine, theirs = (m.capture(bound.clean, site, logits=False) for m in (model, giver))
    places = _places(model, site, by_head, mine.layers(site), bound.clean)
    edits: list[Edit] = [Replace(a, theirs[str(a)]) for a in places]
    steps = enumerate(places * samples, seed * samples * len(places))
    edits += [RandomStep(a, mine[str(a)], theirs[str(a)], n) for n, a in steps]
    values = sweep(model, bound.clean, [[e] for e in edits], measured(bound)).float().cpu() - own
    layers, unit = mine.layers(site), bound.unit
    each = values[: len(places)].T.reshape(len(bound), len(layers), -1)
    null = values[len(places) :].mean(-1).reshape(samples, *each.shape[1:])
    names = {} if by_head else {"position": position_names(bound)}
    return (CrossHeads if by_head else CrossPositions)(
        effect=each.mean(0),
        interval=mean_interval(each),
        null=null.movedim(0, -1),
        recovered=each.mean(0) / gap,
        own=own,
        other=given,
        labels={"layer": layers, "bound": BOUNDS, **names},
        units=dict.fromkeys(("effect", "interval", "null", "own", "other"), unit)
        | {"recovered": "share of other − own"},
        record={"other": giver.identity(), "other − own": gap, "sign": "positive is more answer"}
        | ({} if len(bound) > 1 else {"no_interval": "one prompt"})
        | ({} if giver.made is None or find(other) is not None else {PINNED: {"other": giver.made.flags[""]}}),
    )


def _by_head(site: str) -> bool:
    row = site_row(site)
    stream = row.axes.startswith("batch position ") and component_axis(row) is None
    if row.scope != "layer" or not row.writable or not (stream or row.head_axis is not None):
        why = f"its axes are {row.axes}" if row.scope == "layer" else "it has no layers"
        raise Refused(f"patching site {site!r}", why, "use a stream site such as resid_pre, or a head site such as z")
    return row.head_axis is not None


def _giver(model: Model, other: str) -> Model:
    """The model that gives, on the same device and in the same dtype."""
    if other == SHUFFLED:
        return _shuffled(model)
    entry = find(other)
    source = str(entry.folder) if entry is not None else other
    # `model` vouches for the family; the name is the caller's word, not that of a folder
    return load(source, name=other, device=str(model.device), dtype=model.dtype, check=False)


def _same_kind(model: Model, giver: Model, bound: Bound) -> None:
    what = f"patching {model.name} from {giver.name}"
    if (model.family.name, model.shape) != (giver.family.name, giver.shape):
        forms = f"one is a {model.family.name} of {model.shape}, the other a {giver.family.name} of {giver.shape}"
        raise Refused(what, forms, "use a checkpoint of the same architecture")
    if giver.tokenizer is not None and model.tokenizer is not None:
        there = giver.tokens([p.clean for p in bound.pairs])
        same = giver.tokenizer.get_vocab() == model.tokenizer.get_vocab()
        if not same or there.lengths.tolist() != bound.clean.lengths.tolist():
            raise Refused(what, "their tokenizers differ", "use checkpoints of one vocabulary")
    if model.fingerprint(anew=True) == giver.fingerprint(anew=True):
        raise Refused(what, "the weights are the same", "give another checkpoint")


def _shuffled(model: Model) -> Model:
    """A copy whose weight matrices have their entries in random order; the same copy every time."""
    hf, g = deepcopy(model.hf), generator(0)
    with torch.no_grad():
        for p in hf.parameters():
            if p.ndim > 1:
                p.copy_(p.flatten()[torch.randperm(p.numel(), generator=g).to(p.device)].reshape(p.shape))
    return Model(hf, model.tokenizer, f"{model.name} (shuffled)", disabled=model.disabled)


def _places(model: Model, site: str, by_head: bool, layers: list[int], tokens: Tokens) -> list[Address]:
    if by_head:
        return [Address(site, i, h) for i in layers for h in range(model.sizes()[str(unit_axis(site_row(site)))])]
    return [Address(site, i, None, p) for i in layers for p in positions(tokens)]
