"""Does a monitor, calibrated on known behaviours, find behaviours and wordings that it has not seen?

The monitor is the component along a direction, such as that of a persona or a latent's decoder (persona vectors, Chen
et al. 2025, arXiv:2507.21509). A threshold is calibrated on the groups of texts that the direction was found on; the
other groups, of behaviours or paraphrases of their own, are the test.

* `auroc[address]`: of texts of unseen groups; `interval`: 95 %, over groups.
* `threshold[address]`: calibrated so that at most a share `rate` of the seen texts without the concept lies above it.
* `recall[address]` and `false_positive[address]`: shares of unseen texts with and without the concept above it, with
  95 % intervals over groups.
* `detected[address, group]`: `recall` of each unseen group, with Wilson's interval: which behaviours and paraphrases it
  misses.
* Control: random directions, each with its own threshold (`null`, `recall_null` …). Shuffled labels are the control of
  `directions.find`.
* Known failures: what is monitored must be read where the model knows it: on the response of a model that was taught to
  comply it may hardly be read, although it is plain in front of it. A text may be made to pass:
  `directions.suffix` attacks the monitor. Where the direction does not say its groups, half of them calibrate it, and
  shares are too good if it was found on the others.
* Equivalence (test): the AUROC counts pairs of texts.
* Cost: one forward per text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.method import method
from cutaway.core.refuse import Call, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, share_interval
from cutaway.directions.behaviour import unseen
from cutaway.directions.direction import Direction
from cutaway.directions.threshold import chosen
from cutaway.interventions.probes import accuracy_interval, auroc, auroc_interval
from cutaway.interventions.text_vectors import text_vectors
from cutaway.models.model import Model
from cutaway.tasks.labelled import Labelled


@dataclass(frozen=True, kw_only=True)
class Monitor(Result, kind="monitor"):
    """A direction as a monitor: what it finds in groups of texts that it has not seen, and its false alarms.

    Attributes:
        auroc: of texts of unseen groups.
        interval: of `auroc`, 95 %, over groups.
        null: `auroc` of random directions.
        recall: share of unseen texts with the concept above the threshold.
        recall_interval: 95 %, over groups.
        recall_null: the same of random directions.
        false_positive: share of unseen texts without the concept above it.
        false_positive_interval: 95 %, over groups.
        false_positive_null: the same of random directions.
        detected: `recall` of each unseen group.
        detected_interval: 95 %, Wilson's.
        threshold: calibrated on the seen groups.
        concept: the concept.
        reading: the reading of each text.
    """

    page = ("recall", "false_positive", "detected")
    auroc: Float[Tensor, "address"]
    interval: Float[Tensor, "address bound"]
    null: Float[Tensor, "address sample"]
    recall: Float[Tensor, "address"]
    recall_interval: Float[Tensor, "address bound"]
    recall_null: Float[Tensor, "address sample"]
    false_positive: Float[Tensor, "address"]
    false_positive_interval: Float[Tensor, "address bound"]
    false_positive_null: Float[Tensor, "address sample"]
    detected: Float[Tensor, "address group"]
    detected_interval: Float[Tensor, "address group bound"]
    threshold: Float[Tensor, "address"]
    concept: str
    reading: str


@method(
    answers="Does a monitor, calibrated on known behaviours, find behaviours and wordings that it has not seen?",
    paper="Chen et al. 2025, arXiv:2507.21509",
    cost="texts * F",
    control="random_directions",
    rung="observational",
)
def monitor(
    model: Model,
    labelled: Labelled,
    direction: Direction,
    /,
    *,
    reading: str = "last",
    rate: float = 0.05,
    concept: str | None = None,
    samples: int = 19,
    seed: int = 0,
) -> Monitor:
    """Calibrate a direction as a monitor on the groups that it was found on, and test it on the others.

    Args:
        reading: mean or last; of prompts with responses response_mean, prompt_mean and prompt_last, too.
        rate: the largest share of seen texts without the concept above the threshold.
        concept: the concept; None means the first.
        samples: number of random directions.
        seed: of the random directions, and of the halves where the direction does not say its groups.

    Raises:
        Refused: one class only, seen or unseen, no text of a group that the direction was not found on, empty texts, a
            direction of another width, an unknown reading, or a rate outside of 0 to 1.
    """
    if not 0 <= rate < 1:
        raise Refused(Call("directions.monitor", {"rate": rate}), "it is no share", "give one from 0 to below 1")
    direction.check(model)
    c = labelled.concept(concept)
    y, group = labelled.shown[:, c].cpu(), labelled.group_of
    test = unseen(labelled, y, direction, seed)
    x = text_vectors(model, labelled.texts, direction.places, [reading], prompts=labelled.prompts).vectors[0]
    drawn = torch.randn(samples, *direction.vector.shape, generator=generator(seed))
    units = normalize(torch.cat([direction.vector[None], drawn]), dim=-1)
    along = torch.einsum("saw,atw->ast", units, x)  # [address, direction, text]: the direction itself first
    seen, new, label, own = along[..., ~test], along[..., test], y[test], group[test]
    limit = chosen(seen[..., ~y[~test]], seen, rate)
    above = (new >= limit[..., None]).float()
    names = {int(g): n for g, n in zip(group, labelled.names, strict=True)}
    groups = [g for g in own.unique().tolist() if bool(label[own == g].any())]
    each = [above[:, 0, label & (own == g)] for g in groups]
    fields = {}
    for name, rows in (("recall", label), ("false_positive", ~label)):
        hits = above[..., rows]
        fields |= {name: hits[:, 0].mean(-1), f"{name}_null": hits[:, 1:].mean(-1)}
        fields[f"{name}_interval"] = accuracy_interval(hits[:, 0], torch.ones(hits.shape[-1]).bool(), own[rows])
    return Monitor(
        auroc=auroc(new[:, 0], label),
        interval=auroc_interval(new[:, 0], label, own),
        null=auroc(new[:, 1:], label),
        **fields,
        detected=torch.stack([hits.mean(-1) for hits in each], -1),
        detected_interval=torch.stack([share_interval(hits.T) for hits in each], 1),
        threshold=limit[:, 0],
        concept=labelled.concepts[c],
        reading=reading,
        labels={
            "address": [str(a) for a in direction.places],
            "group": [names[g] for g in groups],
            "bound": BOUNDS,
        },
        units={"auroc": "AUROC", "threshold": "activation"}
        | dict.fromkeys(("recall", "false_positive", "detected"), "probability"),
        reasons={"threshold": "calibrated on the seen groups", "detected": "see `recall`"},
        record={"texts": {"calibration": len(y) - int(test.sum()), "test": int(test.sum()), "groups": len(groups)}},
    )
