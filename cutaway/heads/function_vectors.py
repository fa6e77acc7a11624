"""Which heads carry a task that is shown by examples, and does what they write make the model do it?

Prompts show pairs of words, `hot -> cold; up -> down; old ->` (Todd et al. 2024, arXiv:2310.15213). The mean of a
head's z at the last token over prompts that show a task is put there in prompts whose labels are shuffled. The sum of
what the best heads write on average, the function vector, is added at the last token of the bare word, `old ->`.

* `effect[layer, head]`: the change of the right answer's probability in prompts with shuffled labels, mean over
  prompts; `logits`: of logit(answer) − logit(another answer of the task); `by_task`: `effect` of each task. The mean
  that stands in is of the task's prompts about other words.
* `interval`, `…_interval`: 95 %, over prompts. Control (`null`, `logits_null`): a step as long as that to the mean,
  in a random direction, at `null_cells` heads.
* `claimed[layer, head]`: 1 where the interval of `effect` lies above 0 and above the band of the null.
* `baseline[task, condition, measure]`: the answer's probability, its share of top-1 and its log-probability in prompts
  with examples, with shuffled labels, and without examples. Where shuffled labels do not hurt there is nothing to
  restore.
* `gain[scale, measure, layer]`: what they gain without examples when the function vector of the `top` heads by
  `effect` is added behind each layer, once or more times (`scales`); `gain_by_task`. Control (`gain_null`): the vector
  of as many random heads, as many of each layer where enough are left, of the same norm.
* `change[measure]`: what they change in prompts with examples when the `top` heads are put at their mean over all
  tokens (first and special tokens left in place); `change_null`: random sets of other heads.
* `vector[task, d_model]`: the function vectors, to be added to the stream (`Add("resid_post.9@-1", vector)`).
* Six tenths of each task's words choose the heads, and make the examples and vectors; `baseline`, `gain` and `change`
  are of the others.
* Assumption: an answer counts by its first token. What heads write passes the norm behind attention, if there is one,
  with its scale held.
* Known failures: answers alone may tell the task (capitals), so that shuffled labels still show it. A mean restores
  what is the same for all words of a task; a head that reads the word itself has no effect here. The best heads may
  repeat each other, and their sum overshoots. A bare word that is the first token of its prompt may be read as one that
  attention rests on: use a form that begins with something else.
* Equivalences (test): effects, gains and changes are those of hooks on plain transformers.
* Cost: 1 + samples forwards of the last token a head (samples: at `null_cells` heads) and a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Call, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, layer_band, mean_interval, share_interval
from cutaway.heads.shots import CONDITIONS, Shots, show
from cutaway.heads.types import ranked
from cutaway.interventions.ablation_values import SINKS, RandomStep, removals
from cutaway.interventions.components import RandomSets, all_components, random_heads
from cutaway.interventions.null_cells import NULL_CELLS, draw_cells, null_cells_record, null_of_steps, random_steps
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.anatomy.residual import check_sum, decompose
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Add, Replace
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.sweep.plan import Variant
from cutaway.models.tokens import Tokens
from cutaway.tasks.concepts import Concepts

MEASURES = ["probability", "top-1", "log-probability"]
_LOGITS = 3  # of logit(answer) − logit(foil) among the columns that are measured
_UNITS = {
    **dict.fromkeys(("effect", "interval", "null", "by_task", "by_task_interval"), "probability"),
    **dict.fromkeys(("logits", "logits_interval", "logits_null"), "logits"),
    "top-1": "share",
    "probability": "probability",
    "log-probability": "nats",
    "vector": "residual stream",
}


@dataclass(frozen=True, kw_only=True)
class FunctionVectors(Result, kind="function_vectors"):
    """Effects of heads on tasks shown by examples, and the vectors that the best of them write.

    Attributes:
        effect: the change of the answer's probability with the head's mean in prompts with shuffled labels.
        interval: of `effect`, 95 %, over prompts.
        null: `effect` of a step of the same length in a random direction.
        claimed: 1 for a head that carries tasks, 0 for others.
        logits: the change of logit(answer) − logit(another answer).
        by_task: `effect` of each task.
        baseline: measures of the answer without an edit.
        gain: what they gain without examples when the function vector is added.
        gain_by_task: `gain` of each task.
        change: what they change with examples when the best heads are removed.
        vector: the function vector of each task.
    """

    effect: Float[Tensor, "layer head"]
    interval: Float[Tensor, "layer head bound"]
    null: Float[Tensor, "layer head sample"]
    claimed: Float[Tensor, "layer head"]
    logits: Float[Tensor, "layer head"]
    logits_interval: Float[Tensor, "layer head bound"]
    logits_null: Float[Tensor, "layer head sample"]
    by_task: Float[Tensor, "task layer head"]
    by_task_interval: Float[Tensor, "task layer head bound"]
    baseline: Float[Tensor, "task condition measure"]
    baseline_interval: Float[Tensor, "task condition measure bound"]
    gain: Float[Tensor, "scale measure layer"]
    gain_interval: Float[Tensor, "scale measure layer bound"]
    gain_null: Float[Tensor, "scale measure layer sample"]
    gain_by_task: Float[Tensor, "task scale measure layer"]
    gain_by_task_interval: Float[Tensor, "task scale measure layer bound"]
    gain_by_task_null: Float[Tensor, "task scale measure layer sample"]
    change: Float[Tensor, "measure"]
    change_interval: Float[Tensor, "measure bound"]
    change_null: Float[Tensor, "measure sample"]
    vector: Float[Tensor, "task d_model"]

    def named(self) -> list[str]:
        """Return the claimed heads as `layer.head`, the largest effects first."""
        return ranked(self.claimed, self.effect, self.labels["layer"])


@method(
    answers="Which heads carry a task that is shown by examples, and does what they write make the model do it?",
    paper="Todd et al. 2024, arXiv:2310.15213",
    cost="(concepts * (2 + prompts) * (6 + layers * heads * (1 + samples))"
    " + pairs * (8 + (2 + scale * layers) * (1 + samples))) * F",
    control="random_direction",
    rung="interventional",
)
def function_vectors(
    model: Model,
    concepts: Concepts,
    /,
    *,
    prompts: int = 12,
    shots: int = 5,
    top: int = 10,
    scales: tuple[int, ...] = (1,),
    form: str = "{} ->",
    between: str = "; ",
    samples: int = 4,
    null_cells: int = NULL_CELLS,
    seed: int = 0,
) -> FunctionVectors:
    """Put each head's mean over prompts that show a task into prompts that do not, and add what the best ones write.

    Args:
        prompts: how many prompts of each task choose heads, at least two.
        shots: how many examples stand in front of each word.
        top: how many heads make the function vector.
        scales: how many times the function vector is added.
        form: how a word is asked about; {} is the word.
        between: what stands between examples.
        samples: how many random steps, vectors and sets of heads make the nulls.
        null_cells: at how many heads, drawn at random, random steps are made; NaN elsewhere (0: at all of them).
        seed: of what is drawn.

    Raises:
        Refused: an encoder, no heads or examples asked for, tasks of too few words, or a stream that cannot be split.
    """
    if top < 1 or shots < 1:
        asked = Call("function_vectors", {"shots": shots, "top": top})
        raise Refused(asked, "it needs an example and a head", "use for example 5 and 10")
    check_sum(model)
    chose, held, short = show(model, concepts, max(prompts, 2), shots, form, between)
    study = _Study(model, chose, held, samples, null_cells, seed)
    found, notes = study.effects()
    best = study.best(found["effect"], top)
    random = random_heads(study.places, best, samples, seed)
    vector, gains = study.gains(best, random, scales)
    why = {"baseline": "it is what the model itself does"}
    why |= dict.fromkeys(("gain", "gain_by_task", "change"), random.why) if random.why else {}
    return FunctionVectors(
        **found,
        **study.baseline(),
        **gains,
        **study.removed(best, random),
        vector=vector,
        labels={
            "layer": study.layers,
            "task": list(chose.names),
            "condition": CONDITIONS,
            "measure": MEASURES,
            "scale": [*scales],
            "bound": BOUNDS,
        },
        units=_UNITS,
        reasons=why | study.few(),
        record={
            "heads": [f"{a.layer}.{a.unit}" for a in best],
            "controls": {"gain": "random_heads", "gain_by_task": "random_heads", "change": "random_sets"},
            "random heads": random.matched or random.why,
            "prompts that chose heads": len(chose.task),
            "words held out": dict(zip(held.names, held.task.bincount().tolist(), strict=True)),
            "words of tasks left out": short,
            "left in place": SINKS,
        }
        | notes,
    )


class _Study:
    """A model with the prompts that choose heads and those about words held out.

    Attributes:
        places: every head.
        layers: their layers.
    """

    def __init__(self, model: Model, chose: Shots, held: Shots, samples: int, null_cells: int, seed: int):
        self.model, self.chose, self.held, self.samples, self.seed = model, chose, held, samples, seed
        self.null_cells, self.places = null_cells, all_components(model, mlps=False)
        self.layers = list(dict.fromkeys(a.layer or 0 for a in self.places))

    def effects(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Put every head's mean into the prompts with shuffled labels; return the fields, and notes for the record."""
        n, samples, shape = len(self.places), self.samples, (len(self.layers), -1)
        drawn = draw_cells(range(n), self.null_cells, generator(self.seed))
        edits, steps = self._edits(drawn)
        values = self._measured(self.chose, self.chose.shuffled, [[], *edits, *steps])
        each = values[1:] - values[0]
        real, null = each[:n].movedim(0, 1), null_of_steps(each[n:].mean(1), drawn, n, samples)
        fields = dict[str, Any]()
        for name, column in (("", 0), ("logits_", _LOGITS)):
            fields[name.strip("_") or "effect"] = real[..., column].mean(0).reshape(shape)
            fields[f"{name}interval"] = mean_interval(real[..., column]).reshape(*shape, 2)
            fields[f"{name}null"] = null[..., column].T.reshape(*shape, samples).clone()
        by_task = self.chose.by_task(real[..., 0])
        fields["by_task"] = torch.stack([x.mean(0) for x in by_task]).unflatten(1, shape)
        fields["by_task_interval"] = torch.stack([mean_interval(x) for x in by_task]).unflatten(1, shape)
        fields["claimed"] = (fields["interval"][..., 0] > layer_band(fields["null"])[1].clamp_min(0)).float()
        return fields, null_cells_record(len(drawn), n)

    def _edits(self, drawn: Sequence[int]) -> tuple[list[list[Edit]], list[list[Edit]]]:
        """Return the edits that put each head's mean at the last token, and steps as long for the heads drawn."""
        sites = list(dict.fromkeys(a.place for a in self.places))
        shown, own = (self.model.capture(t, sites, logits=False) for t in (self.chose.shown, self.chose.shuffled))
        weight = self.chose.others()
        mean = {a: _weighted(weight, shown[f"{a}@-1"]) for a in sites}  # [prompt, head, d_head]
        last = [replace(a, position=-1) for a in self.places]
        now, then = [own[str(a)] for a in last], [mean[a.place][:, a.unit] for a in last]
        edits: list[list[Edit]] = [[Replace(a, x)] for a, x in zip(last, then, strict=True)]
        steps = random_steps(drawn, len(self.places), self.samples, self.seed)
        return edits, [[RandomStep(last[i], now[i], then[i], step)] for i, _, step in steps]

    def best(self, effect: Float[Tensor, "layer head"], top: int) -> list[Address]:
        """Return the heads of the largest effects."""
        order = effect.flatten().argsort(descending=True, stable=True)[:top].tolist()
        return [self.places[i] for i in order]

    def gains(
        self, best: Sequence[Address], random: RandomSets, scales: Sequence[int]
    ) -> tuple[Float[Tensor, "task d_model"], dict[str, Any]]:
        """Add the vectors of the best heads and of random ones to bare words; return the former, and the gains."""
        parts = decompose(self.model, self.chose.shown)
        names = [f"head_out.{a.layer}.{a.unit}" for a in self.places]
        columns = [parts.labels["component"].index(name) for name in names]
        written = _weighted(self.chose.of_tasks(), parts.contribution)[:, columns]
        vector = written[:, [self.places.index(a) for a in best]].sum(1)  # [task, d_model]
        every = [vector]
        for some in random.sets:
            other = written[:, [self.places.index(a) for a in some]].sum(1)
            every.append(other * (vector.norm(dim=1) / other.norm(dim=1).clamp_min(1e-30))[:, None])
        task = self.held.task.to(vector.device)
        places = [f"resid_post.{i}@-1" for i in self.layers]
        variants = [[Add(at, v[task], coefficient=k)] for v in every for k in scales for at in places]
        values = self._measured(self.held, self.held.bare, [[], *variants])[..., :_LOGITS]
        each = (values[1:] - values[0]).unflatten(0, (len(every), len(scales), len(places)))
        each = each.permute(3, 1, 4, 2, 0)  # [prompt, scale, measure, layer, vector]
        whole = self._fields("gain", each, 1)
        own = [self._fields("gain", x, 1) for x in self.held.by_task(each)]
        by_task = {name.replace("gain", "gain_by_task"): torch.stack([x[name] for x in own]) for name in whole}
        return vector.cpu(), whole | by_task

    def removed(self, best: Sequence[Address], random: RandomSets) -> dict[str, Any]:
        """Remove the best heads, and random ones, where examples show the task; return the changes."""
        edits = removals(self.model, self.held.shown, [best, *random.sets], "mean")
        values = self._measured(self.held, self.held.shown, [[], *edits])[..., :_LOGITS]
        return self._fields("change", (values[1:] - values[0]).permute(1, 2, 0), 0)

    def baseline(self) -> dict[str, Any]:
        """Return the measures of the prompts about words held out in each condition."""
        values = [self._measured(self.held, tokens, [[]])[0, :, :_LOGITS] for tokens in self.held.conditions]
        each = self.held.by_task(torch.stack(values, 1))  # of a task: [prompt, condition, measure]
        spread = torch.stack([mean_interval(x) for x in each])  # [task, condition, measure, bound]
        spread[:, :, 0] = spread[:, :, 0].clamp(0, 1)
        spread[:, :, 1] = torch.stack([share_interval(x[..., 1]) for x in each])
        return {"baseline": torch.stack([x.mean(0) for x in each]), "baseline_interval": spread}

    def few(self) -> dict[str, str]:
        """Return the tasks with too few words held out for an interval."""
        number = self.held.task.bincount().tolist()
        return {n: "one word is held out" for n, k in zip(self.held.names, number, strict=True) if k < 2}

    def _fields(self, name: str, each: Float[Tensor, "prompt *cell draw"], measure: int) -> dict[str, Any]:
        """Return the mean, interval and null of changes, the real ones first and then those of the random draws.

        `measure` is the axis of the measures in a cell.
        """
        none = each.new_full((*each.shape[1:-1], self.samples), math.nan)
        null = each[..., 1:].mean(0) if each.shape[-1] > 1 else none
        interval = mean_interval(each[..., 0])
        interval.narrow(measure, 0, 2).clamp_(-1, 1)  # of probabilities and shares
        return {name: each[..., 0].mean(0), f"{name}_interval": interval, f"{name}_null": null}

    def _measured(
        self, some: Shots, tokens: Tokens, variants: Sequence[Variant]
    ) -> Float[Tensor, "variant prompt measure"]:
        """Return the measures of the answers of prompts under edits, and last logit(answer) − logit(foil)."""

        def columns(seen: Seen, prompt: Int[Tensor, "row"]) -> Float[Tensor, "row measure"]:
            assert seen.last_logits is not None
            logits = seen.last_logits.float()
            answer, foil = (x.to(logits.device)[prompt.to(logits.device), None] for x in (some.answer, some.foil))
            own, other = logits.gather(1, answer)[:, 0], logits.gather(1, foil)[:, 0]
            first = (logits.argmax(1) == answer[:, 0]).float()
            said = own - logits.logsumexp(1)
            return torch.stack([said.exp(), first, said, own - other], 1)

        return sweep(self.model, tokens, variants, Measure(columns, Reads())).float().cpu()


def _weighted(weight: Float[Tensor, "row prompt"], x: Float[Tensor, "prompt *rest"]) -> Float[Tensor, "row *rest"]:
    return torch.einsum("rp,p...->r...", weight.to(x.device), x.float()).to(x.dtype)
