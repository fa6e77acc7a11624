"""Do the features of a graph that are grouped in a supernode act together?

Supernodes (Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs) are groups of features that a reader
takes for one thing. They are suggested here, or read from a file that was edited by hand, and each is tested: all of
its units are removed at once.

* Suggestion: among the units of the smallest set of nodes that holds `share` of the influence, two at one position are
  alike by √(cos⁺ · co), `cos` of what they write, `co` of their activations on the tokens of all prompts; average
  linkage joins groups down to `similarity`. A name is the token of the most influence on the group and, if no one of 20
  random directions raises a logit as far, the token whose logit the group raises most (“Norway” → “oslo”).
* `effect[supernode]`: the target's value minus its value without the group's units, in an ordinary forward (as in
  `graphs.validate`), mean over the prompts that have the first one's length; each prompt has its own target, and a unit
  counts where it is active at the same position. `predicted`: what the first prompt's graph says, along all paths, each
  member counted once.
* Interval: over prompts; one prompt has none.
* Control (`effect_null`): as many random units of the same layers and positions, drawn from all that are active in that
  prompt, the group's own among them, removed in the same way. A group that is all of its layers' units has no control
  but itself.
* Known failures: similar features need not mean the same, and a supernode is a reading; errors have no part in it. The
  token that a name says is one of weights alone: groups of early layers raise rare tokens that mean nothing. Of
  several prompts the groups are those of the first. Where no two units are alike, there is no supernode.
* Equivalences (tests): a group of one unit has its effect in `graphs.validate`; others that of edits by hand;
  `predicted` solves the graph's linear system; a latent split in two is one supernode.
* Cost: (12 + (1 + samples) · supernodes) forwards a prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.node import Latent, Node, parse_node
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.core.subject import subject
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.grouping import Supernodes, read_supernodes, suggest, unit_of
from cutaway.graphs.prune import covering
from cutaway.graphs.subject import Neurons
from cutaway.graphs.trace import Run, prepare
from cutaway.graphs.validate import along_all_paths, losses, removal
from cutaway.graphs.writes import writes
from cutaway.models.edits.edit import Edit
from cutaway.models.model import Model
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task

Cell = tuple[int, int | None]  # layer and position


@dataclass(frozen=True, kw_only=True)
class SupernodeEffects(Result, kind="supernode_effects"):
    """Supernodes of a graph, and what the target loses without each.

    Attributes:
        effect: what the target loses without all units of the group, mean over prompts.
        interval: its bounds.
        effect_null: what it loses without as many random units of the same layers and positions.
        predicted: what the graph says it loses, along all paths.
        size: the number of units of the group.
    """

    effect: Float[Tensor, "supernode"]
    interval: Float[Tensor, "supernode bound"]
    effect_null: Float[Tensor, "supernode sample"]
    predicted: Float[Tensor, "supernode"]
    size: Int[Tensor, "supernode"]

    @property
    def supernodes(self) -> Supernodes:
        """The groups, to be saved and edited."""
        groups = {name: tuple(nodes) for name, nodes in self.record["supernodes"].items()}
        return Supernodes(groups, self.record["graph"])


@method(
    answers="Do the features of a graph that are grouped in a supernode act together?",
    paper="Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs",
    cost="prompts * (12 + (1 + samples) * supernode) * F",
    control="random_groups",
    rung="interventional",
)
def supernodes(
    model: Model,
    task: Task | Prompts,
    transcoders: Dictionary | Neurons,
    /,
    *,
    groups: str = "",
    similarity: float = 0.5,
    share: float = 0.8,
    targets: tuple[str, ...] = (),
    nodes: int = 7500,
    leading: int | None = None,
    samples: int = 6,
    seed: int = 0,
) -> SupernodeEffects:
    """Suggest supernodes of a prompt's graph, or read them, and remove each.

    Args:
        groups: a file of supernodes, such as `found.supernodes.save(…)` writes [default: they are suggested].
        similarity: how alike the units of a group are on average, at least, from 0 to 1.
        share: the share of influence that the units and other nodes hold among which groups are suggested.
        targets: as in `trace`.
        nodes: most units that are nodes of the graph.
        leading: leading positions whose units are no nodes, as in `trace`.
        samples: how many random groups make the null of each.
        seed: of the random groups.

    Raises:
        Refused: what `trace` refuses, or a file of another graph or with unknown nodes.
    """
    for name, value in (("similarity", similarity), ("share", share)):
        if not 0 <= value <= 1:
            raise Refused(Keyword(name, value), "it is a share", "give a number from 0 to 1")
    each = _each(task)
    runs = [prepare(model, x, transcoders, targets, 10, 0.95, leading, samples=2, seed=seed) for x in each]
    whole = runs[0].graph(nodes)
    units = "neurons" if isinstance(transcoders, Neurons) else "transcoders"
    known = {"model": model.identity(), units: transcoders.identity()}
    whole = replace(whole, record=whole.record | {"subjects": known})
    found = _read(groups, whole) if groups else _suggested(runs, whole, similarity, share)
    alike = [run for run in runs if run.frozen.width == runs[0].frozen.width]
    g, members = generator(seed), [[parse_node(n) for n in group] for group in found.groups.values()]
    measured = [_measured(run, members, samples, g) for run in alike]
    effect = torch.stack([one[:, 0] for one in measured])
    return SupernodeEffects(
        effect=effect.mean(0).float(),
        interval=mean_interval(effect),
        effect_null=torch.stack([one[:, 1:] for one in measured]).mean(0).float(),
        predicted=_predicted(whole, found.groups.values()),
        size=torch.tensor([len(group) for group in members], dtype=torch.long),
        labels={"supernode": list(found.groups), "bound": BOUNDS},
        units=dict.fromkeys(("effect", "effect_null", "predicted"), "logits") | {"size": "units"},
        reasons=one_prompt(len(alike), "effect"),
        record={
            "supernodes": {name: list(nodes) for name, nodes in found.groups.items()},
            "graph": dict(found.graph),
            "split": f"grouped in the first prompt, measured on the {len(alike)} of its length among {len(runs)}",
            "targets": whole.record["targets"],
        },
    )


def _each(about: Task | Prompts) -> list[Task | Prompts]:
    """Return each prompt alone."""
    split = subject("task" if isinstance(about, Task) else "prompts").split
    assert split is not None
    return split(about)


def _read(file: str, whole: AttributionGraph) -> Supernodes:
    found = read_supernodes(file)
    found.check(whole, f"file {file!r}")
    return found


def _suggested(runs: Sequence[Run], whole: AttributionGraph, similarity: float, share: float) -> Supernodes:
    chosen = (covering(whole.influence, share) & whole.kinds["unit"]).nonzero()[:, 0]
    return suggest(runs, whole, chosen, similarity)


def _measured(
    run: Run, groups: Sequence[Sequence[Node]], samples: int, g: torch.Generator
) -> Float[Tensor, "supernode sample"]:
    """Return what the targets lose without each group, and behind it without each of its random groups."""
    cells = _cells(run)
    variants = list[list[Edit]]()
    for group in groups:
        own = [n for n in group if isinstance(n, Latent | Address) and n in cells.get(_cell(n), ())]
        variants += [_removed(run, units) for units in (own, *(_alike(own, cells, g) for _ in range(samples)))]
    out, some = torch.zeros(len(variants)), [i for i, edits in enumerate(variants) if edits]
    if some:
        out[some] = losses(run, [variants[i] for i in some]).float()
    return out.view(len(groups), 1 + samples)


def _cells(run: Run) -> dict[Cell, list[Latent | Address]]:
    """Return the units that are active in a run, by layer and position."""
    t, out = run.units.table, dict[Cell, list[Latent | Address]]()
    for one in zip(t.layer.tolist(), t.index.tolist(), t.position.tolist(), strict=True):
        node = run.units.node(*one)
        assert isinstance(node, Latent | Address)
        out.setdefault(_cell(node), []).append(node)
    return out


def _cell(node: Latent | Address) -> Cell:
    return unit_of(node)[0], node.position


def _alike(
    own: Sequence[Latent | Address], cells: Mapping[Cell, list[Latent | Address]], g: torch.Generator
) -> list[Latent | Address]:
    """Return as many random active units of each layer and position."""
    return [
        cells[cell][i]
        for cell, n in Counter(map(_cell, own)).items()
        for i in torch.randperm(len(cells[cell]), generator=g)[:n].tolist()
    ]


def _removed(run: Run, units: Sequence[Latent | Address]) -> list[Edit]:
    return [edit for node in units for edit in removal(node, writes(run, node))]


def _predicted(whole: AttributionGraph, groups: Iterable[Sequence[str]]) -> Float[Tensor, "supernode"]:
    """Return what the targets lose without each group along all paths of the graph."""
    masks = [whole.mask(group) for group in groups]
    if not masks:
        return torch.zeros(0)
    members = torch.stack(masks)
    return torch.where(members, along_all_paths(whole, members), 0.0).sum(1).float()
