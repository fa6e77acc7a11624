"""Which heads and neurons do sums, and do other sums and word problems need the same?

The study of Yu & Ananiadou 2024 (arXiv:2409.14144) for sums of single digits with a result of one digit, `3 + 5 =`, and
for each of the `operations` alone:

1. Every head is set to zero. `effect[operation, layer, head]` is the change of the answer's probability.
2. The `key_heads` whose removal costs most are key heads (`key`: their effect on prompts that did not choose them).
   `shared[operation, other]`: the change in problems of the other when all key heads of the operation are removed.
3. Neurons that they trigger: the largest fall of importance when they are removed (`score`, see `neurons.importance`).
4. `masked` and `kept`: probability of the answer and its share of top-1 with the first `sizes` of these neurons set to
   zero at the last token, or with all other neurons set to zero there. `untouched`: without an edit.
5. `words_masked`: the same neurons masked in word problems (`Tom had 3 and got 5. Now Tom has`).

* Every second problem chooses heads and neurons; 2 to 5 are measured on the others, but for `words`, which are of all.
* `interval`: 95 %, over problems. Control: `null` has a step as long as the removal's in a random direction;
  `key_null` removes another head and `shared_null` random sets of others, as many of each layer where enough are left;
  `score_null` is of other neurons of the same layer; the nulls of what is masked and kept are of as many random ones of
  each layer.
* Nothing is learned from a model that cannot do an operation: read `untouched` and `words_untouched` first.
* Known failures: zero lies outside of what later layers have seen. Heads that stand in for each other hide each other.
* Cost: 1 + samples forwards a head, 4 · (1 + samples) for each size and 1 + samples for each operation, for every
  operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.interventions.ablation_values import removal
from cutaway.interventions.components import RandomSets, random_heads
from cutaway.interventions.null_cells import NULL_CELLS, draw_cells, null_cells_record, null_of_steps, random_steps
from cutaway.models.edits.library import Ablate
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.neurons import memories
from cutaway.neurons.contributions import Answers, Steps
from cutaway.neurons.importance import MEASURES, curves, halves, mask_and_keep, most_masked, others, rank, right
from cutaway.tasks.answers import check_predicts
from cutaway.tasks.bound import Bound
from cutaway.tasks.pair import Pair
from cutaway.tasks.task import Task

_CANDIDATES = 1024  # neurons whose importance is exact


@dataclass(frozen=True)
class Operation:
    """An operation on two digits.

    Attributes:
        result: returns the result; None where it is not a digit.
        words: a word problem about it.
    """

    result: Callable[[int, int], int | None]
    words: str

    def problems(self) -> list[tuple[int, int, int]]:
        """Return all pairs of digits with their result, in a fixed random order."""
        found = [
            (a, b, r) for a in range(10) for b in range(10) if (r := self.result(a, b)) is not None and 0 <= r < 10
        ]
        Random(0).shuffle(found)
        return found


OPERATIONS: dict[str, Operation] = {
    "+": Operation(lambda a, b: a + b, "Tom had {a} and got {b}. Now Tom has"),
    "-": Operation(lambda a, b: a - b, "Tom had {a} and lost {b}. Now Tom has"),
    "*": Operation(lambda a, b: a * b, "Tom had {a} boxes of {b}. In all Tom has"),
    "/": Operation(lambda a, b: a // b if b and a % b == 0 else None, "Tom gave {a} to {b} friends. Each one got"),
}


@dataclass(frozen=True, kw_only=True)
class ArithmeticStudy(Result, kind="arithmetic_study"):
    """Heads and neurons that sums need, operation by operation.

    Attributes:
        effect: change of the answer's probability without a head.
        interval: of `effect`, 95 %, over problems.
        null: `effect` of a step of the same length in a random direction.
        untouched: probability of the answer and its share of top-1, without an edit.
        key: `effect` of the key heads on problems that did not choose them; the labels have their names.
        key_interval: of `key`, 95 %, over problems.
        key_null: `key` of other heads, of the same layer where any is left.
        shared: change of the answer's probability in problems of each operation without all key heads of one.
        shared_interval: of `shared`, 95 %, over problems.
        shared_null: `shared` without random sets of as many other heads.
        score: fall of a neuron's importance without the key heads; the labels have their names.
        score_interval: of `score`, 95 %, over problems.
        score_null: `score` of other neurons of the same layer.
        masked: probability and top-1 with the first neurons set to zero.
        masked_interval: of `masked`, 95 %, over problems.
        masked_null: `masked` with as many random neurons of each layer.
        kept: the same with all others set to zero.
        kept_interval: of `kept`, 95 %, over problems.
        kept_null: `kept` with as many random neurons of each layer.
        words_untouched: `untouched` of word problems.
        words_masked: `masked` of word problems.
        words_masked_interval: of `words_masked`, 95 %, over problems.
        words_masked_null: `words_masked` with as many random neurons of each layer.
    """

    effect: Float[Tensor, "operation layer head"]
    interval: Float[Tensor, "operation layer head bound"]
    null: Float[Tensor, "operation layer head sample"]
    untouched: Float[Tensor, "operation measure"]
    key: Float[Tensor, "operation rank"]
    key_interval: Float[Tensor, "operation rank bound"]
    key_null: Float[Tensor, "operation rank sample"]
    shared: Float[Tensor, "operation other"]
    shared_interval: Float[Tensor, "operation other bound"]
    shared_null: Float[Tensor, "operation other sample"]
    score: Float[Tensor, "operation neuron"]
    score_interval: Float[Tensor, "operation neuron bound"]
    score_null: Float[Tensor, "operation neuron sample"]
    masked: Float[Tensor, "operation measure size"]
    masked_interval: Float[Tensor, "operation measure size bound"]
    masked_null: Float[Tensor, "operation measure size sample"]
    kept: Float[Tensor, "operation measure size"]
    kept_interval: Float[Tensor, "operation measure size bound"]
    kept_null: Float[Tensor, "operation measure size sample"]
    words_untouched: Float[Tensor, "operation measure"]
    words_masked: Float[Tensor, "operation measure size"]
    words_masked_interval: Float[Tensor, "operation measure size bound"]
    words_masked_null: Float[Tensor, "operation measure size sample"]


@method(
    answers="Which heads and neurons do sums, and do other sums and word problems need the same?",
    paper="Yu & Ananiadou 2024, arXiv:2409.14144",
    cost="operation * prompts * (21 + layers * heads * (1 + samples) + (operation + 4 * size) * (1 + samples)) * F",
    control="random_heads_and_neurons",
    rung="interventional",
)
def arithmetic(
    model: Model,
    /,
    *,
    operations: tuple[str, ...] = ("+", "-"),
    prompts: int = 24,
    shots: int = 0,
    key_heads: int = 2,
    sizes: tuple[int, ...] = (3, 10),
    layers: tuple[int, ...] = (),
    samples: int = 3,
    null_cells: int = NULL_CELLS,
    seed: int = 0,
) -> ArithmeticStudy:
    """Find the heads and neurons that sums of single digits need, and mask or keep the neurons.

    Args:
        operations: among + - * and /.
        prompts: how many problems of each.
        shots: how many solved problems stand before each.
        key_heads: how many heads are removed to find the neurons that they trigger.
        sizes: how many neurons are masked or kept.
        layers: look only at heads and neurons of these, and silence only others of these; all if empty.
        samples: how many random steps, neurons and sets make the nulls.
        null_cells: at how many heads, drawn at random, random steps are made; NaN elsewhere (0: at all of them).
        seed: of what is drawn.

    Raises:
        Refused: another operation, an encoder, a layer without a dense MLP, or more neurons than half of a layer's.
    """
    check_predicts(model)
    _check_known(operations)
    there = memories.dense_layers(model, layers)
    most_masked(model, sizes)
    heads = [a for a in model.places("z.*.*") if not layers or a.layer in there]
    found, drawn = list[dict[str, Any]](), draw_cells(range(len(heads)), null_cells, generator(seed))
    asked, removed, why = list[Bound](), list[list[Address]](), dict[str, str]()
    for name in operations:
        bound, words = (t.narrow(model).bind(model, "prob") for t in problems(name, max(prompts, 1), shots))
        effects, key, none = _heads(model, bound, heads, drawn, max(key_heads, 1), samples, seed)
        found.append(effects | _neurons(model, bound, words, there, key, sizes, samples, seed))
        asked.append(halves(bound)[1])
        removed.append(key)
        why |= none
    n, random = len(asked[-1]), [random_heads(heads, key, samples, seed) for key in removed]
    why |= next(({"shared": r.why} for r in random if r.why), {})
    names = {f: [part.pop(f"{f} names") for part in found] for f in ("key", "score")}
    fields: dict[str, Any] = {field: torch.stack([part[field] for part in found]) for field in found[0]}
    fields |= _shared(model, asked, removed, random, samples)
    return ArithmeticStudy(
        **fields,
        labels={
            **{axis: [*operations] for axis in ("operation", "other")},
            "layer": list(dict.fromkeys(a.layer for a in heads)),
            "measure": MEASURES,
            "size": [*sizes],
            "bound": BOUNDS,
            **names,
        },
        units=dict.fromkeys(("effect", "key", "shared"), "probability")
        | {"score": "nats", "masked": "share", "kept": "share"},
        reasons=one_prompt(len(bound), "effect") | one_prompt(n, "key", "shared", "score", "masked", "kept") | why,
        record={
            "split": f"every second problem chose heads and neurons, measured on the other {n}",
            "removed": "set to zero: heads everywhere, neurons at the last token",
            "problems": len(bound),
            "random sets": {name: r.matched or r.why for name, r in zip(operations, random, strict=True)},
        }
        | null_cells_record(len(drawn), len(heads)),
    )


def problems(name: str, n: int, shots: int = 0) -> tuple[Task, Task]:
    """Return problems of an operation as a task, and the same as word problems.

    The corrupt prompt is another problem, with another result.
    """
    row = OPERATIONS[name]
    every = row.problems()
    head = "".join(f"{a} {name} {b} = {r}\n" for a, b, r in every[len(every) - shots :] if shots)
    plain, words = list[Pair](), list[Pair]()
    asked = every[: max(1, min(n, len(every) - shots))]
    for i, (a, b, r) in enumerate(asked):
        c, d, wrong = next(p for p in [*every[i:], *every] if p[2] != r)
        texts = [f"{head}{x} {name} {y} =" for x, y in ((a, b), (c, d))]
        said = [row.words.format(a=x, b=y) for x, y in ((a, b), (c, d))]
        plain.append(Pair(texts[0], texts[1], str(r), str(wrong)))
        words.append(Pair(said[0], said[1], str(r), str(wrong)))
    return Task(f"{name} of digits", tuple(plain)), Task(f"{name} in words", tuple(words))


def _check_known(operations: Sequence[str]) -> None:
    """Refuse an operation without a row in `OPERATIONS`."""
    if unknown := [o for o in operations if o not in OPERATIONS]:
        raise Refused(
            Keyword("operations", ",".join(unknown)), "no operation has that sign", f"use {', '.join(OPERATIONS)}"
        )


def _heads(
    model: Model, bound: Bound, places: Sequence[Address], drawn: Sequence[int], n: int, samples: int, seed: int
) -> tuple[dict[str, Any], list[Address], dict[str, str]]:
    """Remove every head, and return the effects, the key heads, and why these have no null."""
    r, count = removal(model, bound, places, "zero", seed), len(places)
    chance = [[r.random(places[i], step)] for i, _, step in random_steps(drawn, count, samples, seed)]
    values, random = r.swept(model, lambda donor: [[r.edit(a, donor)] for a in places], chance)
    each = (values - r.clean.cpu()).T  # [prompt, head]
    null = null_of_steps((random - r.clean.cpu()).mean(-1), drawn, count, samples)
    first, second = ([bound.pairs.index(p) for p in part.pairs] for part in halves(bound))
    order = each[first].mean(0).argsort(stable=True)[:n].tolist()
    key, shape, held = [places[i] for i in order], (len({a.layer for a in places}), -1), each[second]
    key_null, why = _key_null(dict(zip(places, held.mean(0), strict=True)), key, samples, seed)
    found = {
        "effect": each.mean(0).reshape(shape),
        "interval": mean_interval(each).reshape(*shape, 2),
        "null": null.T.reshape(*shape, samples).clone(),
        "key": held[:, order].mean(0),
        "key_interval": mean_interval(held[:, order]),
        "key_null": key_null,
        "key names": [f"{a.layer}.{a.unit}" for a in key],
    }
    return found, key, why


def _key_null(
    effect: Mapping[Address, Tensor], key: Sequence[Address], samples: int, seed: int
) -> tuple[Float[Tensor, "rank sample"], dict[str, str]]:
    """Return effects of other heads, drawn for each key head, and if there are none, why."""
    null, why = torch.full((len(key), samples), torch.nan), dict[str, str]()
    for place, head in enumerate(key):
        random = random_heads([a for a in effect if a == head or a not in key], [head], samples, seed)
        null[place, : len(random.sets)] = torch.tensor([float(effect[other]) for (other,) in random.sets])
        why |= {"key": random.why} if random.why else {}
    return null, why


def _shared(
    model: Model,
    asked: Sequence[Bound],
    removed: Sequence[Sequence[Address]],
    random: Sequence[RandomSets],
    samples: int,
) -> dict[str, Tensor]:
    """Remove the key heads of each operation, and random sets of others, in the problems of every operation."""
    shape = len(removed), len(asked)
    sets = [[key, *r.sets] for key, r in zip(removed, random, strict=True)]
    edits = [[Ablate(a) for a in heads] for some in sets for heads in some]
    value, null = torch.empty(shape), torch.full((*shape, samples), torch.nan)
    interval = torch.empty(*shape, 2)
    for o, bound in enumerate(asked):
        values = sweep(model, bound.clean, [[], *edits], bound.measure).float().cpu()
        for i, own in enumerate((values[1:] - values[0]).split([len(some) for some in sets])):
            value[i, o], interval[i, o] = own[0].mean(), mean_interval(own[0])
            null[i, o, : len(own) - 1] = own[1:].mean(1)
    return {"shared": value, "shared_interval": interval, "shared_null": null}


def _neurons(
    model: Model,
    bound: Bound,
    words: Bound,
    layers: Sequence[int],
    key: Sequence[Address],
    sizes: Sequence[int],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """Return the neurons that key heads trigger, masked and kept in sums, and masked in word problems."""
    edits, (first, second) = [Ablate(a) for a in key], halves(bound)
    chosen, _ = rank(model, first, layers, edits, max(sizes), _CANDIDATES)
    drawn = others(model, chosen, chosen, samples, seed)
    every, k = [*chosen, *(x for row in drawn for x in row)], len(chosen)
    answers = Answers(model, right(second))
    clean, without = (answers.added(Steps.of(model, second.clean, layers, e), every) for e in ((), edits))
    score = clean - without
    before, swept = mask_and_keep(model, second, layers, chosen, sizes, samples, seed)
    told, swept_words = mask_and_keep(model, words, layers, chosen, sizes, samples, seed)
    out: dict[str, Any] = {
        "untouched": before.mean(0),
        "words_untouched": told.mean(0),
        "score": score[:, :k].mean(0),
        "score_interval": mean_interval(score[:, :k]),
        "score_null": score[:, k:].mean(0).unflatten(0, (samples, k)).T.clone(),
        "score names": [memories.label(x) for x in chosen],
    }
    for name, values in zip(("masked", "kept", "words_masked"), (*swept, swept_words[0]), strict=True):
        out |= curves(name, values)
    return out
