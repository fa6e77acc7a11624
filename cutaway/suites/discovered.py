"""Which edges carry an answer, and how far is that to be trusted? A circuit found on some prompts, judged on others.

    found = discover(model, *task.split(0.5))
    found.carried.faithfulness[0], found.carried.null[0], found.certificate.level

Edges are scored by `circuits.eap_ig`, and the circuit is the first of them by |score|: as few as carry `WANTED` of the
answer on the prompts on which they were scored, of a few sizes. Everything that is reported of it comes from the other
prompts: its share of the answer beside random circuits and exchanged answers, and its certificate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cutaway.circuits.certify import Certificate, certify
from cutaway.circuits.circuit import Circuit, first, without_dead_ends
from cutaway.circuits.components import belongs
from cutaway.circuits.eap_ig import eap_ig
from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.evaluation import Evaluation, shares
from cutaway.circuits.faithfulness import Faithfulness, faithfulness
from cutaway.core.graph import Graph, graph
from cutaway.core.node import parse_edge
from cutaway.models.edits.wiring import wiring
from cutaway.models.model import Model
from cutaway.tasks.task import Task

SIZES = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15)  # shares of all edges
WANTED = 0.9  # of the answer, on the prompts on which edges are scored
_CERTIFIED = 4


@dataclass(frozen=True)
class Discovered:
    """A circuit found on some prompts, and what was measured of it on others.

    Attributes:
        scores: the scores of all edges, on the prompts that chose the circuit.
        circuit: its edges, as a set.
        carried: its share of the answer on the other prompts (the first entry; the second is that of all edges).
        certificate: its certificate on the other prompts.
        graph: the circuit between components.
    """

    scores: EdgeScores
    circuit: Circuit
    carried: Faithfulness
    certificate: Certificate
    graph: Graph

    @property
    def size(self) -> float:
        """The share of all edges that the circuit has."""
        return len(self.circuit.edges) / len(self.scores.score)


def discover(
    model: Model,
    found_on: Task,
    judged_on: Task,
    *,
    sizes: tuple[float, ...] = SIZES,
    audit: int = 24,
    draws: int = 8,
    steps: int = 20,
    samples: int = 10,
    seed: int = 0,
) -> Discovered:
    """Find a circuit on some prompts, and judge it on others.

    Args:
        sizes: the shares of all edges of which the smallest that carries enough is taken, or else the largest.
        audit: at how many edges the exact score is measured beside the estimate.
        draws: how many random subsets the certificate cuts for each probability.
        steps: how many steps the certificate's search takes from each start; 0 for no search, without which there is
            no level A.
        samples: how many random circuits stand beside what it carries; four of them at most are certified.
        seed: of every random choice.

    Raises:
        Refused: a model without such a wiring, or prompts on which the answer does not depend on any edge.
    """
    scores = eap_ig(model, found_on, audit=audit, samples=1, seed=seed)
    circuit = _chosen(model, found_on, scores, sizes, seed)
    carried = faithfulness(model, judged_on, circuit, samples=samples, seed=seed)
    certificate = certify(
        model, judged_on, circuit, draws=draws, steps=steps, samples=min(samples, _CERTIFIED), seed=seed
    )
    return Discovered(scores, circuit, carried, certificate, component_graph(model, scores, circuit))


def component_graph(model: Model, scores: EdgeScores, circuit: Circuit) -> Graph:
    """Return a circuit as a graph between its components: the embeddings, heads, MLPs and the logits.

    The edges into a head's queries, keys and values are one, whose weight is the sum of their scores. Keys and values
    that heads share lead to each of these heads.
    """
    w, weights = wiring(model), dict[str, float]()
    names, of = [*map(str, w.writers), "logits"], belongs(w)
    for i in circuit.scores(w).isfinite().nonzero()[:, 0].tolist():
        u, v = w.pairs[i].tolist()
        owners = of[:, v].nonzero()[:, 0].tolist() or [-1]
        for owner in owners:
            edge = f"{names[u]}→{names[owner]}"
            weights[edge] = weights.get(edge, 0.0) + float(scores.score[i])
    return graph(list(weights), torch.tensor(list(weights.values())), unit=scores.units["score"])


def _chosen(model: Model, task: Task, scores: EdgeScores, sizes: tuple[float, ...], seed: int) -> Circuit:
    """Return the first edges by |score|, without dead ends: of the smallest size that carries enough on these prompts,
    or the largest.
    """
    x = Evaluation.of(model, task, "corrupt", "noise", "all", seed)
    counts = [max(1, round(k * len(scores.score))) for k in sorted(sizes)]
    masks = [without_dead_ends(x.wiring, first(x.wiring, scores.score, n)) for n in counts]
    whole, empty, *found = x.values([*x.whole_and_empty(), *masks])[..., 0]
    kept = shares(torch.stack(found), empty, x.gap(whole, empty))[0] >= WANTED
    mask = masks[int(kept.int().argmax()) if bool(kept.any()) else -1]
    inside = mask[x.wiring.pairs[:, 0], x.wiring.pairs[:, 1]].nonzero()[:, 0]
    edges = tuple(parse_edge(scores.labels["edge"][i]) for i in inside.tolist())
    return Circuit(f"{len(edges)} edges of {task.name}", edges)
