"""Which latents and errors of several dictionaries carry the answer, and along which edges?

Sparse feature circuits (Marks et al. 2024, arXiv:2403.19647). Dictionaries at sites of the residual stream, attention
and MLPs split what each site holds into latents f and an error ε = x − f W_dec − b_dec, which stays in place: the model
is unchanged.

* Nodes: `latent.BLOCK.NUMBER` and `error.BLOCK`, at all positions together or, with `by="position"`, at each (of
  prompts of one template). Blocks of all dictionaries count in the order of the forward; `blocks` has their sites. A
  block may read another site than it writes (a transcoder).
* `effect` of a node: what the metric changes, to first order, when the node takes its corrupt value in the clean run,
  ∂m/∂x · (step of x), mean over prompts. The gradient passes straight through the dictionary, so that the effects of a
  site's nodes add up to that of the site (`patching.attribution`, direction noise). The paper's sign is the opposite:
  its metric is the corrupt answer's.
* `steps`: integrated gradients, for each site by itself on the straight way of its nodes, at midpoints; `rule="sfc"`
  takes the left ends, as the paper's code does with 10 steps.
* Edges u → d: ∂m/∂d · ∂d/∂u · (step of u) in the clean run, nothing flowing through other sites in between. Those to
  all nodes, and to `direction.metric`, add up to u's gradient effect; `carried` is the sum of those kept.
* Kept are nodes with |effect| ≥ `nodes` and edges with |weight| ≥ `edges`, in units of the metric: 0.2 and 0.02 are
  the paper's command line, 0.1 and 0.01 its functions. 0 keeps all.
* `interval`, `effect_interval`: 95 %, over prompts. Control (`null`, `effect_null`): steps as long along random other
  latents of the block, of an error in a random direction; `chance` is how many nodes these would keep.
* Audit: `exact` is the measured effect of `audit` nodes exchanged alone (`estimate` is theirs): half of them the
  largest, half drawn from strata of the rest of those that move. `agreement` says what all would give.
* Known failures: effects of nodes that stand in for each other do not add up; a gradient misses saturated attention
  (read `agreement`); a circuit of errors explains nothing (`graphs.circuit_curve`).
* Equivalences (tests): both sums above; the last site's edges are its effects; edges are finite differences with the
  sites in between held; where all is linear from the site on, estimates are exact effects, with steps and without.
* Cost: 3 forwards and 2 backwards, one backward a kept node, `steps` forwards and backwards a site, and one forward an
  audited node. All prompts run together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.graph import Graph, graph
from cutaway.core.method import method
from cutaway.core.node import Direction, Edge, Node
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.stats import BOUNDS, mean_interval, one_prompt
from cutaway.dictionaries.subject import Dictionaries
from cutaway.graphs.node_edges import Edges, node_edges
from cutaway.graphs.node_effects import NodeEffects, Rule, kept, node_effects
from cutaway.graphs.submodules import submodules
from cutaway.interventions.audit import STATISTICS, Audit
from cutaway.models.model import Model
from cutaway.tasks.task import Task

METRIC = Direction("metric")


@dataclass(frozen=True, kw_only=True)
class FeatureCircuit(Graph, kind="feature_circuit"):
    """A sparse feature circuit: latents, errors and the metric, with effects, and the edges between them.

    Attributes:
        effect: the estimated effect of each node; of the metric what it changes in all.
        effect_interval: of `effect`, 95 %, over prompts.
        effect_null: the same effects for random steps.
        carried: the sum of the kept edges out of each node.
        chance: the number of nodes that the random steps would keep.
        estimate: the estimated effects of the audited nodes.
        exact: their measured effects.
        exact_interval: of `exact`, 95 %, over prompts.
        agreement: how well estimates and measured effects of all nodes agree.
        agreement_interval: of `agreement`, 95 %.
        clean: the metric per clean prompt.
        corrupt: the metric per corrupt prompt.
        blocks: the site of each block.
    """

    effect: Float[Tensor, "node"]
    effect_interval: Float[Tensor, "node bound"]
    effect_null: Float[Tensor, "node sample"]
    carried: Float[Tensor, "node"]
    chance: Int[Tensor, "sample"]
    estimate: Float[Tensor, "audited"] | None = None
    exact: Float[Tensor, "audited"] | None = None
    exact_interval: Float[Tensor, "audited bound"] | None = None
    agreement: Float[Tensor, "statistic"] | None = None
    agreement_interval: Float[Tensor, "statistic bound"] | None = None
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    blocks: tuple[str, ...]


@method(
    answers="Which latents and errors of several dictionaries carry the answer, and along which edges?",
    paper="Marks et al. 2024, arXiv:2403.19647",
    cost="prompts * ((4 + audit + steps * blocks) * F + (2 + node + steps * blocks) * B)",
    control="random_latent",
    rung="interventional",
    fills=("interval", "null", "estimate", "exact", "agreement"),
)
def feature_circuit(
    model: Model,
    task: Task,
    autoencoders: Dictionaries,
    /,
    *,
    by: Literal["all", "position"] = "all",
    steps: int = 0,
    rule: Rule = "midpoint",
    nodes: float = 0.2,
    edges: float = 0.02,
    audit: int = 24,
    samples: int = 4,
    seed: int = 0,
) -> FeatureCircuit:
    """Find the latents and errors with a large effect, and the edges between them.

    Args:
        by: a node is a latent at all positions, or at each.
        steps: steps of integrated gradients for each site; 0 for one gradient.
        rule: where these steps lie: at midpoints, or as in the paper's code (sfc) at left ends.
        nodes: the smallest |effect| of a node, in the unit of the metric.
        edges: the smallest |weight| of an edge.
        audit: how many nodes are measured exactly.
        samples: how many random steps make the null of each node and edge.
        seed: of the random steps and of the audit's nodes.

    Raises:
        Refused: a dictionary whose latents are no nodes, a corruption that does not change the metric, or no node with
            so large an effect.
    """
    bound, subs = task.bind(model), submodules(model, autoencoders)
    found = node_effects(model, task, bound, subs, by, steps, rule, samples, seed)
    chosen = kept(found.effect, nodes)
    if not len(chosen):
        largest = float(found.effect.mean(0).abs().max())
        why = f"the largest effect of any node is {largest:.3g} {bound.unit}"
        raise Refused(Keyword("nodes", nodes), why, "give a smaller threshold")
    between = node_edges(model, found, chosen, edges)
    done = found.audited(model, audit, seed) if audit else None
    return _result(found, chosen, between, done, nodes)


def _result(
    found: NodeEffects, chosen: Int[Tensor, "kept"], between: Edges, done: Audit | None, least: float
) -> FeatureCircuit:
    x, bound = found.runs, found.runs.bound
    names: list[Node] = [*map(found.name, chosen.tolist()), METRIC]
    ends = zip(between.source.tolist(), between.target.tolist(), strict=True)
    blocks = tuple(str(c.sub.site) for c in found.changes)
    edges, words = [Edge(names[s], names[t]) for s, t in ends], bound.clean.pieces[0] if len(bound) == 1 else ()
    drawn = graph(edges, between.weight, nodes=names, words=words, blocks=blocks)
    whole = (x.corrupt - x.clean).cpu()[:, None]
    effect = torch.cat([found.effect[:, chosen], whole], 1)
    none = torch.full((1, found.chance.shape[1]), torch.nan)
    carried = torch.zeros(len(names)).index_add_(0, between.source, between.weight)
    audited, labels = _audited(found, done)
    measured = ("weight", "interval", "null", "effect", "effect_interval", "effect_null", "carried", "clean", "corrupt")
    return FeatureCircuit(
        weight=drawn.weight,
        source=drawn.source,
        target=drawn.target,
        depth=drawn.depth,
        column=drawn.column,
        interval=between.interval,
        null=between.null,
        effect=effect.mean(0),
        effect_interval=mean_interval(effect),
        effect_null=torch.cat([found.chance[chosen], none]),
        carried=carried,
        chance=(found.chance.abs() >= least).sum(0),
        clean=x.clean.cpu(),
        corrupt=x.corrupt.cpu(),
        blocks=blocks,
        labels=drawn.labels | labels | {"bound": BOUNDS},
        units=dict.fromkeys([*measured, *(n for n in audited if "agreement" not in n)], bound.unit)
        | {"chance": "nodes"},
        reasons=one_prompt(len(bound), "weight", "effect", "exact") | {str(METRIC): "no null: it is no estimate"},
        record=x.record() | _record(found, chosen, done),
        **audited,
    )


def _audited(found: NodeEffects, done: Audit | None) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Return the fields of an audit and their labels."""
    if done is None:
        return {}, {}
    at = list(done.sample.chosen)
    fields = {
        "estimate": found.effect[:, at].mean(0),
        "exact": done.exact[at],
        "exact_interval": mean_interval(done.effects.T),
        "agreement": done.agreement,
        "agreement_interval": done.interval,
    }
    return fields, {"audited": [str(found.name(i)) for i in at], "statistic": STATISTICS}


def _record(found: NodeEffects, chosen: Int[Tensor, "kept"], done: Audit | None) -> dict[str, object]:
    errors = found.errors()
    return {
        "effect is": "an estimate",
        "agreement": str(done.sample) if done is not None else "none was asked for",
        "nodes": {
            "in all": found.effect.shape[1],
            "that move": int(found.moves().sum()),
            "kept": len(chosen),
            "errors kept": int(errors[chosen].sum()),
        },
    }
