"""Methods that score edges, held against programs whose circuits are known.

    board = known_circuits()
    board.auroc, board.ceiling, board.null

A method is judged by the edges that its ablation can find on its prompts (`interventions.edge_truth`): an edge along
which clean and corrupt text say the same is part of the program, and no exchange of the two can find it. The structural
circuit stands beside, so that one sees what the prompts hide.

Edges without a part in a program have no effect at all, so any trace of a gradient ranks above them. `seen` says how
many edges have more than a trace, and `noise` adds random numbers to all weights, above which a score must then stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.circuits.acdc import acdc
from cutaway.circuits.clean_corrupted import clean_corrupted
from cutaway.circuits.eap import eap
from cutaway.circuits.eap_ig import eap_ig
from cutaway.circuits.eap_ig_activations import eap_ig_activations
from cutaway.circuits.edge_pruning import edge_pruning
from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.exact import exact
from cutaway.circuits.information_flow import information_flow
from cutaway.circuits.mask_gradients import mask_gradients
from cutaway.circuits.relp import relp
from cutaway.core.refuse import Refused, nearest
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator
from cutaway.interventions.edge_truth import TOLERANCE, edge_effects
from cutaway.interventions.probes import auroc, auroc_interval
from cutaway.models.edits.wiring import wiring
from cutaway.models.model import Model
from cutaway.tasks.named import load as load_task
from cutaway.tasks.prompts import Prompts, as_prompts
from cutaway.tasks.task import Task
from cutaway.zoo.compiled.entry import COMPILED
from cutaway.zoo.compiled.programs import PROGRAMS
from cutaway.zoo.compiled.truth import structural
from cutaway.zoo.load import load as load_model

How = Literal["corrupt", "zero", "mean"]
Scorer = Callable[[Model, Task, How], EdgeScores]
_ESTIMATES = (eap, eap_ig, eap_ig_activations, clean_corrupted, relp, mask_gradients, acdc)
_STEPS = 80  # of edge pruning
_SHARES = ("edge_pruning", "information_flow")  # whose scores are no effects, so that `seen` says nothing of them


def _estimate(method: Callable[..., EdgeScores], model: Model, task: Task, how: How) -> EdgeScores:
    return method(model, task, how=how, audit=0, samples=1)


def _clean(task: Task) -> Prompts:
    return as_prompts([p.clean for p in task.pairs])


#: the methods of the board, by name: what they are is measured, not how sure they are of it, so controls are left out
METHODS: dict[str, Scorer] = {
    "exact": lambda model, task, how: exact(model, task, how=how, samples=1, null_cells=1),
    **{m.__name__: partial(_estimate, m) for m in _ESTIMATES},
    "edge_pruning": lambda model, task, how: edge_pruning(model, task, how=how, steps=_STEPS, audit=0, samples=1),
    "information_flow": lambda model, task, how: information_flow(model, _clean(task), samples=1),
}
_CHANCE = 64  # draws of random scores
_TRACE = 0.05  # of its exact effect: an edge of a smaller score is not seen


@dataclass(frozen=True, kw_only=True)
class KnownCircuits(Result, kind="known_circuits"):
    """The AUROC of methods that score edges, at programs whose circuits are known.

    Attributes:
        auroc: share of pairs of an identifiable edge and one that is not that |score| puts in order.
        interval: of `auroc`, 95 %, over edges.
        null: `auroc` of random scores.
        ceiling: `auroc` of the exact effects that the truth is made of, each the mean over prompts.
        structural: share of pairs of a structural edge and one that is not that |score| puts in order.
        seen: share of identifiable edges with a |score| above a twentieth of their exact effect; NaN of
            methods whose scores are no effects.
        accuracy: share of prompts that the model answers.
        edges: number of all, of structural and of identifiable edges.
    """

    page = ("seen", "ceiling")
    auroc: Float[Tensor, "program method"]
    interval: Float[Tensor, "program method bound"]
    null: Float[Tensor, "program sample"]
    ceiling: Float[Tensor, "program"]
    structural: Float[Tensor, "program method"]
    seen: Float[Tensor, "program method"]
    accuracy: Float[Tensor, "program"]
    edges: Int[Tensor, "program truth"]


def known_circuits(
    programs: Sequence[str] = (),
    *,
    n: int = 32,
    how: How = "corrupt",
    noise: float = 0.0,
    seed: int = 0,
    each: Callable[[str], None] | None = None,
) -> KnownCircuits:
    """Hold the methods of the board against the circuits of programs.

    Args:
        programs: names of programs; all if empty.
        n: prompts of each program, on which the truth is found and methods run.
        how: what stands in for a writer's value: that of the counterfactual, zeros, or the mean over tokens but each
            prompt's first, which stays.
        noise: standard deviation of random numbers that are added to all matrices of weights; the truth stays that of
            the weights without them.
        seed: of the prompts, of random scores and of the noise.
        each: called with the name of each program before it.

    Raises:
        Refused: no such program.
    """
    names, rows = check_programs(programs), []
    for name in names:
        if each is not None:
            each(name)
        rows.append(_row(name, n, how, noise, seed))
    scores = ("auroc", "interval", "null", "ceiling", "structural")
    fields: dict[str, Any] = {field: torch.stack([row[field] for row in rows]) for field in rows[0]}
    return KnownCircuits(
        **fields,
        labels={
            "program": names,
            "method": list(METHODS),
            "truth": ["all", "structural", "identifiable"],
            "bound": BOUNDS,
        },
        units=dict.fromkeys(scores, "AUROC") | {"edges": "edges", "seen": "share", "accuracy": "share"},
        reasons={"ceiling": "no interval: it is what the truth itself scores"},
        record={"how": how, "prompts": n, "noise": noise, "seed": seed, "an effect counts beyond": TOLERANCE},
    )


def check_programs(names: Sequence[str]) -> list[str]:
    """Return the names of programs; of all, if there are none.

    Raises:
        Refused: no such program.
    """
    for name in names:
        if name not in PROGRAMS:
            close = nearest(name, PROGRAMS)
            why = "no program has that name" + (f"; did you mean {close}?" if close else "")
            raise Refused(f"program {name!r}", why, f"use some of {', '.join(PROGRAMS)}")
    return list(names or PROGRAMS)


def _row(name: str, n: int, how: How, noise: float, seed: int) -> dict[str, Tensor]:
    """Return the numbers of one program, by field of the result."""
    model = load_model(f"{COMPILED}{name}")
    task, wires = load_task(name, model, n, seed), wiring(model)
    effects = edge_effects(model, task.bind(model), wires, how, sinks=False)  # the means that the methods take
    found, mean = effects.abs().amax(1) > TOLERANCE, effects.mean(1).abs()
    built = structural(model, wires)[wires.heard]
    asked = _noisy(model, noise, seed) if noise else model
    right = task.bind(asked, "accuracy")
    scores = torch.stack([run(asked, task, how).score.abs().cpu() for run in METHODS.values()])  # [method, edge]
    effect = torch.tensor([name not in _SHARES for name in METHODS])
    chance = torch.randn(_CHANCE, len(found), generator=generator(seed)).abs()
    return {
        "auroc": auroc(scores, found).float(),
        "interval": auroc_interval(scores, found, torch.arange(len(found))).float(),
        "null": auroc(chance, found).float(),
        "ceiling": auroc(mean[None], found)[0].float(),
        "structural": auroc(scores, built).float(),
        "seen": (scores > _TRACE * mean)[:, found].float().mean(1).where(effect, torch.nan),
        "accuracy": asked.measure(right.clean, right.measure).mean(),
        "edges": torch.tensor([len(found), int(built.sum()), int(found.sum())]),
    }


def _noisy(model: Model, noise: float, seed: int) -> Model:
    """Return a copy of a compiled model with random numbers added to its matrices."""
    hf, tokenizer = model.program.model()
    chance = generator(seed)
    for weight in hf.parameters():
        if weight.ndim == 2:
            weight.add_(noise * torch.randn(weight.shape, generator=chance))
    copy = load_model(hf, tokenizer=tokenizer, name=f"{model.name} (noise {noise:g})", check=False)
    copy.program = model.program
    return copy
