"""What do numbers that know nothing of the model score?

The floor that every other method of this room must clear (Mueller et al. 2025, arXiv:2504.13151, "Random"):
independent normal numbers, one an edge. Whatever is asked of scores can be asked of these: faithfulness, inclusion,
agreement with a known truth.

* `score`: a number drawn from N(0, 1), the same for all prompts. Control (`null`): more such numbers. No interval:
  nothing depends on a prompt.
* Known failures: none; it is one.
* Equivalences (tests): another seed gives other numbers; no forward is run.
* Cost: none.
"""

from __future__ import annotations

import torch

from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.scoring import named
from cutaway.core.method import method
from cutaway.core.stats import generator
from cutaway.models.edits.wiring import wiring
from cutaway.models.model import Model


@method(
    answers="What do numbers that know nothing of the model score?",
    paper="Mueller et al. 2025, arXiv:2504.13151",
    cost="0",
    control="random_scores",
    rung="observational",
    fills=(),
)
def random(model: Model, /, *, samples: int = 4, seed: int = 0) -> EdgeScores:
    """Draw a score for every edge.

    Args:
        samples: how many more numbers make the null of each edge.
        seed: of the numbers.

    Raises:
        Refused: a model without such a wiring.
    """
    w = wiring(model)
    drawn = torch.randn(len(w.pairs), 1 + samples, generator=generator(seed))
    return EdgeScores(
        score=drawn[:, 0],
        interval=torch.full((len(drawn), 2), torch.nan),
        null=drawn[:, 1:],
        units={"score": "standard deviations", "null": "standard deviations"},
        reasons={"score": "no interval: the same numbers for all prompts"},
        record={"score is": "a random number"},
        **named(w, torch.arange(len(drawn))),
    )
