"""Where along depth does the answer appear?

The logit lens (nostalgebraist 2020): the residual stream of the last position, after the embedding and after each
block, is put through the final norm and the unembedding as if the model ended there.

* `probability[layer]`: mean over prompts of the answer's probability; `rank`: median rank (0 is the top);
  `divergence`: mean KL(model ‖ lens) in nats; `interval`: 95 %, over prompts of the probability.
* Control: the same stream in a randomly rotated basis (`null`), where the unembedding should find nothing.
* Assumption: early layers write in the basis the unembedding reads. Where they do not, the lens underestimates what is
  known (Belrose et al. 2023, arXiv:2303.08112); a low value early is no proof of absence.
* Cost: one forward. At the last layer the lens equals the model's own output (a test holds it to that).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, mean_interval, one_prompt
from cutaway.lenses.readout import along_depth, depth_labels, rank_of, turned
from cutaway.models.model import Model
from cutaway.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class LensCurve(Result, kind="lens_curve"):
    """The answer along depth, at the last position of each prompt."""

    probability: Float[Tensor, "layer"]
    interval: Float[Tensor, "layer bound"]
    null: Float[Tensor, "layer sample"]
    rank: Float[Tensor, "layer"]
    foil_probability: Float[Tensor, "layer"]
    divergence: Float[Tensor, "layer"]


@method(
    answers="Where along depth does the answer appear?",
    paper="nostalgebraist 2020, Interpreting GPT: the logit lens",
    cost="prompts * F",
    control="rotated_basis",
    rung="observational",
)
def logit_lens(model: Model, task: Task, /, *, samples: int = 8, seed: int = 0) -> LensCurve:
    """Read the answer's probability and rank off the residual stream at every depth.

    Args:
        samples: how many random rotations make the null.
        seed: of the rotations.

    Raises:
        Refused: the model's residual stream shares no basis with an unembedding.
    """
    bound = task.bind(model, "logit_diff")
    x, logits, apart = along_depth(model, bound.clean)
    answers, foils = (ids.expand(len(x), -1) for ids in (bound.answers, bound.foils))
    p = logits.softmax(-1)
    each = p.gather(-1, answers.unsqueeze(-1))[..., 0]
    null = [t.softmax(-1).gather(-1, answers.unsqueeze(-1))[..., 0].mean(1) for t in turned(model, x, samples, seed)]
    return LensCurve(
        probability=each.mean(1).cpu(),
        interval=mean_interval(each.T, within=(0.0, 1.0)),
        null=torch.stack(null, dim=1).cpu(),
        rank=rank_of(logits, answers).float().median(1).values.cpu(),
        foil_probability=p.gather(-1, foils.unsqueeze(-1))[..., 0].mean(1).cpu(),
        divergence=apart.mean(1).cpu(),
        labels={"layer": depth_labels(model), "bound": BOUNDS},
        units={"probability": "probability", "rank": "tokens more likely", "divergence": "nats"},
        record={"final norm": "applied at each depth with the scale of that depth", "position": -1},
        reasons=one_prompt(len(bound), "probability"),
    )
