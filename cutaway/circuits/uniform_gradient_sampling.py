"""Which edges keep the model's predictions, when each is kept with a probability that is trained?

Uniform gradient sampling (UGS; Li & Janson 2024, arXiv:2409.09951). Every edge has a probability θ of being kept. A
mask entry is drawn from (0, 1) uniformly with probability w = θ(1 − θ), and is else 1 with probability θ − w/2, or 0.

* Gradient: the mean over (0, 1) of the loss's slope in one entry is the loss of keeping the edge less that of cutting
  it. So the slope where the entry was uniform, and 0 elsewhere, is in expectation the slope of the expected loss in
  logit θ, whatever the other entries.
* Loss: KL(model ‖ masked run) + `penalty` × the expected share of kept edges.
* `score` of u → v: θ in the end. It has no sign. `kept`: the edges with θ above 1/2.
* Trained on one half of the prompts; the record says what the circuit is worth on the other. No interval: one mask is
  trained for all prompts. Control (`null`): scores of gates that are trained with alternative values as far from the
  clean ones in random directions, drawn anew in each step.
* Audit: `exact` is the measured score of `audit` edges cut alone, on the other half, as in `circuits.exact`.
* Known failures: the fewer entries are uniform, the slower it goes, so few steps leave θ undecided. One mask is drawn a
  step for all of its prompts, where the authors draw one each.
* Equivalences (tests): the mean of many gradients is that of the expected loss, summed over all masks.
* Cost: a forward and a backward a step for up to 16 prompts, 1 + `samples` times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.mask_training import COST, searched
from cutaway.core.method import method
from cutaway.interventions.ablation_values import Baseline
from cutaway.models.edits.wiring import wiring
from cutaway.models.model import Model
from cutaway.tasks.task import Task

_START, _MOST = 1.0, 6.0  # logit θ at the start, and in size at most, so that an edge can still turn


@method(
    answers="Which edges keep the model's predictions, when each is kept with a probability that is trained?",
    paper="Li & Janson 2024, arXiv:2409.09951",
    cost=COST,
    control="random_direction",
    rung="interventional",
    fills=("clean", "exact", "agreement", "kept"),
)
def uniform_gradient_sampling(
    model: Model,
    task: Task,
    /,
    *,
    penalty: float = 1.0,
    steps: int = 300,
    rate: float = 0.1,
    how: Baseline = "corrupt",
    audit: int = 24,
    samples: int = 1,
    seed: int = 0,
) -> EdgeScores:
    """Train the probability of every edge to be kept.

    Args:
        penalty: what all edges together pay for being kept, in nats.
        steps: how many steps of Adam the probabilities take.
        rate: learning rate of Adam.
        how: what stands in for a writer's value.
        audit: at how many edges the exact score is measured beside.
        samples: how many masks are trained on random directions, as null.
        seed: of the masks, the prompts of each step, the donors and the audit's edges.

    Raises:
        Refused: no steps, a model without such a wiring, or alternative values or a metric that these prompts do not
            allow.
    """
    n = len(wiring(model).pairs)
    gates = [UniformGates(n, penalty) for _ in range(1 + samples)]
    return searched(model, task, gates, how, steps, rate, audit, seed)


class UniformGates:
    """Probabilities of edges to be kept.

    Attributes:
        logits: the log odds of each.
    """

    def __init__(self, edges: int, penalty: float):
        self.penalty = penalty
        self.logits = torch.full((edges,), _START, requires_grad=True)

    def optimizers(self, rate: float) -> Sequence[torch.optim.Optimizer]:
        return (torch.optim.Adam([self.logits], lr=rate),)

    def drawn(self, chance: torch.Generator) -> Float[Tensor, "edge"]:
        theta = self.logits.detach().sigmoid()
        width = theta * (1 - theta)
        which, value = torch.rand(2, len(theta), generator=chance)
        uniform = which < width
        drawn = torch.where(uniform, value, (which < width / 2 + theta).float())
        return drawn + uniform * (self.logits - self.logits.detach())

    def price(self, done: float) -> Float[Tensor, ""]:
        return self.penalty * self.logits.sigmoid().mean()

    @torch.no_grad()
    def settle(self) -> None:
        self.logits.clamp_(-_MOST, _MOST)

    def scores(self) -> Float[Tensor, "edge"]:
        return self.logits.detach().sigmoid()

    def kept(self) -> Bool[Tensor, "edge"]:
        return self.logits.detach() > 0
