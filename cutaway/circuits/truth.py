"""Which edges make the answer, in a model whose circuit is known?

The last row of a table whose first is chance (`circuits.random`): on a program of the zoo 1 at the edges of its circuit
and 0 at all others (docs/known_circuits.md). Whatever is asked of scores can be asked of these: faithfulness, a
certificate, agreement with what a method found.

* `score`: 1 or 0. structural: the weights make the edge part of the program. functional: its removal changes any logit
  behind any of the prompts, by any ablation. identifiable: its removal by `how` changes the metric on these prompts.
* `kept`: the edges with 1. No interval: nothing is estimated. Control (`null`): as many ones at edges drawn at random.
* Known failures: functional and identifiable truths are those of the prompts given.
* Equivalences (tests): `zoo.compiled.truth` and `interventions.edge_truth`, of which it is made.
* Cost: none for the structural truth, one forward an edge for the identifiable, and one for each ablation for the
  functional.
"""

from __future__ import annotations

from typing import Literal

import torch

from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.scoring import named
from cutaway.core.method import method
from cutaway.core.stats import generator
from cutaway.interventions.edge_truth import Ablation, functional, identifiable
from cutaway.models.edits.wiring import wiring
from cutaway.models.model import Model
from cutaway.tasks.task import Task
from cutaway.zoo.compiled.truth import structural

Kind = Literal["structural", "functional", "identifiable"]
_UNIT = "1 in the circuit"


@method(
    answers="Which edges make the answer, in a model whose circuit is known?",
    paper="Lindner et al. 2023, arXiv:2301.05062",
    cost="prompts * (0 if kind == 'structural' else 16 + 2 * cells * (7 if kind == 'functional' else 4 if how =="
    " 'resample' else 1)) * F",
    control="random_edges",
    rung="interventional",
    fills=("kept",),
)
def truth(
    model: Model,
    task: Task,
    /,
    *,
    kind: Kind = "structural",
    how: Ablation = "corrupt",
    samples: int = 4,
    seed: int = 0,
) -> EdgeScores:
    """Return the known circuit of a compiled model as scores.

    Args:
        kind: by the weights, by any effect on these prompts, or by what this ablation can find on them.
        how: what stands in for a writer's value, for the identifiable truth.
        samples: how many random circuits of the same size make the null.
        seed: of the random circuits.

    Raises:
        Refused: a model that was not compiled, or an ablation that these prompts do not allow.
    """
    w = wiring(model)
    kept = structural(model, w)[w.heard].cpu()
    if kind != "structural":
        kept = functional(model, task, w) if kind == "functional" else identifiable(model, task, w, how)
    chance = generator(seed)
    null = torch.stack([kept[torch.randperm(len(kept), generator=chance)] for _ in range(samples)], 1)
    return EdgeScores(
        score=kept.float(),
        interval=torch.full((len(kept), 2), torch.nan),
        null=null.float(),
        kept=kept,
        units={"score": _UNIT, "null": _UNIT},
        reasons={"score": "no interval: the circuit is known"},
        record={"score is": f"the {kind} truth"},
        **named(w, torch.arange(len(kept))),
    )
