"""Do the features of an attribution graph do what the graph says?

The validation block of an attribution graph (Ameisen et al. 2025, section "Evaluating our graphs"): the units of the
largest influence are removed one by one, and what the target loses is set beside what the graph says.

* `effect[node]`: the target's value minus its value without the unit, in an ordinary forward: attention, norms and
  later MLPs follow. A latent is removed by taking activation · decoder away from what its MLPs write, a neuron by
  setting its activation to 0. Several targets count by their weights in the graph.
* `direct`: the unit's edge to the targets. `frozen`: the same loss measured in the model with patterns, norms' divisors
  and MLP outputs held. The two must be equal, and a gap beyond rounding is a refusal (in half precision `reasons` says
  that it was not checked).
* `predicted`: the unit's effect along all paths of the graph: a unit behind it changes by the share of its value that
  it loses. `agreement` is Spearman's correlation of `predicted` with `effect` over units, `direct_agreement` that of
  `direct`, each with its bootstrapped 95 % interval (resamples in which one side does not vary count as 0). The paper
  reports 0.72 for features of one 18-layer model.
* Control (`effect_null`): as long a random vector taken away at the same places. `replacement_null` and
  `completeness_null`: the graph of the same activations with decoders in random rotations, whose error takes the rest.
* Known failures: agreement is about the largest units of the graph; what a unit changes in attention patterns and in
  norms' divisors is outside the graph's account.
* Equivalences (tests): with everything frozen the loss is the edge; without MLPs behind it, `predicted` is `direct`;
  rotated decoders give the graph of the dictionary with rotated decoders.
* Cost: some forwards, and 2 + samples forwards a unit. It is the first prompt of several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.node import Direction, Latent, Logit, Node
from cutaway.core.refuse import Code, Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, bootstrap, generator, rank_correlation, rotation
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.subject import Neurons
from cutaway.graphs.trace import Run, prepare
from cutaway.graphs.units import Units, Written
from cutaway.graphs.writes import Steps, random_writes, writes
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.anatomy.unembedding import readable
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Ablate, Add, Freeze
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task

_HELD = ("pattern", "ln1.scale", "ln2.scale", "mlp_out")
# gap of a frozen effect, of the largest edge: sweeps keep float32
_EXACT = {torch.float32: 1e-3, torch.float64: 1e-6}
_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class GraphValidation(Result, kind="graph_validation"):
    """Account of a graph about its largest units, and the changes that removing them makes.

    Attributes:
        effect: what the target loses without the unit.
        effect_null: what it loses without a random vector of the same length.
        predicted: what the graph says it loses, along all paths.
        direct: the unit's edge to the target.
        frozen: what the target loses with everything else frozen; NaN where the model cannot be held (see `reasons`).
        agreement: Spearman's correlation of `predicted` and `effect` over units.
        agreement_interval: its bounds.
        direct_agreement: Spearman's correlation of `direct` and `effect`.
        direct_agreement_interval: its bounds.
        replacement: of the graph.
        replacement_null: of graphs with rotated decoders.
        completeness: of the graph.
        completeness_null: of graphs with rotated decoders.
        error_share: the share of influence that ends in errors.
        others_share: the share of influence that ends in units left out.
    """

    page = ("agreement", "replacement")

    effect: Float[Tensor, "node"]
    effect_null: Float[Tensor, "node sample"]
    predicted: Float[Tensor, "node"]
    direct: Float[Tensor, "node"]
    frozen: Float[Tensor, "node"]
    agreement: Float[Tensor, ""]
    agreement_interval: Float[Tensor, "bound"]
    direct_agreement: Float[Tensor, ""]
    direct_agreement_interval: Float[Tensor, "bound"]
    replacement: Float[Tensor, ""]
    replacement_null: Float[Tensor, "rotation"]
    completeness: Float[Tensor, ""]
    completeness_null: Float[Tensor, "rotation"]
    error_share: Float[Tensor, ""]
    others_share: Float[Tensor, ""]


@method(
    answers="Do the features of an attribution graph do what the graph says?",
    paper="Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs",
    cost="(12 + (2 + samples) * node) * F",
    control="random_vector",
    rung="interventional",
)
def validate(
    model: Model,
    task: Task | Prompts,
    transcoders: Dictionary | Neurons,
    /,
    *,
    top: int = 20,
    targets: tuple[str, ...] = (),
    nodes: int = 7500,
    leading: int | None = None,
    rotations: int = 2,
    samples: int = 4,
    seed: int = 0,
) -> GraphValidation:
    """Remove the units of the largest influence one by one, and compare with what their graph says.

    Args:
        top: how many units are removed.
        targets: as in `trace`.
        nodes: most units that are nodes of the graph.
        leading: leading positions whose units are no nodes, as in `trace`.
        rotations: how many graphs with rotated decoders are set beside it.
        samples: how many random vectors make the null of each unit.
        seed: of the random vectors and rotations.

    Raises:
        Refused: what `trace` refuses, a graph without units, or frozen effects that are not the edges.
    """
    run = prepare(model, task, transcoders, targets, logits=10, mass=0.95, leading=leading, samples=2, seed=seed)
    whole = run.graph(nodes)
    chosen = _largest(whole, top)
    predicted = along_all_paths(whole)[chosen]
    direct = (whole.share[:, None] * whole.weight).sum(0)[chosen]
    units = [n for i in chosen.tolist() if isinstance(n := whole.nodes[i], Latent | Address)]
    g, written = generator(seed), [writes(run, node) for node in units]
    null = [random_writes(one, g) for one in written for _ in range(samples)]
    lost = losses(run, [removal(node, one) for node, one in zip(units, written, strict=True)])
    chance = losses(run, [_taken(one) for one in null]).reshape(len(written), samples)
    frozen, why = _frozen(run, written)
    why = why or _checked(model, frozen, direct)
    turned = [_rotated(run, generator(seed + 1 + i)).graph(nodes) for i in range(rotations)]
    agreement, direct_agreement = (_spearman(x, lost, seed) for x in (predicted, direct))
    return GraphValidation(
        effect=lost.float(),
        effect_null=chance.float(),
        predicted=predicted.float(),
        direct=direct.float(),
        frozen=frozen.float(),
        agreement=torch.tensor(agreement[0]),
        agreement_interval=torch.tensor(agreement[1]),
        direct_agreement=torch.tensor(direct_agreement[0]),
        direct_agreement_interval=torch.tensor(direct_agreement[1]),
        replacement=whole.replacement.float(),
        replacement_null=torch.tensor([float(t.replacement) for t in turned]),
        completeness=whole.completeness.float(),
        completeness_null=torch.tensor([float(t.completeness) for t in turned]),
        error_share=whole.error_share.float(),
        others_share=whole.others_share.float(),
        labels={"node": [whole.labels["node"][i] for i in chosen.tolist()], "bound": BOUNDS},
        units=dict.fromkeys(("effect", "effect_null", "predicted", "direct", "frozen"), "logits"),
        reasons={"effect": "one prompt"} | ({"frozen": why} if why else {}),
        record=whole.record,
    )


def _largest(whole: AttributionGraph, top: int) -> Int[Tensor, "unit"]:
    """Return the units of the largest influence that anything reads, the largest first."""
    size = torch.where(whole.kinds["unit"], whole.influence, -1.0)
    n = min(top, int((size > 0).sum()))
    if n < 1:
        raise Refused(
            (Keyword("top", top), " units of a graph"), "it has none with an influence", "use other transcoders"
        )
    return size.topk(n).indices


def along_all_paths(
    whole: AttributionGraph, removed: Bool[Tensor, "*set node"] | None = None
) -> Float[Tensor, "*set node"]:
    """Return what the targets lose without each node along all paths, errors and constants held.

    A unit that loses part of its value loses that part of what it writes. Paths through nodes that are `removed`
    altogether count for these alone, so that the sum over a set of them is what the targets lose without them all.
    """
    total, level = (whole.share[:, None] * whole.weight).sum(0), whole.level
    total = total if removed is None else total.expand(removed.shape)
    for one in level.unique().flip(0).tolist():
        rows = ((level == one) & (whole.share == 0)).nonzero()[:, 0]
        value, nodes = whole.value[rows], whole.node_of[rows]
        part = torch.where(value == 0, 0.0, total[..., nodes] / torch.where(value == 0, 1.0, value))
        part = part if removed is None else part.masked_fill(removed[..., nodes], 0.0)
        total = total + part @ whole.weight[rows]
    return total


def _taken(steps: Steps) -> list[Edit]:
    return [Add(place, -vector) for place, vector in steps]


def removal(node: Latent | Address, steps: Steps) -> list[Edit]:
    """Return the edits that remove a unit: a neuron's activation is set to 0, what a latent writes is taken away."""
    return [Ablate(node)] if isinstance(node, Address) else _taken(steps)


def losses(
    run: Run, variants: Sequence[Sequence[Edit]], base: Sequence[Edit] = (), linear: bool = False
) -> Float[Tensor, "variant"]:
    """Return by how much the targets' values are larger in the run of `base` than under each variant; with `linear`,
    what the targets' readers read of the last stream.
    """
    frozen, place = run.frozen, Address("resid_post", run.frozen.layers - 1)

    def values(streams: Float[Tensor, "row d_model"]) -> Float[Tensor, "row"]:
        x = streams.to(frozen.dtype)
        return x @ run.targets.together if linear else _values(run, x)

    plain = values(frozen.model.capture(run.tokens, place, base, logits=False)[f"{place}@-1"])

    def lost(seen: Seen, prompt: Tensor) -> Tensor:
        assert seen.activations is not None
        return plain - values(seen.activations[f"{place}@-1"])  # a difference, for sweeps keep float32

    measure = Measure(lost, Reads(last_logits=False, places=(place,)))
    return sweep(frozen.model, run.tokens, variants, measure, base=base)[:, 0].to(frozen.dtype).cpu()


def _values(run: Run, streams: Float[Tensor, "variant d_model"]) -> Float[Tensor, "variant"]:
    """Return the targets' values, weighted, of last streams: uncapped logits through the model's own norm."""
    model, goals = run.frozen.model, run.targets
    way = readable(model.anatomy, f"validation of a graph of {model.name}")
    logits = way.logits(way.read(streams.to(model.dtype)), capped=False).to(streams)

    def value(node: Logit | Direction, vector: Tensor) -> Tensor:
        if isinstance(node, Direction):
            return streams @ vector
        return logits[:, node.token] - (logits.mean(1) if node.foil is None else logits[:, node.foil])

    columns = [value(n, v) for n, v in zip(goals.nodes, goals.vector, strict=True)]
    return torch.stack(columns, 1) @ goals.share.to(streams)


def _frozen(run: Run, written: Sequence[Steps]) -> tuple[Float[Tensor, "unit"], str]:
    """Return what the targets lose with patterns, divisors and MLPs held, or NaN and the reason why they cannot be."""
    model, frozen = run.frozen.model, run.frozen
    behind = any(frozen.anatomy.part(i, n) is not None for i in range(frozen.layers) for n in ("ln1_post", "ln2_post"))
    if behind or run.units.skips:
        why = "divisors of norms behind attention have no site" if behind else "a skip is no part of the model"
        return torch.full((len(written),), torch.nan), why
    sites = model.sites()
    places = model.places([s for s in _HELD if sites[s].startswith("read")])
    acts = model.capture(run.tokens, places, logits=False)
    return losses(run, [_taken(one) for one in written], [Freeze(a, acts) for a in places], linear=True), ""


def _checked(model: Model, frozen: Float[Tensor, "unit"], direct: Float[Tensor, "unit"]) -> str:
    """Return why frozen effects were not held against the edges, or "" if they are the same.

    Raises:
        Refused: they differ by more than rounding.
    """
    if model.dtype not in _EXACT:
        return f"shown, not checked: {str(model.dtype).removeprefix('torch.')} rounds by more than a small edge"
    gap = float((frozen - direct.cpu()).abs().max())
    if gap > _EXACT[model.dtype] * float(direct.abs().max().clamp_min(1e-6)):
        why = f"with all else frozen, removing a unit changes the target by {gap:.2g} more than its edge"
        raise Refused(f"validation of a graph of {model.name}", why, ("see ", Code("self_check(model)")))
    return ""


class Rotated(Units):
    """The same units writing in randomly rotated directions; their errors take up what that misses."""

    def __init__(self, units: Units, turn: Float[Tensor, "d_model d_model"]):
        self.units, self.table, self.skips, self.leading = units, units.table, units.skips, units.leading
        self.written = [_turned(w, turn) for w in units.written]

    def readers(self, units: Int[Tensor, "row"]) -> Float[Tensor, "row d_model"]:
        return self.units.readers(units)

    def constants(self, units: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        return self.units.constants(units)

    def node(self, layer: int, index: int, position: int) -> Node:
        return self.units.node(layer, index, position)


def _turned(w: Written, turn: Float[Tensor, "d_model d_model"]) -> Written:
    vectors = [v @ turn for v in w.vectors]
    missed = torch.stack([v.sum(0) - t.sum(0) for v, t in zip(w.vectors, vectors, strict=True)])
    return replace(w, vectors=vectors, error=w.error + missed)


def _rotated(run: Run, g: torch.Generator) -> Run:
    turn = rotation(run.frozen.model.shape.d_model, g).to(run.targets.vector)
    return replace(run, units=Rotated(run.units, turn))


def _spearman(x: Float[Tensor, "unit"], y: Float[Tensor, "unit"], seed: int) -> tuple[float, tuple[float, float]]:
    """Return Spearman's correlation over units, and its bootstrapped interval; NaN where one side does not vary.

    A resample in which one side does not vary has no order, and counts as a correlation of 0.
    """

    def resampled(a: Any, b: Any, axis: int) -> Any:
        return np.nan_to_num(rank_correlation(a, b, axis))

    found = float(rank_correlation(x.cpu().numpy(), y.cpu().numpy()))
    if math.isnan(found):
        return found, (math.nan, math.nan)
    return found, bootstrap((x, y), resampled, seed=seed, samples=_RESAMPLES, vectorized=True)
