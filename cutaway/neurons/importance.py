"""Which neurons raise the answer, and does the model need them or get by with them alone?

Comparative Neuron Analysis (Yu & Ananiadou 2024, arXiv:2409.14144). At the last token a neuron adds c·v to the stream h
of its layer, which holds everything but the output of its MLP:

    importance = log p(answer | h + c·v) − log p(answer | h)

both read through the final norm, with its scale of this run, and the unembedding.

* `score[neuron]`: importance − importance in the comparison, mean over prompts, in nats. The comparison is the corrupt
  prompt, with the same answer; with `heads`, the clean prompt with these heads set to zero: neurons that they trigger.
* `importance`, `coefficient`: mean over clean prompts; `coefficient_compared`: c in the comparison.
* `masked[measure, size]`: the answer's probability, and its share of top-1, with the `size` first neurons set to zero
  at the last token. `kept`: with all others of `layers` set to zero there. `untouched[measure]`: without an edit.
* Half of the prompts choose neurons (every second one); all numbers are of the others. With one prompt, both are it.
* `interval`: 95 %, over prompts (Wilson's of shares). Control: `null` has other neurons of the same layer,
  `masked_null` and `kept_null` as many random neurons of each layer.
* Importance is exact for the `candidates` with the largest derivatives of log p (0: all). Without a soft cap log p is
  concave, so a derivative is an upper bound; the record has the largest that was left out.
* Of several right tokens, probabilities add up; a derivative is then no bound.
* Known failures: only direct paths count: a neuron that works through later layers is not seen. Zero lies outside of
  what later layers have seen. With all neurons silent at the last token `kept` is a model that hardly works.
* Equivalence (test): h and all steps of the last layer give the model's own logits.
* Cost: 5 forwards, and 2 + 2 · samples for each size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.refuse import Code, Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt, share_interval
from cutaway.interventions.components import components
from cutaway.models.edits.library import Ablate
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import halves as rows_of_halves
from cutaway.neurons import contributions, memories
from cutaway.neurons.contributions import Answers, Steps
from cutaway.neurons.memories import Neuron
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task

MEASURES = ["probability", "top-1"]


@dataclass(frozen=True, kw_only=True)
class NeuronImportance(Result, kind="neuron_importance"):
    """Neurons that raise the answer, the largest score first, and the model without them or with them alone.

    Attributes:
        score: importance minus importance in the comparison.
        interval: of `score`, 95 %, over prompts.
        null: `score` of other neurons of the same layer.
        importance: increase of the answer's log-probability by the neuron's step.
        coefficient: activation at the last token.
        coefficient_compared: activation in the comparison.
        masked: the answer's probability and its share of top-1 with the first neurons set to zero.
        masked_interval: of `masked`, 95 %, over prompts.
        masked_null: `masked` with as many random neurons of each layer.
        kept: the same with all others set to zero.
        kept_interval: of `kept`, 95 %, over prompts.
        kept_null: `kept` with as many random neurons of each layer.
        untouched: the same without an edit.
    """

    score: Float[Tensor, "neuron"]
    interval: Float[Tensor, "neuron bound"]
    null: Float[Tensor, "neuron sample"]
    importance: Float[Tensor, "neuron"]
    coefficient: Float[Tensor, "neuron"]
    coefficient_compared: Float[Tensor, "neuron"]
    masked: Float[Tensor, "measure size"]
    masked_interval: Float[Tensor, "measure size bound"]
    masked_null: Float[Tensor, "measure size sample"]
    kept: Float[Tensor, "measure size"]
    kept_interval: Float[Tensor, "measure size bound"]
    kept_null: Float[Tensor, "measure size sample"]
    untouched: Float[Tensor, "measure"]


@method(
    answers="Which neurons raise the answer, and does the model need them or get by with them alone?",
    paper="Yu & Ananiadou 2024, arXiv:2409.14144",
    cost="prompts * (5 + 2 * size * (1 + samples)) * F",
    control="random_neurons",
    rung="interventional",
)
def importance(
    model: Model,
    task: Task,
    /,
    *,
    heads: tuple[str, ...] = (),
    layers: tuple[int, ...] = (),
    sizes: tuple[int, ...] = (1, 3, 10),
    candidates: int = 1024,
    samples: int = 5,
    seed: int = 0,
) -> NeuronImportance:
    """Rank neurons by what they add to the answer, and mask or keep the first of them.

    Args:
        heads: compare with the clean prompt without these, as `layer.head`: `3.1,5.2`; without, with the corrupt one.
        layers: look only at neurons of these, and silence only others of these; all if empty.
        sizes: how many neurons are masked or kept; as many as the largest are reported.
        candidates: how many neurons are scored exactly (0: all).
        samples: how many other neurons, and how many random sets of each size, make the nulls.
        seed: of both.

    Raises:
        Refused: no such head or layer, answers of several tokens, more neurons than half of a layer's can be masked,
            or logits that do not follow from the stream.
    """
    bound, where = task.bind(model, "prob"), memories.dense_layers(model, layers)
    if bound.clean.tails:
        why = "some answers have several tokens, of which a step adds to the first only"
        raise Refused("importance of neurons", why, ("use ", Code("task.narrow(model)")))
    first, second = halves(bound)
    compared = [Ablate(a) for a in components(model, heads)] if heads else None
    most = most_masked(model, sizes)
    chosen, left_out = rank(model, first, where, compared, most, candidates or len(where) * model.shape.d_mlp)
    return _result(model, second, where, compared, chosen, sizes, samples, seed, left_out, first is not second)


def most_masked(model: Model, sizes: Sequence[int]) -> int:
    """Return the largest of the sizes.

    Raises:
        Refused: it is more than half of a layer's neurons, so that a layer may have too few others; or one is 0.
    """
    most = model.shape.d_mlp // 2
    if not sizes or min(sizes) < 1 or max(sizes) > most:
        why = f"half of the {model.shape.d_mlp} neurons of a layer are {most}, and random ones are drawn from the rest"
        raise Refused(Keyword("sizes", ",".join(map(str, sizes))), why, "write for example 1,3,10")
    return max(sizes)


def halves(bound: Bound) -> tuple[Bound, Bound]:
    """Return every second prompt and the others; both all of them if there is one. Equal prompts stay together."""
    first, second = rows_of_halves(bound.clean)
    return (bound.rows(first), bound.rows(second)) if first != second else (bound, bound)


def right(bound: Bound) -> Int[Tensor, "prompt choice"]:
    """Return the tokens that count as right, filled up with −1."""
    return bound.answers[:, None] if bound.answer_sets is None else bound.answer_sets


def both_runs(model: Model, bound: Bound, layers: Sequence[int], compared: Sequence[Any] | None) -> tuple[Steps, Steps]:
    """Return the clean run and the one it is compared with: the corrupt one, or the clean one under edits."""
    clean = Steps.of(model, bound.clean, layers)
    if compared is None:
        return clean, Steps.of(model, bound.corrupt, layers)
    return clean, Steps.of(model, bound.clean, layers, compared)


def rank(
    model: Model, bound: Bound, layers: Sequence[int], compared: Sequence[Any] | None, most: int, candidates: int
) -> tuple[list[Neuron], dict[str, Any]]:
    """Return the neurons of largest score on some prompts, and what is known of those not scored exactly."""
    answers, (clean, other) = Answers(model, right(bound)), both_runs(model, bound, layers, compared)
    bounds = answers.first_order(clean).mean(0).flatten()
    order = bounds.argsort(descending=True, stable=True)
    width = clean.weight.shape[-1]
    some = [(clean.layers[i // width], i % width) for i in order[: max(candidates, most)].tolist()]
    score = (answers.added(clean, some) - answers.added(other, some)).mean(0)
    chosen = [some[i] for i in score.argsort(descending=True, stable=True)[:most].tolist()]
    rest = order[len(some) :]
    said: dict[str, Any] = {"scored exactly": len(some), "of neurons": len(order)}
    if len(rest):
        name = "importance of the others, at most" if answers.concave else "largest derivative of the others"
        said[name] = float(bounds[rest].max())
    return chosen, said


def others(model: Model, chosen: Sequence[Neuron], of: Sequence[Neuron], samples: int, seed: int) -> list[list[Neuron]]:
    """Return random neurons that are not `chosen`, for each of some in its layer, once a sample."""
    g, out = generator(seed), list[list[Neuron]]()
    free = {
        i: [n for n in range(model.shape.d_mlp) if (i, n) not in set(chosen)] for i in dict.fromkeys(i for i, _ in of)
    }
    for _ in range(samples):
        drawn = {i: iter(torch.randperm(len(pool), generator=g).tolist()) for i, pool in free.items()}
        out.append([(i, free[i][next(drawn[i])]) for i, _ in of])
    return out


def mask_and_keep(
    model: Model,
    bound: Bound,
    layers: Sequence[int],
    chosen: Sequence[Neuron],
    sizes: Sequence[int],
    samples: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return probability and top-1 of the answer without an edit [prompt, measure], and with the first neurons or as
    many random ones [way, size, 1 + sample, prompt, measure].
    """
    variants = list[list[Any]]([[]])
    for way in (contributions.mask, lambda m, sets: contributions.keep(m, sets, layers)):
        for size in sizes:
            sets = [[*chosen[:size]], *others(model, chosen, chosen[:size], samples, seed)]
            variants += [way(model, s) for s in sets]

    def both(logits: Tensor, prompt: Tensor) -> Tensor:
        ids = right(bound).to(logits.device)[prompt.to(logits.device)]
        p = logits.float().softmax(-1).gather(1, ids.clamp_min(0)).masked_fill(ids < 0, 0.0).sum(-1)
        return torch.stack([p, (logits.argmax(-1)[:, None] == ids).any(-1).float()], -1)

    values = sweep(model, bound.clean, variants, both).float().cpu()
    return values[0], values[1:].unflatten(0, (2, len(sizes), 1 + samples))


def curves(name: str, values: Float[Tensor, "size variant prompt measure"]) -> dict[str, Any]:
    """Return the fields of a curve over sizes: its mean, interval and null. The first variant is the real one."""
    bounds = [mean_interval(values[:, 0, :, 0].T, within=(0.0, 1.0)), share_interval(values[:, 0, :, 1].T)]
    return {
        name: values[:, 0].mean(1).T.clone(),
        f"{name}_interval": torch.stack(bounds),
        f"{name}_null": values[:, 1:].mean(2).permute(2, 0, 1).clone(),
    }


def _result(
    model: Model,
    bound: Bound,
    layers: Sequence[int],
    compared: Sequence[Any] | None,
    chosen: list[Neuron],
    sizes: Sequence[int],
    samples: int,
    seed: int,
    said: dict[str, Any],
    apart: bool,
) -> NeuronImportance:
    answers, (clean, other) = Answers(model, right(bound)), both_runs(model, bound, layers, compared)
    drawn = others(model, chosen, chosen, samples, seed)
    every = [*chosen, *(n for row in drawn for n in row)]
    own, less = answers.added(clean, every), answers.added(other, every)
    score, k = own - less, len(chosen)
    at = (slice(None), [clean.layers.index(i) for i, _ in chosen], [n for _, n in chosen])
    before, swept = mask_and_keep(model, bound, layers, chosen, sizes, samples, seed)
    fields = curves("masked", swept[0]) | curves("kept", swept[1])
    n = len(bound)
    split = f"every second prompt chose the neurons, measured on the other {n}" if apart else "measured on all prompts"
    against = "the corrupt prompt" if compared is None else "the clean prompt without the named heads"
    return NeuronImportance(
        score=score[:, :k].mean(0),
        interval=mean_interval(score[:, :k]),
        null=score[:, k:].mean(0).unflatten(0, (samples, k)).T,
        importance=own[:, :k].mean(0),
        coefficient=clean.coefficient[at].mean(0),
        coefficient_compared=other.coefficient[at].mean(0),
        untouched=before.mean(0),
        **fields,
        labels={
            "neuron": [memories.label(x) for x in chosen],
            "measure": MEASURES,
            "size": [*sizes],
            "bound": BOUNDS,
        },
        units={"score": "nats", "interval": "nats", "null": "nats", "importance": "nats"}
        | dict.fromkeys(("masked", "kept", "untouched"), "share"),
        reasons=one_prompt(n, "score", "masked", "kept"),
        record={"split": split, "compared with": against, "position": -1, "silenced": "set to zero"} | said,
    )
