"""Which heads or MLPs reach the answer, or another head, along a path that passes no other head?

Path patching (Wang et al. 2022, arXiv:2211.00593). One head (the sender) takes its value from the other prompt, all
other heads are frozen at the target's own values, and only the receiver hears of it.

* `receiver="logits"`: the metric is read in that run. Heads and MLPs (`q.9.6`, `k.9.6`, `v.9.6`, `mlp_in.5`, also at a
  position as `q.9.6@-1`, or several): their inputs in that run are put into the unfrozen target, all at once,
  and the metric is read there. Likewise the normed stream as a head's projections read it (`q_in.9.6`, `k_in.9.6`,
  `v_in.9.6`), as all heads of a layer read it (`attn_in.9`), and the stream itself (`resid_pre.9`, `resid_mid.9`).
* `senders="mlps"`: one MLP sends instead of a head; all heads are frozen, and of the other MLPs what is frozen above.
* MLPs and norms between sender and receiver are recomputed, as in the paper, unless `freeze_mlps` or `freeze_norms`
  hold them at the target's values (norms: their divisors). Arithmetic (Zhang et al. 2024, arXiv:2409.01659) is
  measured with the defaults and a corrupt prompt that asks for no sum (task arithmetic, corruption no_operator); its
  number is `relative`. The two definitions rank heads differently: a map must say which it is.
* `effect` [layer head] = metric(patched) − metric(target), mean over prompts; `recovered` its share of clean − corrupt;
  `relative` = (logit patched − logit) / |logit| of the answer, mean over prompts (the paper divides by the logit, which
  is the same where that is above zero; a set of answers counts by the logsumexp of its logits, an answer of several
  tokens by its log-probability). Senders from which no such path leads have the effect 0.
* `interval`, `relative_interval`: 95 %, over prompts. Control (`null`): the sender takes a step of equal length in
  a random direction; of more than `null_cells` senders, so many drawn at random.
* Known failures: freezing other heads hides what they would repair; effects of MLPs on the path are counted to the
  sender; norms behind attention (Gemma 2) have no divisor to freeze and are always recomputed; a logit has no zero of
  its own, so `relative` compares senders, not models, and a prompt whose logit is near 0 outweighs all others.
* Equivalences (tests): with MLPs and norms frozen, sender → logits is the direct logit attribution of the difference;
  with neither frozen, heads of the last layer → logits are activation patching.
* Cost: one forward a sender and sample, from the sender's layer on: of the last position alone, where the metric reads
  its logits (nothing moves between positions while heads are frozen). With a receiver inside, one more from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address, Pattern, listed
from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.interventions.ablation_values import RandomStep
from cutaway.interventions.effects import Effects
from cutaway.interventions.null_cells import NULL_CELLS, draw_cells, null_cells_record
from cutaway.interventions.paired_runs import Direction, PairedRuns, between, difference, first_changed
from cutaway.models.access.positions import rows
from cutaway.models.access.reading import Measure, Reads
from cutaway.models.edits.edges import EdgePatch, precedes
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Add, Freeze, Replace
from cutaway.models.model import Model
from cutaway.models.sweep.edges import sweep_edges
from cutaway.models.sweep.plan import PREFIX
from cutaway.tasks.task import Task

_FORM = "write logits, or for example q.3.1 or q.3.1@-1,mlp_in.4"
_OF_HEADS, _OF_LAYERS = ("q", "k", "v", "q_in", "k_in", "v_in"), ("resid_pre", "attn_in", "resid_mid", "mlp_in")


@method(
    answers="Which heads or MLPs reach the answer, or another head, along a path that passes no other head?",
    paper="Wang et al. 2022, arXiv:2211.00593; Zhang et al. 2024, arXiv:2409.01659",
    cost="prompts * 7 * F + prompts * (cells + samples * min(null_cells or cells, cells))"
    " * (P if receiver == 'logits' else 2 * F)",
    control="random_direction",
    rung="interventional",
    fills=("recovered", "relative", "corrupt", "gap"),
)
def path(
    model: Model,
    task: Task,
    /,
    *,
    receiver: tuple[Pattern, ...] = ("logits",),
    senders: Literal["heads", "mlps"] = "heads",
    direction: Direction = "noise",
    freeze_mlps: bool = False,
    freeze_norms: bool = False,
    samples: int = 4,
    null_cells: int = NULL_CELLS,
    seed: int = 0,
) -> Effects:
    """Exchange one head or MLP at a time between the clean and the corrupt run, for one receiver only.

    Args:
        receiver: logits, or inputs of heads, layers and MLPs (q.9.6, v.9.6@-1, k_in.9.6, attn_in.9, mlp_in.5,
            resid_pre.9), one or several.
        senders: whether heads or MLPs send, one at a time.
        direction: noise sends corrupt values in the clean run, denoise clean values in the corrupt run.
        freeze_mlps: hold every MLP's output at its value in the target run.
        freeze_norms: hold every norm's divisor at its value in the target run.
        samples: how many random steps of equal length make the null of each sender.
        null_cells: of how many senders, drawn at random, random steps are sent; NaN elsewhere (0: of all of them).
        seed: of the random steps.

    Raises:
        Refused: no such receiver, none that a sender reaches, a corruption that does not change the metric, or an
            answer whose logit is 0.
    """
    ends, site = receivers(model, receiver), "z" if senders == "heads" else "mlp_out"
    x = between(model, task.bind(model), list(dict.fromkeys(["z", site])), direction, task.corruption)
    difference(task, x.clean, x.corrupt)
    frozen = _frozen(model, x, freeze_mlps, freeze_norms)
    sending = _senders(model, site, ends, receiver)
    measure = x.bound.measure_with("log_prob" if x.bound.clean.tails else "logit", model)
    before = model.measure(x.target, measure)
    if not bool(before[:, 1].abs().gt(0).all()):
        raise Refused(
            "path patching", "the logit of an answer is 0, so no change is a share of it", "use other prompts"
        )
    layers, heads = x.own.layers(site), model.shape.n_heads if site == "z" else 1
    each = torch.zeros(1 + samples, len(layers), heads, len(x.bound), 2)
    where = torch.tensor([[layers.index(a.layer or 0), a.unit or 0] for a in sending])
    runs, drawn = _runs(len(sending), samples, null_cells, seed)
    since = None if not ends and _read_at_end(model, measure) else first_changed(model, x.bound)
    sent = [_sent(x, sending[i], own, since) for _, i, own in runs]
    found = sweep_edges(model, x.target, [EdgePatch(e, ends or ("logits",), frozen) for e in sent], measure) - before
    kind, sender = torch.tensor([run[:2] for run in runs]).T
    each[1:, where[:, 0], where[:, 1]] = torch.nan
    each[kind, where[sender, 0], where[sender, 1]] = found.float().cpu()
    return _result(
        each if site == "z" else each[:, :, 0],
        x,
        before[:, 1].abs().cpu(),
        layers,
        {
            "receiver": [str(a) for a in ends] or "logits",
            "frozen": [
                "other heads" if site == "z" else "heads",
                *(["MLPs"] if freeze_mlps else []),
                *(["divisors of norms"] if freeze_norms else []),
            ],
            **null_cells_record(drawn, len(sending)),
        },
    )


def _result(
    each: Float[Tensor, "*run prompt 2"],
    x: PairedRuns,
    logit: Float[Tensor, "prompt"],
    layers: list[int],
    said: dict[str, Any],
) -> Effects:
    """Return the result from changes of the metric and of the answer's logit: the senders' own, then those of the
    control.
    """
    effect, relative, unit = each[0, ..., 0], each[0, ..., 1] / logit, x.bound.unit
    said_of = "log-probability" if x.bound.clean.tails else "logit"
    share = f"share of the answer's |{said_of}|"
    heads = {"head": [str(h) for h in range(effect.shape[1])]} if effect.ndim == 3 else {}
    return Effects(
        grid=("layer", *heads),
        effect=effect.mean(-1),
        interval=mean_interval(effect.movedim(-1, 0)),
        null=each[1:, ..., 0].mean(-1).movedim(0, -1).clone(),
        recovered=effect.mean(-1) / x.gap,
        relative=relative.mean(-1),
        relative_interval=mean_interval(relative.movedim(-1, 0)),
        clean=x.clean.cpu(),
        corrupt=x.corrupt.cpu(),
        labels={"layer": layers, "bound": BOUNDS, **heads},
        units={
            "effect": unit,
            "interval": unit,
            "null": unit,
            "recovered": "share of clean − corrupt",
            "relative": share,
            "relative_interval": share,
        },
        gap=x.gap,
        reasons=one_prompt(len(x.bound), "effect", "relative"),
        record=x.record() | said | {f"least |{said_of}|": float(logit.min())},
    )


def receivers(model: Model, names: Sequence[Pattern]) -> tuple[Address, ...]:
    """Return the places named as receivers; none for the logits.

    Raises:
        Refused: another form, or no such place.
    """
    if [str(n) for n in names] == ["logits"]:
        return ()
    found = model.places(names)
    if not found or not all(a.site in (_OF_LAYERS if a.unit is None else _OF_HEADS) for a in found):
        of_heads, of_layers = ", ".join(_OF_HEADS), ", ".join(_OF_LAYERS)
        why = f"a path ends at {of_heads} of a head, at {of_layers} of a layer, or at the logits"
        raise Refused(f"receiver {listed(names)!r}", why, _FORM)
    return tuple(found)


def _senders(model: Model, site: str, ends: Sequence[Address], receiver: Sequence[Pattern]) -> list[Address]:
    """Return the heads or MLPs from which a path leads to a receiver."""
    found = [
        a
        for a in model.places("z.*.*" if site == "z" else site)
        if not ends or any(precedes(model.anatomy, a, end) for end in ends)
    ]
    if not found:
        why = f"no {'head' if site == 'z' else 'MLP'} comes before it"
        raise Refused(f"receiver {listed(receiver)!r}", why, "choose one in a later layer")
    return found


def _frozen(model: Model, x: PairedRuns, mlps: bool, norms: bool) -> tuple[Edit, ...]:
    there = model.sites()
    scales = [s for s in ("ln1.scale", "ln2.scale", "final.scale") if norms and there[s].startswith("read")]
    more = model.places([*(["mlp_out"] if mlps else []), *scales]) if mlps or scales else []
    values = model.capture(x.target, more, logits=False) if more else {}
    return (*(Freeze(a, x.own) for a in model.places("z")), *(Freeze(a, values) for a in more))


def _runs(senders: int, samples: int, null_cells: int, seed: int) -> tuple[list[tuple[int, int, int | None]], int]:
    """Return every run, as 0 or 1 + the number of a random step, its sender and the seed of the step, and the number
    of senders that random steps are drawn for.
    """
    chance = generator(seed)
    seeds = torch.randint(1 << 62, (samples, senders), generator=chance).tolist()
    drawn = draw_cells(range(senders), null_cells, chance)
    steps = [(1 + s, i, seeds[s][i]) for s in range(samples) for i in drawn]
    return [*((0, i, None) for i in range(senders)), *steps], len(drawn)


def _read_at_end(model: Model, measure: Measure) -> bool:
    """Return True if no more than the last position of a run counts in which all heads are frozen: nothing but
    attention carries values from one position to another.
    """
    return measure.reads == Reads() and PREFIX not in model.disabled


def _sent(x: PairedRuns, a: Address, seed: int | None, since: int | None) -> Edit:
    """Return what a sender sends: the donor's values, or with a seed a random step of that length; from a position on,
    or at the last one alone.
    """
    own, other, last = x.own[str(a)], x.donor[str(a)], replace(a, position=-1)
    if seed is None:
        return Replace(last, x.donor[str(last)]) if since is None else Replace(a, other, since=since)
    step = RandomStep(a, own, other, seed, since=since or 0)
    if since is not None:
        return step
    return Add(last, step.step()[rows(len(own), own.device), x.target.last.to(own.device)])
