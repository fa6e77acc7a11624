"""Methods that score edges, on models that learned a program and whose circuit is unknown.

    board = learned_circuits()
    board.faithfulness, board.null, board.shared

The model that learned a program has the layers and heads of the compiled one, and so the same edges, and it answers
the same prompts; but what it learned is its own. There is thus no truth here. In its stead: exact effects, one edge cut
at a time, as a reference for estimates (`first_tenth`); and prompts that no score has seen, on which all edges but the
first ones of a ranking are cut (`faithfulness`). `shared` says how much of the compiled circuit is among the first
edges, with heads of a layer renamed so that most is. Few may be right, too: a task has many circuits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.circuits.circuit import first, matched
from cutaway.circuits.evaluation import Evaluation, shares
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator
from cutaway.interventions.edge_truth import TOLERANCE, edge_effects
from cutaway.models.edits.wiring import Wiring, wiring
from cutaway.models.model import Model
from cutaway.suites.known_circuits import METHODS, How, check_programs
from cutaway.tasks.named import load as load_task
from cutaway.zoo.compiled.entry import COMPILED
from cutaway.zoo.learned.entry import LEARNED
from cutaway.zoo.load import load as load_model

SHARES = (0.1, 0.2, 0.4)
_TOP = 0.1  # share of the edges that count as the first ones
_CHANCE = 16  # random circuits, and draws of random scores
_STARTS = 8  # of the search for the best names of heads


@dataclass(frozen=True, kw_only=True)
class LearnedCircuits(Result, kind="learned_circuits"):
    """The faithfulness of circuits that methods find in models that learned programs, and whose edges they are.

    Attributes:
        faithfulness: the share of the answer that the first edges by |score| carry, on other prompts.
        interval: of `faithfulness`, 95 %, over prompts.
        null: `faithfulness` of random circuits like that of the exact method.
        first_tenth: the share of the first tenth of the edges by exact effect that are in the first tenth by |score|.
        shared: the share of the compiled circuit's edges that are among as many first ones by |score|, with heads of
            a layer named so that it is largest.
        shared_null: `shared` of random scores.
        accuracy: share of prompts that the model answers.
        edges: number of all edges, and of those that are found in the compiled program on these prompts.
    """

    page = ("first_tenth", "shared")
    faithfulness: Float[Tensor, "program method share"]
    interval: Float[Tensor, "program method share bound"]
    null: Float[Tensor, "program share sample"]
    first_tenth: Float[Tensor, "program method"]
    shared: Float[Tensor, "program method"]
    shared_null: Float[Tensor, "program sample"]
    accuracy: Float[Tensor, "program"]
    edges: Int[Tensor, "program truth"]


def learned_circuits(
    programs: Sequence[str] = (),
    *,
    n: int = 32,
    how: How = "corrupt",
    seed: int = 0,
    each: Callable[[str], None] | None = None,
) -> LearnedCircuits:
    """Run the methods of the board on models that learned programs.

    Args:
        programs: names of programs; all if empty.
        n: prompts on which edges are scored; circuits are measured on as many others.
        how: what stands in for a writer's value, as in `known_circuits`.
        seed: of the prompts, random circuits and random scores.
        each: called with the name of each program before it.

    Raises:
        Refused: no such program.
    """
    names, rows = check_programs(programs), []
    for name in names:
        if each is not None:
            each(name)
        rows.append(_row(name, n, how, seed))
    fields: dict[str, Any] = {field: torch.stack([row[field] for row in rows]) for field in rows[0]}
    carried, found = "share of m(M) − m(∅)", "share"
    return LearnedCircuits(
        **fields,
        labels={
            "program": names,
            "method": list(METHODS),
            "share": [f"{k:g}" for k in SHARES],
            "truth": ["all", "compiled"],
            "bound": BOUNDS,
        },
        units=dict.fromkeys(("faithfulness", "interval", "null"), carried)
        | dict.fromkeys(("first_tenth", "shared", "shared_null", "accuracy"), found)
        | {"edges": "edges"},
        reasons={"first_tenth": "no interval: each program is a row", "shared": "no interval: each program is a row"},
        record={"how": how, "prompts": n, "measured": f"{n} other prompts", "seed": seed, "truth": "none: see shared"},
    )


def _row(name: str, n: int, how: How, seed: int) -> dict[str, Tensor]:
    """Return the numbers of one program, by field of the result."""
    model, compiled = (load_model(f"{room}{name}") for room in (LEARNED, COMPILED))
    task, wires = load_task(name, model, n, seed), wiring(model)
    bound = load_task(name, compiled, n, seed).bind(compiled)
    effects = edge_effects(compiled, bound, wiring(compiled), how, sinks=False)  # the means that the methods take
    known = _matrix(wires, effects.abs().amax(1) > TOLERANCE)
    scores = torch.stack([run(model, task, how).score.abs().cpu() for run in METHODS.values()])  # [method, edge]
    chance = torch.randn(_CHANCE, scores.shape[1], generator=generator(seed)).abs()
    size, most = int(known.sum()), round(_TOP * scores.shape[1])
    reference = set(scores[list(METHODS).index("exact")].topk(most).indices.tolist())
    right = task.bind(model, "accuracy")
    return {
        **_carried(model, scores, n, how, seed),
        "first_tenth": torch.tensor([len(reference & set(s.topk(most).indices.tolist())) / most for s in scores]),
        "shared": torch.tensor([shared(wires, first(wires, s, size), known) for s in scores]),
        "shared_null": torch.tensor([shared(wires, first(wires, s, size), known) for s in chance]),
        "accuracy": model.measure(right.clean, right.measure).mean(),
        "edges": torch.tensor([scores.shape[1], size]),
    }


def _carried(model: Model, scores: Float[Tensor, "method edge"], n: int, how: How, seed: int) -> dict[str, Tensor]:
    """Return what the first edges of each ranking carry on prompts that it was not made on, and random circuits."""
    other = load_task(model.program.name, model, n, seed + 1)
    x = Evaluation.of(model, other, how, "noise", "all", seed)
    counts = [round(k * scores.shape[1]) for k in SHARES]
    found = [first(x.wiring, s, k) for s in scores for k in counts]
    exact = list(METHODS).index("exact") * len(SHARES)
    chance = [matched(x.wiring, m, seed + i) for m in found[exact : exact + len(SHARES)] for i in range(_CHANCE)]
    values = x.values([*x.whole_and_empty(), *found, *chance])[..., 0]
    share, interval = shares(values[2:], values[1], x.gap(*values[:2]))
    own = len(found)
    return {
        "faithfulness": share[:own].reshape(-1, len(SHARES)),
        "interval": interval[:own].reshape(-1, len(SHARES), 2),
        "null": share[own:].reshape(len(SHARES), _CHANCE),
    }


def _matrix(wires: Wiring, edges: Bool[Tensor, "edge"]) -> Bool[Tensor, "writer reader"]:
    out = torch.zeros_like(wires.heard)
    out[wires.pairs[:, 0], wires.pairs[:, 1]] = edges.cpu()
    return out


def shared(wires: Wiring, own: Bool[Tensor, "writer reader"], known: Bool[Tensor, "writer reader"]) -> float:
    """Return the share of known edges that a circuit has, with its heads renamed so that it has most.

    Heads of one layer are exchangeable. Those of one layer after the other are renamed in the best way, until nothing
    more is gained, from several starts; the best of all names may be missed.
    """
    layers, chance, best = _heads(wires), generator(0), 0
    for start in range(_STARTS):
        names = [torch.randperm(len(h), generator=chance) if start else torch.arange(len(h)) for h, _ in layers]
        before = -1
        while before < (now := _renamed(own, known, layers, names)):
            before, best = now, max(best, now)
    return best / max(1, int(known.sum()))


_Heads = tuple[Int[Tensor, "head"], Int[Tensor, "head branch"]]


def _heads(wires: Wiring) -> list[_Heads]:
    """Return for each layer the rows of its heads, and the columns of their queries, keys and values."""
    rows, columns = dict[int, list[int]](), dict[int, dict[int, list[int]]]()
    for i, a in enumerate(wires.writers):
        if a.unit is not None:
            rows.setdefault(a.layer or 0, []).append(i)
    for i, a in enumerate(wires.readers):
        if a.unit is not None:
            columns.setdefault(a.layer or 0, {}).setdefault(a.unit, []).append(i)
    return [(torch.tensor(rows[k]), torch.tensor([columns[k][h] for h in sorted(columns[k])])) for k in sorted(rows)]


def _renamed(
    own: Bool[Tensor, "writer reader"],
    known: Bool[Tensor, "writer reader"],
    layers: list[_Heads],
    names: list[Int[Tensor, "head"]],
) -> int:
    """Rename the heads of each layer in turn in the best way, and return how many known edges the circuit has then."""
    found = 0
    for i, (heads, _) in enumerate(layers):
        ways = [torch.tensor(p) for p in permutations(range(len(heads)))]
        counts = [_common(own, known, layers, [*names[:i], way, *names[i + 1 :]]) for way in ways]
        found = max(counts)
        names[i] = ways[counts.index(found)]
    return found


def _common(
    own: Bool[Tensor, "writer reader"],
    known: Bool[Tensor, "writer reader"],
    layers: list[_Heads],
    names: list[Int[Tensor, "head"]],
) -> int:
    rows, columns = torch.arange(own.shape[0]), torch.arange(own.shape[1])
    for (writers, readers), way in zip(layers, names, strict=True):
        rows[writers] = writers[way]
        columns[readers] = readers[way]
    return int((own[rows[:, None], columns] & known).sum())
