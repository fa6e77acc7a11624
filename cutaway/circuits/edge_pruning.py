"""Which share of the edges keeps the model's predictions best, when a mask over all of them is trained at once?

Edge pruning (Bhaskar et al. 2024, arXiv:2406.16778). Every edge has a hard concrete gate, and so has every head and
MLP, for all edges that leave it; an edge passes what both let through. They are trained to keep the model's predictions
while the share of closed edges is driven to a target.

* Loss: KL(model ‖ masked run) + λ₁ (s − t) + λ₂ (s − t)², s the expected share of closed edges; t rises to `target`
  over the first five sixths of the steps, and λ₁, λ₂ climb as the gates descend.
* `score` of u → v: the probability that the edge is open, in the end. It has no sign: an edge that works against the
  answer is part of the model's prediction too. `kept`: the 1 − `target` of all edges with the largest scores.
* Trained on one half of the prompts; the record says what the circuit is worth on the other. No interval: one mask is
  trained for all prompts. Control (`null`): scores of gates that are trained with alternative values as far from the
  clean ones in random directions, drawn anew in each step.
* Audit: `exact` is the measured score of `audit` edges cut alone, on the other half, as in `circuits.exact`.
* Known failures: another seed gives another mask where edges stand in for each other; few steps leave gates undecided
  (scores that are neither near 0 nor near 1).
* Equivalences (tests): the gradient of the loss by hand; another seed finds the circuit of a compiled program too.
* Cost: a forward and a backward a step for up to 16 prompts, 1 + `samples` times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.hard_concrete import START, draw, openness, settle, with_embeddings
from cutaway.circuits.mask_training import COST, searched
from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.interventions.ablation_values import Baseline
from cutaway.models.edits.wiring import Wiring, wiring
from cutaway.models.model import Model
from cutaway.tasks.task import Task

_WARMUP = 5 / 6  # the share of the steps over which the target rises


@method(
    answers="Which share of the edges keeps the model's predictions best, when a mask over all of them is trained at"
    " once?",
    paper="Bhaskar et al. 2024, arXiv:2406.16778",
    cost=COST,
    control="random_direction",
    rung="interventional",
    fills=("clean", "exact", "agreement", "kept"),
)
def edge_pruning(
    model: Model,
    task: Task,
    /,
    *,
    target: float = 0.95,
    steps: int = 300,
    rate: float = 0.4,
    how: Baseline = "corrupt",
    audit: int = 24,
    samples: int = 1,
    seed: int = 0,
) -> EdgeScores:
    """Train a gate for every edge and every writer, to a target share of closed edges.

    Args:
        target: the share of all edges that is closed in the end.
        steps: how many steps of Adam the gates take.
        rate: learning rate of Adam, of the gates and of the multipliers.
        how: what stands in for a writer's value.
        audit: at how many edges the exact score is measured beside.
        samples: how many masks are trained on random directions, as null.
        seed: of the gates, the prompts of each step, the donors and the audit's edges.

    Raises:
        Refused: a target outside of 0 to 1, no steps, a model without such a wiring, or alternative values or a metric
            that these prompts do not allow.
    """
    if not 0 < target < 1:
        why = "a circuit is some of the edges and not all"
        raise Refused(Keyword("target", target), why, ("use ", Keyword("target", 0.95)))
    w = wiring(model)
    gates = [EdgeGates(w, target) for _ in range(1 + samples)]
    return searched(model, task, gates, how, steps, rate, audit, seed)


class EdgeGates:
    """Hard concrete gates of edges and of writers, and the multipliers of their target.

    Attributes:
        edges: log α of each edge.
        writers: log α of each head and MLP.
        multipliers: λ₁ and λ₂.
    """

    def __init__(self, w: Wiring, target: float):
        self.wiring, self.target = w, target
        self.edges = torch.full((len(w.pairs),), START, requires_grad=True)
        self.writers = torch.full((len(w.writers) - 1,), START, requires_grad=True)
        self.multipliers = torch.zeros(2, requires_grad=True)

    def optimizers(self, rate: float) -> Sequence[torch.optim.Optimizer]:
        gates = torch.optim.Adam([self.edges, self.writers], lr=rate)
        return gates, torch.optim.Adam([self.multipliers], lr=rate, maximize=True)

    def drawn(self, chance: torch.Generator) -> Float[Tensor, "edge"]:
        return draw(self.edges, chance) * self._of_edges(draw(self.writers, chance))

    def price(self, done: float) -> Float[Tensor, ""]:
        off = (1 - self._openness()).mean() - self.target * min(1.0, done / _WARMUP)
        return self.multipliers[0] * off + self.multipliers[1] * off.square()

    def settle(self) -> None:
        settle(self.edges)
        settle(self.writers)

    def scores(self) -> Float[Tensor, "edge"]:
        return self._openness().detach()

    def kept(self) -> Bool[Tensor, "edge"]:
        scores = self.scores()
        order = scores.argsort(descending=True, stable=True)[: max(1, round((1 - self.target) * len(scores)))]
        return torch.zeros(len(scores), dtype=torch.bool).index_fill(0, order, True)

    def _openness(self) -> Float[Tensor, "edge"]:
        return openness(self.edges) * self._of_edges(openness(self.writers))

    def _of_edges(self, writers: Float[Tensor, "gate"]) -> Float[Tensor, "edge"]:
        """Return each edge's value of its writer, 1 for the embeddings."""
        return with_embeddings(writers)[self.wiring.pairs[:, 0]]
