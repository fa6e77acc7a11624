"""Which activations carry what another checkpoint does better (or worse)?

Cross-model activation patching, CMAP (Prakash et al. 2024, arXiv:2402.14811): on the same prompts, one activation at a
time of the model (`model`, for example a base model) is replaced by its value in another checkpoint of the same
architecture (`other`, for example the fine-tuned one).

* `effect` = metric(patched) − metric(model), mean over prompts, in the metric's unit; `recovered` is its share of
  metric(other) − metric(model): 1 means that this place alone turns the one model's answer into the other's.
* A stream site gives [layer, position], a head site [layer, head] at all positions at once.
* `interval`: 95 %, over prompts. Control (`null`): a step of the same length in a random direction.
* `other` may be `ca.models.shuffled(model)` (`--other shuffled`, the default of the command): the model itself with the
  entries of every weight matrix in random order, so that nothing but the statistics of the weights stays.
* Known failures: activations of two checkpoints share a basis only if one was trained from the other; after much
  training, or between seeds, a patch measures the mismatch of bases. Refused: other architectures, other tokenizers,
  the same weights, and checkpoints between which the metric does not differ.
* Equivalences (tests): `resid_post` of the last layer and position gives the other stream through this model's
  unembedding; where the checkpoints differ in one head only, that head recovers everything.
* Cost: one forward of the other model, then one of this model a cell and sample, from the patched layer on.
"""

from __future__ import annotations

from cutaway.core.address import Address, component_axis, unit_axis
from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.sites import site as site_row
from cutaway.core.stats import BOUNDS, mean_interval, one_prompt
from cutaway.interventions.ablation_values import RandomStep
from cutaway.interventions.components import positions
from cutaway.interventions.effects import Effects
from cutaway.interventions.spans import position_names
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task


@method(
    answers="Which activations carry what another checkpoint does better (or worse)?",
    paper="Prakash et al. 2024, arXiv:2402.14811",
    cost="prompts * (5 + (1 + samples) * layers * max(1, head, position)) * F",
    control="random_direction",
    rung="interventional",
    fills=("recovered", "other", "gap"),
)
def cross_model(
    model: Model,
    other: Model,
    task: Task,
    /,
    *,
    site: str = "z",
    samples: int = 4,
    seed: int = 0,
) -> Effects:
    """Take one activation at a time from another checkpoint.

    Args:
        site: a head site such as z (patched by layer and head) or a stream site (by layer and position).
        samples: how many random steps of equal length make the null of each place.
        seed: of the random steps.

    Raises:
        Refused: another site, or a checkpoint of other shape, other tokens, or without any difference.
    """
    by_head = _by_head(site)
    bound = task.bind(model)
    _same_kind(model, other, bound)
    own, given = (m.measure(bound.clean, bound.measure).float().cpu() for m in (model, other))
    gap = float((given - own).mean())
    if not abs(gap) >= 1e-6:
        why = f"the metric differs by {gap:.2g} between the two"
        raise Refused(f"patching {model.name} from {other.name}", why, "use a task on which they differ")
    mine, theirs = (m.capture(bound.clean, site, logits=False) for m in (model, other))
    places = _places(model, site, by_head, mine.layers(site), bound.clean)
    edits: list[Edit] = [Replace(a, theirs[str(a)]) for a in places]
    steps = enumerate(places * samples, seed * samples * len(places))
    edits += [RandomStep(a, mine[str(a)], theirs[str(a)], n) for n, a in steps]
    values = sweep(model, bound.clean, [[e] for e in edits], bound.measure).float().cpu() - own
    layers, unit = mine.layers(site), bound.unit
    each = values[: len(places)].T.reshape(len(bound), len(layers), -1)
    null = values[len(places) :].mean(-1).reshape(samples, *each.shape[1:])
    names = {} if by_head else {"position": position_names(bound)}
    return Effects(
        grid=("layer", "head" if by_head else "position"),
        effect=each.mean(0),
        interval=mean_interval(each),
        null=null.movedim(0, -1),
        recovered=each.mean(0) / gap,
        clean=own,
        other=given,
        labels={"layer": layers, "bound": BOUNDS, **names},
        units=dict.fromkeys(("effect", "interval", "null", "clean", "other"), unit)
        | {"recovered": "share of other − own"},
        record={"other": other.identity(), "sign": "positive is more answer"},
        gap=gap,
        reasons=one_prompt(len(bound), "effect"),
    )


def _by_head(site: str) -> bool:
    row = site_row(site)
    stream = row.axes.startswith("batch position ") and component_axis(row) is None
    if row.scope != "layer" or not row.writable or not (stream or row.head_axis is not None):
        why = f"its axes are {row.axes}" if row.scope == "layer" else "it has no layers"
        raise Refused(f"patching site {site!r}", why, "use a stream site such as resid_pre, or a head site such as z")
    return row.head_axis is not None


def _same_kind(model: Model, other: Model, bound: Bound) -> None:
    what = f"patching {model.name} from {other.name}"
    if (model.dtype, model.device) != (other.dtype, other.device):
        why = f"one is {model.dtype} on {model.device}, the other {other.dtype} on {other.device}"
        raise Refused(
            what,
            why,
            ("load both with the same ", Keyword("dtype", of="model"), " and ", Keyword("device", of="model")),
        )
    if (model.family.name, model.shape) != (other.family.name, other.shape):
        forms = f"one is a {model.family.name} of {model.shape}, the other a {other.family.name} of {other.shape}"
        raise Refused(what, forms, "use a checkpoint of the same architecture")
    if other.tokenizer is not None and model.tokenizer is not None:
        there = other.tokens(list(bound.clean.texts))
        same = other.tokenizer.get_vocab() == model.tokenizer.get_vocab()
        if not same or there.lengths.tolist() != bound.clean.lengths.tolist():
            raise Refused(what, "their tokenizers differ", "use checkpoints of one vocabulary")
    if model.fingerprint(fresh=True) == other.fingerprint(fresh=True):
        raise Refused(what, "the weights are the same", "give another checkpoint")


def _places(model: Model, site: str, by_head: bool, layers: list[int], tokens: Tokens) -> list[Address]:
    if by_head:
        return [Address(site, i, h) for i in layers for h in range(model.sizes()[str(unit_axis(site_row(site)))])]
    return [Address(site, i, None, p) for i in layers for p in positions(tokens)]
