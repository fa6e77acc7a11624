"""How much of a head's loss do later components make up for?

Self-repair, the Hydra effect (McGrath et al. 2023, arXiv:2307.15771; Rushing & Nanda 2024, arXiv:2402.15390). Removing
a head changes the answer by its direct path alone (everything later held at its clean value) and in total (everything
later reacts). What lies between is repair.

* `direct[layer, head]`: metric change with all later attention and MLP outputs and the final norm's scale frozen at
  their values in the clean run. `total[layer, head]`: nothing frozen. `effect` = total − direct: above zero where the
  head helps and later components make up for it, below zero where they amplify the loss.
* `share` = 1 − total / direct: 1 is all repaired, 0 nothing. Only for heads whose direct effect is at least 5 % of the
  largest one; elsewhere NaN, since the head works through others and has nothing to repair.
* The split `norm` + `attention` + `mlp` = `effect`: first the final norm's scale is let go, then attention and MLPs; of
  these two each counts as the mean of its part when let go first and when let go last.
* `interval` (of `effect`) and `…_interval` (of each other field): 95 %, over prompts. Control (`null`): total −
  direct of a step as long as the removal's in a random direction, of `null_cells` heads drawn at random where there
  are more.
* Known failures: noisy from prompt to prompt; total − direct is also what the head does by way of others (composition),
  so a head that both writes the answer and feeds later heads mixes the two.
* Equivalences (tests): the direct effect of a zeroed head is minus its share in `direct_attribution`; a head of the
  last layer has no attention part; the parts sum to the effect.
* Cost: five forwards a head (twenty with `resample`), and two a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt, ratio_interval
from cutaway.interventions.ablation_values import Baseline, removal
from cutaway.interventions.components import all_components
from cutaway.interventions.null_cells import NULL_CELLS, draw_cells, null_cells_record
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Freeze
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.task import Task

_SHARE = "share of the direct effect"
_LEAST = 0.05  # of the largest direct effect: below it a share means nothing


@dataclass(frozen=True, kw_only=True)
class SelfRepair(Result, kind="self_repair"):
    """Direct and total effect of removing each head, and what makes up the difference."""

    effect: Float[Tensor, "layer head"]
    interval: Float[Tensor, "layer head bound"]
    null: Float[Tensor, "layer head sample"]
    share: Float[Tensor, "layer head"]
    share_interval: Float[Tensor, "layer head bound"]
    direct: Float[Tensor, "layer head"]
    direct_interval: Float[Tensor, "layer head bound"]
    total: Float[Tensor, "layer head"]
    total_interval: Float[Tensor, "layer head bound"]
    norm: Float[Tensor, "layer head"]
    norm_interval: Float[Tensor, "layer head bound"]
    attention: Float[Tensor, "layer head"]
    attention_interval: Float[Tensor, "layer head bound"]
    mlp: Float[Tensor, "layer head"]
    mlp_interval: Float[Tensor, "layer head bound"]


@method(
    answers="How much of a head's loss do later components make up for?",
    paper="McGrath et al. 2023, arXiv:2307.15771; Rushing & Nanda 2024, arXiv:2402.15390",
    cost="prompts * (4 + layers * heads * (20 + 2 * samples)) * F",
    control="random_direction",
    rung="interventional",
)
def self_repair(
    model: Model,
    task: Task,
    /,
    *,
    how: Baseline = "corrupt",
    samples: int = 4,
    null_cells: int = NULL_CELLS,
    seed: int = 0,
) -> SelfRepair:
    """Compare direct and total effects of removing each head.

    Args:
        how: what stands in for the removed head's output.
        samples: how many random steps of equal length make the null of each head.
        null_cells: of how many heads, drawn at random, random steps are made; NaN elsewhere (0: of all of them).
        seed: of the donors and the random steps.

    Raises:
        Refused: a baseline that these prompts do not allow, or a model without the sites that must be frozen.
    """
    bound, heads = task.bind(model), all_components(model, mlps=False)
    r = removal(model, bound, heads, how, seed)
    freezing, count = _Freezing(model, r.bound.clean), len(heads)
    drawn = draw_cells(range(count), null_cells, generator(seed))
    steps = [r.random(heads[i], (seed * samples + s) * count + i, s) for s in range(samples) for i in drawn]
    values, others = r.swept(
        model,
        lambda donor: [v for a in heads for v in freezing.variants(r.edit(a, donor), a)],
        [v for e in steps for v in freezing.ends(e, e.where)],
    )
    each = (values - r.clean.cpu()).reshape(model.shape.n_layers, model.shape.n_heads, 5, -1).movedim(-1, 0)
    direct, norm, attention, mlp, total = each.unbind(-1)  # prompt layer head; each with these let go
    ends = others.mean(-1).reshape(samples, len(drawn), 2)
    null = torch.full((samples, count), torch.nan)
    null[:, drawn] = ends[..., 1] - ends[..., 0]
    repair, unit = total - direct, bound.unit
    parts = {
        "direct": direct,
        "total": total,
        "norm": norm - direct,
        "attention": (attention - norm + total - mlp) / 2,
        "mlp": (mlp - norm + total - attention) / 2,
    }
    each_part: dict[str, Any] = {name: x.mean(0) for name, x in parts.items()}
    each_part |= {f"{name}_interval": mean_interval(x) for name, x in parts.items()}
    share = repair.mean(0) / -direct.mean(0)
    unclear = direct.mean(0).abs() < _LEAST * direct.mean(0).abs().max()
    bounds = ratio_interval(repair, -direct)
    return SelfRepair(
        effect=repair.mean(0),
        interval=mean_interval(repair),
        null=null.reshape(samples, *direct.shape[1:]).movedim(0, -1).clone(),
        share=share.masked_fill(unclear, torch.nan),
        share_interval=bounds.masked_fill(unclear[..., None], torch.nan),
        **each_part,
        labels={"bound": BOUNDS},
        units={n: _SHARE if n.startswith("share") else unit for n in SelfRepair.schema()},
        reasons=one_prompt(len(r.bound), "effect", "share", *parts),
        record=r.record()
        | {"shares": f"of heads with at least {_LEAST:.0%} of the largest direct effect"}
        | null_cells_record(len(drawn), count),
    )


class _Freezing:
    """Edits that hold what comes after a head at its value in the clean run."""

    def __init__(self, model: Model, tokens: Tokens):
        self.layers = model.shape.n_layers
        self.clean = model.capture(tokens, ["attn_out", "mlp_out", "final.scale"], logits=False)

    def variants(self, edit: Edit, a: Address) -> list[list[Edit]]:
        """Return the edits with all frozen; without the norm; norm and attention; norm and MLPs; with nothing."""
        attention, mlp, norm = self._later(a)
        return [
            [edit, *attention, *mlp, norm],
            [edit, *attention, *mlp],
            [edit, *mlp],
            [edit, *attention],
            [edit],
        ]

    def ends(self, edit: Edit, a: Address) -> list[list[Edit]]:
        """Return the edits with all frozen, and with nothing."""
        full, *_, free = self.variants(edit, a)
        return [full, free]

    def _later(self, a: Address) -> tuple[list[Edit], list[Edit], Edit]:
        assert a.layer is not None
        attention = [Freeze(Address("attn_out", i), self.clean) for i in range(a.layer + 1, self.layers)]
        mlp = [Freeze(Address("mlp_out", i), self.clean) for i in range(a.layer, self.layers)]
        return list(attention), list(mlp), Freeze(Address("final.scale"), self.clean)
