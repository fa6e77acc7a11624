"""Which heads and MLPs keep the model's predictions, when each pays for being open?

Subnetwork probing (Cao et al. 2021, arXiv:2104.03514), with gates for heads and MLPs as in Conmy et al. 2023
(arXiv:2304.14997). Every head and MLP has one hard concrete gate, for all edges that leave it.

* Loss: KL(model ‖ masked run) + `penalty` × the expected share of open gates.
* `score` of u → v: the probability that both ends are open, in the end; the logits and the embeddings are, and keys and
  values that heads share are if any of these heads is. It has no sign. `kept`: the edges between components whose gates
  are open with probability above 1/2.
* Trained on one half of the prompts; the record says what the circuit is worth on the other. No interval: one mask is
  trained for all prompts. Control (`null`): scores of gates that are trained with alternative values as far from the
  clean ones in random directions, drawn anew in each step.
* Audit: `exact` is the measured score of `audit` edges cut alone, on the other half, as in `circuits.exact`.
* Known failures: all edges between two open components belong to the circuit, also those that carry nothing; the size
  of the circuit follows from the penalty, in nats, and is not known before.
* Equivalences (tests): a writer's gate is one number for all of its edges; with a penalty above all nothing is open.
* Cost: a forward and a backward a step for up to 16 prompts, 1 + `samples` times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.circuits.components import belongs
from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.hard_concrete import START, draw, openness, settle, with_embeddings
from cutaway.circuits.mask_training import COST, searched
from cutaway.core.method import method
from cutaway.interventions.ablation_values import Baseline
from cutaway.models.edits.wiring import Wiring, wiring
from cutaway.models.model import Model
from cutaway.tasks.task import Task


@method(
    answers="Which heads and MLPs keep the model's predictions, when each pays for being open?",
    paper="Cao et al. 2021, arXiv:2104.03514",
    cost=COST,
    control="random_direction",
    rung="interventional",
    fills=("clean", "exact", "agreement", "kept"),
)
def subnetwork_probing(
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
    """Train a gate for every head and MLP.

    Args:
        penalty: what all gates together pay for being open, in nats.
        steps: how many steps of Adam the gates take.
        rate: learning rate of Adam.
        how: what stands in for a writer's value.
        audit: at how many edges the exact score is measured beside.
        samples: how many masks are trained on random directions, as null.
        seed: of the gates, the prompts of each step, the donors and the audit's edges.

    Raises:
        Refused: no steps, a model without such a wiring, or alternative values or a metric that these prompts do not
            allow.
    """
    w = wiring(model)
    return searched(model, task, [WriterGates(w, penalty) for _ in range(1 + samples)], how, steps, rate, audit, seed)


class WriterGates:
    """Hard concrete gates of heads and MLPs.

    Attributes:
        writers: log α of each.
    """

    def __init__(self, w: Wiring, penalty: float):
        self.wiring, self.penalty, self.of = w, penalty, belongs(w)
        self.writers = torch.full((len(w.writers) - 1,), START, requires_grad=True)

    def optimizers(self, rate: float) -> Sequence[torch.optim.Optimizer]:
        return (torch.optim.Adam([self.writers], lr=rate),)

    def drawn(self, chance: torch.Generator) -> Float[Tensor, "edge"]:
        return with_embeddings(draw(self.writers, chance))[self.wiring.pairs[:, 0]]

    def price(self, done: float) -> Float[Tensor, ""]:
        return self.penalty * openness(self.writers).mean()

    def settle(self) -> None:
        settle(self.writers)

    def scores(self) -> Float[Tensor, "edge"]:
        writers, readers = self._ends()
        u, v = self.wiring.pairs.T
        return writers[u] * readers[v]

    def kept(self) -> Bool[Tensor, "edge"]:
        u, v = self.wiring.pairs.T
        return torch.minimum(self._ends()[0][u], self._ends()[1][v]) > 0.5

    def _ends(self) -> tuple[Float[Tensor, "writer"], Float[Tensor, "reader"]]:
        """Return the probabilities of writers, and of readers by the components that they belong to."""
        writers = with_embeddings(openness(self.writers.detach()))
        readers = (self.of * writers[:, None]).amax(0)
        readers[-1] = 1.0
        return writers, readers
