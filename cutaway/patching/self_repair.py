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
  these two each counts as the mean of its part when let go first and when let go last. Of more than `parts` heads,
  those of the largest repair have these two.
* `interval` (of `effect`) and `…_interval` (of each other field): 95 %, over prompts. Control (`null`): total −
  direct of a step as long as the removal's in a random direction, of `null_cells` heads drawn at random where there
  are more.
* Known failures: noisy from prompt to prompt; total − direct is also what the head does by way of others (composition),
  so a head that both writes the answer and feeds later heads mixes the two.
* Equivalences (tests): the direct effect of a zeroed head is minus its share in `direct_attribution`; a head of the
  last layer has no attention part; the parts sum to the effect.
* Cost: one forward a head (four with `resample`), two more a head whose parts are measured,
  and the same as a head's a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt, ratio_interval
from cutaway.interventions.ablation_values import Baseline, Removal, removal
from cutaway.interventions.components import all_components
from cutaway.interventions.null_cells import NULL_CELLS, draw_cells, null_cells_record, null_of_steps, random_steps
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.access.reading import Reads
from cutaway.models.anatomy.residual import attention_written
from cutaway.models.anatomy.unembedding import unembedding
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Freeze, Replace
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
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
    cost="prompts * (4 + cells * (20 if how == 'resample' else 5) + 2 * samples * min(null_cells or cells, cells)) * F",
    control="random_direction",
    rung="interventional",
)
def self_repair(
    model: Model,
    task: Task,
    /,
    *,
    how: Baseline = "corrupt",
    parts: int = 32,
    samples: int = 4,
    null_cells: int = NULL_CELLS,
    seed: int = 0,
) -> SelfRepair:
    """Compare direct and total effects of removing each head.

    Args:
        how: what stands in for the removed head's output.
        parts: of how many heads, those of the largest repair, attention's and MLPs' parts are measured; NaN elsewhere
            (0: of all of them).
        samples: how many random steps of equal length make the null of each head.
        null_cells: of how many heads, drawn at random, random steps are made; NaN elsewhere (0: of all of them).
        seed: of the donors and the random steps.

    Raises:
        Refused: a baseline that these prompts do not allow, or a model without the sites that must be frozen.
    """
    bound, heads = task.bind(model), all_components(model, mlps=False)
    r = removal(model, bound, heads, how, seed)
    apart, count = _Apart(model, r), len(heads)
    drawn = draw_cells(range(count), null_cells, generator(seed))
    steps = [r.random(heads[i], own, s) for i, s, own in random_steps(drawn, count, samples, seed)]
    whole, ends = r.swept(model, lambda donor: [[r.edit(a, donor)] for a in heads], [[e] for e in steps])
    alone = torch.stack([apart.alone([r.edit(a, donor) for a in heads]) for donor in range(len(r.stands))]).mean(0)
    held, free = (x.reshape(count, -1) - r.clean.cpu() for x in alone.unbind(1))  # head prompt; the norm held, or free
    total = whole - r.clean.cpu()
    null = null_of_steps((ends - apart.alone(steps, free=False)[:, 0]).mean(-1), drawn, count, samples)
    several = _largest((total - held).mean(-1), parts)
    found = torch.full((count, 2, len(r.bound)), torch.nan)
    found[several] = apart.halves([heads[i] for i in several]) - r.clean.cpu()
    grid, each = (model.shape.n_layers, model.shape.n_heads), (held, free, found[:, 0], found[:, 1], total)
    direct, norm, attention, mlp, total = (x.T.reshape(-1, *grid) for x in each)  # [prompt layer head], with these free
    repair, unit = total - direct, bound.unit
    split = {
        "direct": direct,
        "total": total,
        "norm": norm - direct,
        "attention": (attention - norm + total - mlp) / 2,
        "mlp": (mlp - norm + total - attention) / 2,
    }
    each_part: dict[str, Any] = {name: x.mean(0) for name, x in split.items()}
    each_part |= {f"{name}_interval": mean_interval(x) for name, x in split.items()}
    share = repair.mean(0) / -direct.mean(0)
    unclear = direct.mean(0).abs() < _LEAST * direct.mean(0).abs().max()
    bounds = ratio_interval(repair, -direct)
    return SelfRepair(
        effect=repair.mean(0),
        interval=mean_interval(repair),
        null=null.reshape(samples, *grid).movedim(0, -1).clone(),
        share=share.masked_fill(unclear, torch.nan),
        share_interval=bounds.masked_fill(unclear[..., None], torch.nan),
        **each_part,
        labels={"bound": BOUNDS},
        units={n: _SHARE if n.startswith("share") else unit for n in SelfRepair.schema()},
        reasons=one_prompt(len(r.bound), "effect", "share", *split),
        record=r.record()
        | {"shares": f"of heads with at least {_LEAST:.0%} of the largest direct effect"}
        | ({"parts": f"of {len(several)} of {count} heads, of the largest repair"} if len(several) < count else {})
        | null_cells_record(len(drawn), count),
    )


class _Apart:
    """Runs in which some of what comes after a head keeps its value in the clean run."""

    def __init__(self, model: Model, r: Removal):
        self.model, self.r, self.tokens = model, r, r.bound.clean
        self.layers = model.shape.n_layers
        self.clean = model.capture(self.tokens, ["attn_out", "mlp_out", "resid_post", "final.scale"], logits=False)
        self.norm = Freeze(Address("final.scale"), self.clean)
        self.sums: bool | None = None
        #: True if the metric reads last logits alone, which follow from the last stream in a known way
        self.reads_last = r.bound.measure.reads == Reads() and not unembedding(model.anatomy).why

    def halves(self, heads: Sequence[Address]) -> Float[Tensor, "head half prompt"]:
        """Return the metric without each head where MLPs are held, and where attention is held."""

        def variants(donor: int) -> list[list[Edit]]:
            each = [(self.r.edit(a, donor), *self._later(a)) for a in heads]
            return [[edit, *held] for edit, attention, mlp in each for held in (mlp, attention)]

        return self.r.swept(self.model, variants)[0].reshape(len(heads), 2, -1)

    def alone(self, edits: Sequence[Edit], free: bool = True) -> Float[Tensor, "edit norm prompt"]:
        """Return the metric with all that comes after each edit held; then, if `free`, with the norm let go.

        What is held is added to the stream as it was, so the edit's own change reaches the last norm as attention
        wrote it: no forward behind it is needed, if the stream is such a sum.
        """
        if self.sums is None:
            self.sums = self._is_sum(edits[0])
        return self._by_sum(edits, free) if self.sums else self._in_full(edits, free)

    def _is_sum(self, edit: Edit) -> bool:
        """Return True if the stream behind the last block changes by what attention writes differently."""
        last = Address("resid_post", self.layers - 1)
        held = [edit, *(x for part in self._later(edit.where) for x in part)]
        now = self.model.capture(self.tokens, [last], held, logits=False)
        try:
            moved = self._moved([edit])[0]
        except Refused:  # its matrices cannot be read
            return False
        came = now[str(last)].float() - self.clean[str(last)].float()
        grain = self.layers * torch.finfo(self.model.dtype).eps * self.clean[str(last)].float().abs()
        return bool(((moved - came).abs() <= 1e-3 * moved.abs().max() + grain)[self.tokens.mask.to(moved.device)].all())

    def _moved(self, edits: Sequence[Edit]) -> Float[Tensor, "edit prompt position d_model"]:
        """Return by how much the attention that edits of one layer act in writes differently."""
        layer, width = edits[0].where.layer or 0, self.tokens.ids.shape[1]
        own, frame = self.r.own[f"z.{layer}"], ForwardFrame(self.tokens, len(self.tokens), width)
        made = torch.stack([own, *(e.apply(own, frame) for e in edits)])
        written = attention_written(self.model, layer, made.flatten(0, 2)).unflatten(0, made.shape[:3])
        return written[1:] - written[0]

    def _by_sum(self, edits: Sequence[Edit], free: bool = True) -> Float[Tensor, "edit norm prompt"]:
        found, last = torch.empty(len(edits), 1 + free, len(self.tokens)), f"resid_post.{self.layers - 1}"
        clean = self.clean[last]
        for layer in sorted({e.where.layer or 0 for e in edits}):
            own = [i for i, e in enumerate(edits) if e.where.layer == layer]
            ends = (clean.float() + self._moved([edits[i] for i in own])).to(clean.dtype)
            if self.reads_last:
                found[own] = self._read_out(ends, free)
            else:
                found[own] = self._ends([[Replace(last, x)] for x in ends], free)
        return found

    @torch.no_grad()
    def _read_out(
        self, stream: Float[Tensor, "edit prompt position d_model"], free: bool
    ) -> Float[Tensor, "edit norm prompt"]:
        """Return the metric of other last streams: with the norm's scale held; then, if `free`, with it let go."""
        anatomy, rows = self.model.anatomy, torch.arange(len(self.tokens), device=stream.device)
        last, measure, way = self.tokens.last.to(stream.device), self.r.bound.measure, unembedding(anatomy)
        final = anatomy.top("final")
        assert final is not None
        norm, scale = anatomy.norm(final), self.clean["final.scale"][rows, last]

        def held(x: Float[Tensor, "edit prompt d_model"]) -> Float[Tensor, "edit prompt d_model"]:
            bias = norm.bias.to(x)
            return bias + (final(x) - bias) * (norm.scale(x) / scale)[..., None].to(x)

        x, found = stream[:, rows, last], list[Tensor]()  # edit prompt d_model
        for one in (held, *((final,) if free else ())):
            seen = way.seen(way.read(x, one).flatten(0, 1), measure.columns)
            found.append(measure(seen, rows.repeat(len(x))).reshape(x.shape[:2]))
        return torch.stack(found, 1).float().cpu()

    def _in_full(self, edits: Sequence[Edit], free: bool = True) -> Float[Tensor, "edit norm prompt"]:
        return self._ends([[e, *(x for part in self._later(e.where) for x in part)] for e in edits], free)

    def _ends(self, variants: Sequence[list[Edit]], free: bool) -> Float[Tensor, "edit norm prompt"]:
        each = [v for own in variants for v in ([*own, self.norm], *([own] if free else []))]
        found = sweep(self.model, self.tokens, each, self.r.bound.measure).float().cpu()
        return found.reshape(len(variants), 1 + free, -1)

    def _later(self, a: Address) -> tuple[list[Edit], list[Edit]]:
        first = a.layer or 0
        attention: list[Edit] = [Freeze(Address("attn_out", i), self.clean) for i in range(first + 1, self.layers)]
        return attention, [Freeze(Address("mlp_out", i), self.clean) for i in range(first, self.layers)]


def _largest(size: Float[Tensor, "head"], count: int) -> list[int]:
    """Return the heads of the largest size, in order; all if `count` is 0 or more than there are."""
    order = size.abs().argsort(descending=True, stable=True).tolist()
    return sorted(order[:count] if count else order)
