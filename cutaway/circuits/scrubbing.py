"""Does a hypothesis about what each component knows hold? Causal scrubbing, with a feature of the prompt a component.

A hypothesis (Chan et al. 2022, "Causal scrubbing") names the components of a circuit and for each a feature of the
prompt: a function of its text. It claims that of what a component writes only the feature matters, and that edges from
all others do not matter at all. If so, the answer stays when each component writes what it writes for another prompt
with the same feature, and everything else what it writes for any prompt at all.

* One scrubbed run computes all prompts at once. What a named component writes for prompt i is what it wrote, in this
  same run, for a prompt drawn from those with i's feature (i itself among them), so that what it was made of was
  scrubbed before. What others write for i is what they write in the plain run of a prompt drawn from all. Readers are
  those of the named components, and the logits.
* `value`: the mean metric of scrubbed runs for each prompt, over `draws` runs. `recovered` = (m(scrubbed) − m(∅)) /
  (m(M) − m(∅)), a ratio of means over prompts, where m(∅) lets everything come from prompts drawn from all.
* `interval`: 95 %, over prompts. Control (`null`): the same hypothesis with the values of each feature permuted among
  the prompts, so that groups stay as large as they are but say nothing.
* In the paper every path has draws of its own; here the readers of a component share its draw, which makes a run as
  cheap as a forward.
* Known failures: a feature that almost every prompt has for itself holds trivially (see `groups`), and a hypothesis
  that is right about values may be wrong about reasons. Prompts must have one length, for positions must mean the same.
* Equivalences (tests): features that tell all prompts apart, on all components, leave the answer as it is; programs
  whose variables are known.
* Cost: 1 + draws (2 + samples) forwards of every prompt, and one for values of the plain run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.circuits.components import belongs
from cutaway.circuits.evaluation import shares
from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, one_prompt
from cutaway.models.access import taps
from cutaway.models.access.reading import observe
from cutaway.models.edits.edge_mask import MaskedForward, places_written, removed_by, written
from cutaway.models.edits.wiring import Wiring, wiring
from cutaway.models.model import Model
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task

Feature = Callable[[str], Hashable]
Donors = dict[int, Int[Tensor, "prompt"]]  # by writer, the prompt that each prompt is given values of


@dataclass(frozen=True, kw_only=True)
class Scrubbed(Result, kind="scrubbed"):
    """Share of the answer that is left when components get values of other prompts that a hypothesis calls the same.

    Attributes:
        recovered: the share of the answer that scrubbed runs keep.
        interval: of `recovered`, 95 %, over prompts.
        null: the share that they keep where features are dealt out at random.
        value: the metric of each prompt, mean over scrubbed runs.
        groups: how many values each component's feature has among the prompts.
        whole: the metric of the model.
        empty: the metric where everything comes from any prompt.
    """

    recovered: Float[Tensor, ""]
    interval: Float[Tensor, "bound"]
    null: Float[Tensor, "sample"]
    value: Float[Tensor, "prompt"]
    groups: Int[Tensor, "component"]
    whole: Float[Tensor, ""]
    empty: Float[Tensor, ""]


def scrub(
    model: Model,
    task: Task,
    hypothesis: Mapping[str, Feature],
    *,
    draws: int = 8,
    samples: int = 4,
    seed: int = 0,
) -> Scrubbed:
    """Scrub the clean prompts of a task under a hypothesis.

    Args:
        hypothesis: for each component of the circuit (`embed`, `z.1.0`, `mlp_out.2`) a function of a prompt's text,
            which is the same for two prompts if the component writes what is the same for the answer.
        draws: how many scrubbed runs are averaged.
        samples: how many hypotheses with features dealt out at random make the null.
        seed: of all draws.

    Raises:
        Refused: a component that the model does not have, prompts of several lengths, or a metric that is the same
            where everything comes from any prompt.
    """
    bound, w = task.bind(model), wiring(model)
    if len(set(bound.clean.lengths.tolist())) > 1:
        raise Refused("scrubbing", "the prompts have several lengths", "use prompts of one length")
    groups = _groups(w, bound.clean.texts, hypothesis)
    run, chance = _Run.of(model, w, bound, list(groups)), generator(seed)
    whole = model.measure(bound.clean, bound.measure).float().cpu()
    empty, own = (run.mean(g, draws, chance) for g in ({}, groups))
    dealt = [{u: g[torch.randperm(len(g), generator=chance)] for u, g in groups.items()} for _ in range(samples)]
    null = [run.mean(g, draws, chance) for g in dealt]
    gap = whole - empty
    if not abs(float(gap.mean())) > 1e-6:
        raise Refused("scrubbing", "any prompt's values give the same metric", "use prompts whose answers differ")
    found, interval = shares(torch.stack([own, *null]), empty, gap)
    fields, unit = ("recovered", "interval", "null"), bound.unit
    return Scrubbed(
        recovered=found[0],
        interval=interval[0],
        null=found[1:],
        value=own,
        groups=torch.tensor([len(g.unique()) for g in groups.values()], dtype=torch.long),
        whole=whole.mean(),
        empty=empty.mean(),
        labels={"component": [str(w.writers[u]) for u in groups], "bound": BOUNDS},
        units=dict.fromkeys(fields, "share of m(M) − m(∅)") | dict.fromkeys(("value", "whole", "empty"), unit),
        reasons=one_prompt(len(bound), "recovered") | {"value": "each prompt's own"},
        record={"control": "features dealt out at random", "draws": draws, "seed": seed, "prompts": len(bound)},
    )


def _groups(w: Wiring, texts: Sequence[str], hypothesis: Mapping[str, Feature]) -> dict[int, Int[Tensor, "prompt"]]:
    """Return for each named writer the number of each prompt's group."""
    known, out = {str(u): i for i, u in enumerate(w.writers)}, dict[int, Tensor]()
    for name, feature in hypothesis.items():
        if name not in known:
            raise Refused(f"component {name!r}", "this model has no such writer", "use embed, z.1.0 or mlp_out.2")
        values = [feature(t) for t in texts]
        numbers = {v: i for i, v in enumerate(dict.fromkeys(values))}
        out[known[name]] = torch.tensor([numbers[v] for v in values])
    return out


@dataclass(frozen=True, eq=False)
class _Run:
    """Scrubbed runs of some prompts.

    Attributes:
        inside: the writers that a hypothesis names.
        plain: what the writers write in the plain run.
    """

    model: Model
    wiring: Wiring
    bound: Bound
    inside: list[int]
    plain: dict[Address, Tensor]

    @staticmethod
    def of(model: Model, w: Wiring, bound: Bound, inside: list[int]) -> _Run:
        with torch.no_grad():
            plain = written(model, model.capture(bound.clean, places_written(w), logits=False))
        return _Run(model, w, bound, inside, plain)

    def mean(self, groups: Donors, draws: int, chance: torch.Generator) -> Float[Tensor, "prompt"]:
        """Return the metric of each prompt, mean over scrubbed runs; without groups everything is of any prompt."""
        return torch.stack([self._once(groups, chance) for _ in range(draws)]).mean(0)

    @torch.no_grad()
    def _once(self, groups: Donors, chance: torch.Generator) -> Float[Tensor, "prompt"]:
        n, w = len(self.bound), self.wiring
        everyone = torch.zeros(n, dtype=torch.long)
        others = [_drawn(everyone, chance) for _ in w.writers]
        donors = {u: _drawn(g, chance) for u, g in groups.items()}
        alternative = {a: self._moved(a, x, dict(enumerate(others))) for a, x in self.plain.items()}
        kept = torch.zeros_like(w.heard)
        kept[list(groups)] = True
        kept &= (belongs(w)[list(groups)].any(0) | torch.tensor([v.layer is None for v in w.readers]))[None]
        forward = MaskedForward(self.model, w, removed_by(w, kept[None]).to(self.model.device), alternative)
        sees = forward.sees()
        for place in {self._tapped(u) for u in groups}:
            sees[place] = self._then(place, donors, sees.get(place))
        tokens = self.bound.clean
        with self.model.edited(), taps.attached(self.model.anatomy, sees):
            seen = observe(self.model.anatomy, tokens, self.bound.measure.reads)
        return self.bound.measure(seen, torch.arange(n, device=tokens.ids.device)).float().cpu()

    def _tapped(self, writer: int) -> Address:
        """Return the place at which a writer's values are exchanged: heads before W_O."""
        u = self.wiring.writers[writer]
        return Address("resid_pre", 0) if u.layer is None else u.place

    def _then(self, place: Address, donors: Donors, see: taps.See | None) -> taps.See:
        """Exchange the values of a place between prompts, and hand them on."""
        name = Address("embed") if place.site == "resid_pre" else place

        def exchange(x: Tensor) -> Tensor:
            new = self._moved(name, x, donors)
            return new if see is None else see(new)

        return exchange

    def _moved(self, place: Address, x: Float[Tensor, "prompt ..."], donors: Donors) -> Tensor:
        """Return what the writers of a place write for the donors of each prompt; those without donors, their own."""
        if place.site != "z":
            own = donors.get(self.wiring.writers.index(place))
            return x if own is None else x[own.to(x.device)]
        start = self.wiring.writers.index(Address("z", place.layer, 0))
        given = [donors.get(start + h) for h in range(x.shape[2])]
        heads = [x[:, :, h] if own is None else x[own.to(x.device), :, h] for h, own in enumerate(given)]
        return torch.stack(heads, 2)


def _drawn(groups: Int[Tensor, "prompt"], chance: torch.Generator) -> Int[Tensor, "prompt"]:
    """Draw for each prompt one of its group."""
    out = torch.empty_like(groups)
    for g in groups.unique():
        rows = (groups == g).nonzero()[:, 0]
        out[rows] = rows[torch.randint(len(rows), (len(rows),), generator=chance)]
    return out
