"""Above which component along a direction does a text show a concept, at how many false alarms?

Texts are projected on the unit vector at each address of a direction. A threshold is chosen on some groups of texts, so
that at most a share `rate` of their texts without the concept lies above it, and tested on the other groups. It is what
a conditional edit needs (CAST, Lee et al. 2024, arXiv:2409.05907): `found.condition(address)`, on the command line
`--direction-condition FILE`.

* `recall[address]`: the share of texts of other groups with the concept above the threshold; `interval`: 95 %, over
  groups.
* `false_positive[address]`: the same of texts without the concept, which may be more than `rate`.
* `threshold[address]`: chosen on all texts, in the activation's units.
* Control: random directions, each with its own thresholds (`null`, `false_positive_null`).
* Assumption: the direction was not found on these texts; else both shares are too good.
* Known failures: with few texts without the concept a small rate cannot be told from none: of n texts on which a
  threshold is chosen, rates below 1 / n mean no false alarm among them.
* Equivalence (test): a prompt satisfies the condition if and only if its component is at the threshold or above.
* Cost: one forward per text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.method import method
from cutaway.core.refuse import Call, Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator
from cutaway.directions.direction import Direction
from cutaway.interventions.probes import Fold, accuracy_interval, folds
from cutaway.interventions.text_vectors import text_vectors
from cutaway.models.edits.conditional import Condition
from cutaway.models.model import Model
from cutaway.tasks.labelled import Labelled

_POSITIONS = {"mean": None, "last": (-1,)}
_UNITS = {"recall": "probability", "false_positive": "probability", "threshold": "activation", "vector": "activation"}
_UNITS = {"recall": "probability", "false_positive": "probability", "threshold": "activation", "vector": "activation"}


@dataclass(frozen=True, kw_only=True)
class Threshold(Result, kind="threshold"):
    """Thresholds of a direction at its addresses, with what they find and their false alarms on other groups.

    Attributes:
        recall: share of texts with the concept that lie above the threshold.
        interval: 95 %, over groups.
        null: the same of random directions.
        false_positive: share of texts without the concept that lie above it.
        false_positive_interval: 95 %, over groups.
        false_positive_null: the same of random directions.
        threshold: chosen on all texts.
        vector: the direction's vector.
        concept: the concept.
        reading: the reading of each text.
    """

    page = ("false_positive",)
    recall: Float[Tensor, "address"]
    interval: Float[Tensor, "address bound"]
    null: Float[Tensor, "address sample"]
    false_positive: Float[Tensor, "address"]
    false_positive_interval: Float[Tensor, "address bound"]
    false_positive_null: Float[Tensor, "address sample"]
    threshold: Float[Tensor, "address"]
    vector: Float[Tensor, "address width"]
    concept: str
    reading: str

    def condition(self, address: str | None = None) -> Condition:
        """Return the condition that a prompt lies above the threshold at one address, by default the only one.

        Raises:
            Refused: no such address, or several.
        """
        at = self if address is None else self.select(address=address)
        if len(at.threshold) != 1:
            why = f"there are thresholds at {len(at.threshold)} addresses, and one is meant"
            raise Refused("a condition", why, ("find it with ", Keyword("direction_addresses", "resid_post.3")))
        (place,) = at.labels["address"]
        return Condition(place, at.vector[0], min=float(at.threshold[0]), positions=_POSITIONS[self.reading])


@method(
    answers="Above which component along a direction does a text show a concept, at how many false alarms?",
    paper="Lee et al. 2024, arXiv:2409.05907",
    cost="texts * F",
    control="random_directions",
    rung="observational",
)
def threshold(
    model: Model,
    labelled: Labelled,
    direction: Direction,
    /,
    *,
    reading: Literal["mean", "last"] = "mean",
    rate: float = 0.05,
    concept: str | None = None,
    samples: int = 19,
    seed: int = 0,
) -> Threshold:
    """Choose a threshold of a direction on some groups of texts, and test it on the others.

    Args:
        reading: the mean over a text's tokens but the first, or its last token.
        rate: the largest share of texts without the concept above the threshold, where it is chosen.
        concept: the concept; None means the first.
        samples: number of random directions.
        seed: of the folds and the random directions.

    Raises:
        Refused: one class or one group only, empty texts, a direction of another width, or a rate outside of 0 to 1.
    """
    if not 0 <= rate < 1:
        raise Refused(Call("directions.threshold", {"rate": rate}), "it is no share", "give one from 0 to below 1")
    direction.check(model)
    c = labelled.concept(concept)
    y, group = labelled.shown[:, c].cpu(), labelled.group_of
    parts = folds(y, group, seed=seed)
    x = text_vectors(model, labelled.texts, direction.places, [reading]).vectors[0]
    drawn = torch.randn(samples, *direction.vector.shape, generator=generator(seed))
    units = normalize(torch.cat([direction.vector[None], drawn]), dim=-1)
    along = torch.einsum("saw,atw->ast", units, x)  # [address, direction, text]: the direction itself first
    above = _above(along, y, parts, rate)
    found, alarms = above[..., y], above[..., ~y]
    return Threshold(
        recall=found[:, 0].float().mean(-1),
        interval=_interval(found[:, 0], group[y]),
        null=found[:, 1:].float().mean(-1),
        false_positive=alarms[:, 0].float().mean(-1),
        false_positive_interval=_interval(alarms[:, 0], group[~y]),
        false_positive_null=alarms[:, 1:].float().mean(-1),
        threshold=chosen(along[:, 0, ~y], along[:, 0], rate),
        vector=direction.vector,
        concept=labelled.concepts[c],
        reading=reading,
        labels={"address": [str(a) for a in direction.places], "bound": BOUNDS},
        units=dict(_UNITS),
        reasons={"threshold": "chosen on all texts", "vector": "a direction is no measurement"},
        record={
            "texts": {"with": int(y.sum()), "without": int((~y).sum()), "groups": len(group.unique())},
            "folds": len(parts),
        },
    )


def chosen(
    without: Float[Tensor, "*cell few"], every: Float[Tensor, "*cell text"], rate: float
) -> Float[Tensor, "*cell"]:
    """Return the least threshold above which lies at most a share of `without`, half way to the next of all texts."""
    bound = without.sort(-1, descending=True).values[..., int(rate * without.shape[-1])]
    higher = torch.where(every > bound[..., None], every, torch.inf).amin(-1)
    after = torch.nextafter(bound, torch.full_like(bound, torch.inf))
    return torch.where(higher.isinf(), after, torch.maximum((bound + higher) / 2, after))


def _above(
    along: Float[Tensor, "address direction text"], y: Bool[Tensor, "text"], parts: Sequence[Fold], rate: float
) -> Bool[Tensor, "address direction text"]:
    """Return the texts at or above the threshold that was chosen on the other folds."""
    out = torch.zeros_like(along, dtype=torch.bool)
    for fit, test in parts:
        seen = along[..., fit]
        out[..., test] = along[..., test] >= chosen(seen[..., ~y[fit]], seen, rate)[..., None]
    return out


def _interval(above: Bool[Tensor, "address text"], group: Int[Tensor, "text"]) -> Float[Tensor, "address bound"]:
    return accuracy_interval(above.float(), torch.ones(above.shape[-1], dtype=torch.bool), group)
