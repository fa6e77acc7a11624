"""How much of a known circuit does another one find: published, of another tool, of a compiled program?

Both are circuits on the same model; the reference may be a published one by name, which carries groups of components.
Recovery of edges is measured as by Conmy et al. 2023 (arXiv:2304.14997).

* `found`: of each group of the reference, and of all of its components, the share out of which the circuit has an edge.
  Of a ranking the circuit is its first edges by |score|, as many as the reference has.
* `overlap`: precision, recall and Jaccard index of the edges.
* `auroc`: the area under the ROC curve of |score| as a sign of the reference's edges (of a set, of being in it), and of
  the largest |score| out of a component as a sign of its being in the reference; ½ by chance. Where a program was
  compiled into the model, that is the score of a method against the truth.
* `within`: of a published circuit all edges between its components, or those between connected groups alone; the record
  names where the lists were read.
* Control (`found_null`, `overlap_null`, `auroc_null`): the same of circuits of as many edges between each two sites of
  each two layers, with scores exchanged among such edges. No interval: no prompts are run; compare circuits that were
  found on resampled prompts for one.
* Known failures: published lists are of one model, one task and one way of cutting; what they leave out may be used.
  Positions are named in the record and not compared.
* Equivalences (tests): a circuit finds all of itself; scikit-learn's AUROC.
* Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.circuits.circuit import Circuit, exchanged, first, matched
from cutaway.circuits.components import components
from cutaway.circuits.opening import open_circuit
from cutaway.circuits.published import Published, names, published
from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.models.edits.wiring import Wiring, wiring
from cutaway.models.model import Model

_NO_PROMPTS = "no prompts are run"


@dataclass(frozen=True, kw_only=True)
class CircuitOverlap(Result, kind="circuit_overlap"):
    """Shares of a reference that a circuit finds.

    Attributes:
        found: of each group of the reference, the share of its components in the circuit; `all` of all.
        found_null: those of random circuits of equal size.
        overlap: precision, recall and Jaccard index of the edges.
        overlap_null: those of random circuits.
        auroc: how well scores tell the reference's edges and components from others.
        auroc_null: that of scores exchanged among alike edges.
        missing: components of the reference that the circuit does not have.
    """

    page: ClassVar[tuple[str, ...]] = ("overlap", "auroc")
    found: Float[Tensor, "group"]
    found_null: Float[Tensor, "group sample"]
    overlap: Float[Tensor, "measure"]
    overlap_null: Float[Tensor, "measure sample"]
    auroc: Float[Tensor, "level"]
    auroc_null: Float[Tensor, "level sample"]
    missing: tuple[str, ...]


@method(
    answers="How much of a known circuit does another one find: published, of another tool, of a compiled program?",
    paper="Conmy et al. 2023, arXiv:2304.14997",
    cost="0",
    control="random_circuits",
    rung="observational",
)
def compare(
    model: Model,
    circuit: Circuit,
    /,
    *,
    reference: str = "ioi",
    within: Literal["components", "connections"] = "components",
    samples: int = 20,
    seed: int = 0,
) -> CircuitOverlap:
    """Compare a circuit with a reference on the same model.

    Args:
        reference: a published circuit, a file, or components or edges with commas between them.
        within: of a published circuit all edges between its components, or those of connected groups.
        samples: how many random circuits stand beside it.
        seed: of the random circuits.

    Raises:
        Refused: a reference that the model cannot have, or an edge or component that it does not have.
    """
    w = wiring(model)
    known = published(reference) if reference in names() else None
    truth = _mask(w, _reference(w, known, reference, within))
    scores = circuit.scores(w)
    own = first(w, scores, int(truth.sum())) if circuit.ranked() else _mask(w, circuit)
    chance = [matched(w, own, seed + s) for s in range(samples)]
    groups = _groups(w, known, truth)
    found = torch.stack([_found(w, groups, m) for m in (own, *chance)], -1)
    overlap = torch.stack([_overlap(m, truth) for m in (own, *chance)], -1)
    size = scores.abs().nan_to_num(0.0)
    others = [size[exchanged(w, seed + s)] for s in range(samples)]
    auroc = torch.stack([_auroc(w, s, truth, groups["all"]) for s in (size, *others)], -1)
    missing = sorted(groups["all"] - _members(w, own), key=components(w).index)
    return CircuitOverlap(
        found=found[:, 0],
        found_null=found[:, 1:],
        overlap=overlap[:, 0],
        overlap_null=overlap[:, 1:],
        auroc=auroc[:, 0],
        auroc_null=auroc[:, 1:],
        missing=tuple(missing),
        labels={"group": list(groups), "measure": ["precision", "recall", "Jaccard"], "level": ["edges", "components"]},
        units={"found": "share", "found_null": "share", "overlap": "share", "overlap_null": "share"}
        | {"auroc": "AUROC", "auroc_null": "AUROC"},
        reasons=dict.fromkeys(("found", "overlap", "auroc"), _NO_PROMPTS),
        record=_said(known) | {"edges": {"of the circuit": int(own.sum()), "of the reference": int(truth.sum())}},
    )


def _reference(w: Wiring, known: Published | None, text: str, within: str) -> Circuit:
    if known is None:
        return open_circuit(text)
    try:
        found = known.components() if within == "components" else known.connected(w)
        found.scores(w)
    except Refused as error:
        why = f"it was found in {known.model}, and this model lacks some of its components ({error.what})"
        raise Refused(f"reference {text!r}", why, ("give another ", Keyword("reference"))) from error
    return found


def _said(known: Published | None) -> dict[str, Any]:
    if known is None:
        return {}
    return {
        "published": {
            "paper": known.paper,
            "model": known.model,
            "lists from": known.read,
            "positions": known.positions,
        }
    }


def _mask(w: Wiring, circuit: Circuit) -> Bool[Tensor, "writer reader"]:
    out = torch.zeros_like(w.heard)
    at = w.pairs[circuit.scores(w).isfinite()]
    out[at[:, 0], at[:, 1]] = True
    return out


def _members(w: Wiring, mask: Bool[Tensor, "writer reader"]) -> set[str]:
    """Return the heads and MLPs that a circuit hears."""
    return {c for c, on in list(zip(components(w), mask.any(1).tolist(), strict=True))[1:] if on}


def _groups(w: Wiring, known: Published | None, truth: Bool[Tensor, "writer reader"]) -> dict[str, set[str]]:
    if known is None:
        return {"all": _members(w, truth)}
    return {**{g: set(nodes) for g, nodes in known.groups.items()}, "all": set(known.nodes)}


def _found(w: Wiring, groups: dict[str, set[str]], mask: Bool[Tensor, "writer reader"]) -> Float[Tensor, "group"]:
    have = _members(w, mask)
    return torch.tensor([len(g & have) / max(1, len(g)) for g in groups.values()])


def _overlap(mask: Bool[Tensor, "writer reader"], truth: Bool[Tensor, "writer reader"]) -> Float[Tensor, "measure"]:
    both, either = (mask & truth).sum(), (mask | truth).sum()
    return torch.stack([both / mask.sum().clamp_min(1), both / truth.sum().clamp_min(1), both / either.clamp_min(1)])


def _auroc(
    w: Wiring, size: Float[Tensor, "edge"], truth: Bool[Tensor, "writer reader"], members: set[str]
) -> Float[Tensor, "level"]:
    """Return the areas of edges, and of components by the largest edge out of them."""
    u, v = w.pairs.T
    largest = torch.zeros(len(w.writers)).scatter_reduce_(0, u, size, "amax")
    inside = torch.tensor([c in members for c in components(w)])
    return torch.stack([area(size, truth[u, v]), area(largest[1:], inside[1:])])


def area(size: Float[Tensor, "item"], truth: Bool[Tensor, "item"]) -> Float[Tensor, ""]:
    """Return the area under the ROC curve, ties by half; NaN where all items are alike in truth."""
    from scipy import stats

    positive, n = int(truth.sum()), len(truth)
    if not 0 < positive < n:
        return torch.tensor(torch.nan)
    ranks = torch.from_numpy(stats.rankdata(size.numpy())).double()
    above = ranks[truth].sum() - positive * (positive + 1) / 2
    return (above / (positive * (n - positive))).float()
