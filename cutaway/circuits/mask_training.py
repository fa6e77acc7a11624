"""Training of masks over edges: gates that open and close by chance, and learn to keep the model's predictions.

Each step draws one mask from the gates and runs some of the prompts under it. The loss is the divergence of the
predictions from the model's, KL(model ‖ masked run) at the last position, plus what the gates pay for being open, and
goes to the gates by Adam. Gates are trained on one half of the prompts; a circuit of them is measured on the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.circuits.alternatives import Alternatives, alternatives
from cutaway.circuits.circuit import mask_of
from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.evaluation import Evaluation
from cutaway.circuits.mask_gradients import random_directions
from cutaway.circuits.scoring import audited
from cutaway.core.address import Address
from cutaway.core.record import count
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.stats import generator, one_prompt
from cutaway.interventions.ablation_values import Baseline
from cutaway.interventions.halves import halves
from cutaway.models.access.capture import Activations
from cutaway.models.access.reading import observe
from cutaway.models.dry import some
from cutaway.models.edits.edge_mask import MaskedForward, places_written, removed_by, written
from cutaway.models.edits.wiring import Wiring, wiring
from cutaway.models.model import Model
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task

BATCH = 16  # prompts of a step, at most
#: of a method that trains a mask
COST = (
    "(prompts * (10 + (4 if how == 'resample' else 1) * (4 + min(audit, cells))) + (1 + samples) * steps *"
    f" min(prompts, {BATCH})) * F + (1 + samples) * steps * min(prompts, {BATCH}) * B"
)


@runtime_checkable
class Gates(Protocol):
    """The protocol of gates over the edges of a wiring, before and while they are trained."""

    def optimizers(self, rate: float) -> Sequence[torch.optim.Optimizer]:
        """Return what takes a step after every backward."""
        ...

    def drawn(self, chance: torch.Generator) -> Float[Tensor, "edge"]:
        """Draw the mask, with its gradient."""
        ...

    def price(self, done: float) -> Float[Tensor, ""]:
        """Return what the gates pay for being open when a share of the steps is done."""
        ...

    def settle(self) -> None:
        """Keep the parameters in their range, after a step."""
        ...

    def scores(self) -> Float[Tensor, "edge"]:
        """Return the probability that each edge is open."""
        ...

    def kept(self) -> Bool[Tensor, "edge"]:
        """Return the edges of the circuit."""
        ...


@dataclass(frozen=True, eq=False)
class _Data:
    """The prompts that gates are trained on.

    Attributes:
        bound: the prompts, measured by minus the divergence from the model's predictions.
        own: what the writers' places hold in the clean run.
        stands: what stands in, for each donor.
    """

    model: Model
    wiring: Wiring
    bound: Bound
    own: Activations
    stands: tuple[Activations, ...]

    @staticmethod
    def of(model: Model, w: Wiring, given: Alternatives) -> _Data:
        bound = given.bound.measured_by("kl", model)
        own = model.capture(bound.clean, list(given.places), logits=False)
        return _Data(model, w, bound, own, given.part(model, range(len(bound))))

    @torch.no_grad()
    def alternative(self, rows: Tensor, by_chance: bool, chance: torch.Generator) -> Mapping[Address, Tensor]:
        """Return what stands in for some prompts, of a donor drawn at random, or values as far off at random."""
        donor = int(torch.randint(len(self.stands), (1,), generator=chance))
        values = self._written(self.stands[donor], rows)
        return random_directions(self._written(self.own, rows), values, chance) if by_chance else values

    def _written(self, acts: Activations, rows: Tensor) -> dict[Address, Tensor]:
        taken = {str(a): (x := acts[str(a)])[rows.to(x.device)] for a in places_written(self.wiring)}
        return written(self.model, taken)


def searched(
    model: Model, task: Task, gates: Sequence[Gates], how: Baseline, steps: int, rate: float, audit: int, seed: int
) -> EdgeScores:
    """Train gates on one half of the prompts, the first on `how` and the others on random directions, and measure.

    Raises:
        Refused: no steps, a model without a wiring, or values or a metric that these prompts do not allow.
    """
    if steps < 1:
        raise Refused(Keyword("steps", steps), "nothing would be trained", ("use ", Keyword("steps", 200), " or more"))
    first, second, split = halves(task)
    w = wiring(model)
    data = _Data.of(
        model, w, alternatives(model, first.bind(model), places_written(w), how, corruption=task.corruption, seed=seed)
    )
    _train(data, gates[0], steps, rate, seed, by_chance=False)
    for s in some(range(1, len(gates)), 1):
        _train(data, gates[s], steps, rate, seed + s, by_chance=True)
    x = Evaluation.of(model, second, how, "noise", "all", seed)
    return _result(x, gates, audit, split.replace("ranked", "trained"), seed)


def _train(data: _Data, gates: Gates, steps: int, rate: float, seed: int, by_chance: bool) -> None:
    chance, optimizers = generator(seed), gates.optimizers(rate)
    trained = [own for optimizer in optimizers for group in optimizer.param_groups for own in group["params"]]
    n, w = len(data.bound), data.wiring
    u, v = w.pairs.T
    measure, device = data.bound.measure, data.bound.clean.ids.device
    for step in some(range(steps), 1):
        rows = torch.randperm(n, generator=chance)[:BATCH]
        tokens = data.bound.clean.rows(rows.tolist())
        alternative = data.alternative(rows, by_chance, chance)
        with data.model.edited(), torch.enable_grad():
            mask = torch.zeros(1, *w.heard.shape).index_put((torch.zeros_like(u), u, v), gates.drawn(chance))
            removed = removed_by(w, mask.to(device))
            with MaskedForward(data.model, w, removed, alternative).attached():
                seen = observe(data.model.anatomy, tokens, measure.reads)
            loss = gates.price((step + 1) / steps) - measure(seen, rows.to(device)).mean().cpu()
            for own, slope in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                own.grad = slope
        count(backwards=len(rows))
        for optimizer in optimizers:
            optimizer.step()
        gates.settle()


def _result(x: Evaluation, gates: Sequence[Gates], audit: int, split: str, seed: int) -> EdgeScores:
    """Return the probabilities of gates, with what the circuit is worth on other prompts."""
    score, *null = (g.scores() for g in gates)
    kept = gates[0].kept()
    whole, empty, own = x.values([*x.whole_and_empty(), mask_of(x.wiring, kept.nonzero()[:, 0])])[..., 0]
    found = audited(x.model, x.wiring, x.given, score.repeat(len(x), 1), torch.stack(null, 1), whole, audit, 1.0, seed)
    values: dict[str, Any] = {"circuit": own, "model": whole, "all edges cut": empty}
    record = {
        "score is": "the probability of an open gate",
        "split": split,
        "edges kept": int(kept.sum()),
        "metric on the prompts measured": {n: float(value.mean()) for n, value in values.items()},
    }
    share = dict.fromkeys(("score", "interval", "null"), "probability")
    reasons = {"score": "no interval: one mask is trained for all prompts"} | one_prompt(len(x), "exact")
    return replace(
        found,
        interval=torch.full_like(found.interval, torch.nan),
        frequency=None,
        kept=kept,
        units={n: unit for n, unit in found.units.items() if n != "frequency"} | share,
        reasons=reasons,
        record=found.record | record,
    )
