"""Where along depth does the answer appear?

The logit lens (nostalgebraist 2020): the residual stream of the last position, after the embedding and after each
block, is put through the final norm and the unembedding as if the model ended there.

* `probability[layer]`: mean over prompts of the answer's probability; `rank`: median rank (0 is the top);
  `divergence`: mean KL(model ‖ lens) in nats; `interval`: 95 %, over prompts of the probability.
* Prompts alone have no foil: `answer` names the token to follow, or it is what the model itself says next.
* Control: the same stream in a randomly rotated basis (`null`), where the unembedding should find nothing. Where the
  answer is the model's own next token, so it is here: the token that the rotated lens itself ends with.
* Assumption: early layers write in the basis the unembedding reads. Where they do not, the lens underestimates what is
  known (Belrose et al. 2023, arXiv:2303.08112); a low value early is no proof of absence.
* Cost: one forward. At the last layer the lens equals the model's own output (a test holds it to that).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, mean_interval, one_prompt
from cutaway.lenses.decode import Question, along_depth, depth_labels, question, rank_of, turned
from cutaway.models.model import Model
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class LensCurve(Result, kind="lens_curve"):
    """The answer along depth, at the last position of each prompt."""

    probability: Float[Tensor, "layer"]
    interval: Float[Tensor, "layer bound"]
    null: Float[Tensor, "layer sample"]
    rank: Float[Tensor, "layer"]
    divergence: Float[Tensor, "layer"]
    foil_probability: Float[Tensor, "layer"] | None = None


@method(
    answers="Where along depth does the answer appear?",
    paper="nostalgebraist 2020, Interpreting GPT: the logit lens",
    cost="prompts * F",
    control="rotated_basis",
    rung="observational",
)
def logit_lens(
    model: Model, task: Task | Prompts, /, *, answer: str | None = None, samples: int = 8, seed: int = 0
) -> LensCurve:
    """Read the answer's probability and rank off the residual stream at every depth.

    Args:
        answer: of prompts without a task, the answer to follow [default: what the model itself says next].
        samples: how many random rotations make the null.
        seed: of the rotations.

    Raises:
        Refused: the model's residual stream shares no basis with an unembedding.
    """
    asked = question(model, task, answer)
    x, logits, apart = along_depth(model, asked.prompts)
    return LensCurve(**curve_fields(model, asked, x, logits, apart, samples, seed))


def curve_fields(
    model: Model,
    asked: Question,
    x: Float[Tensor, "layer prompt d_model"],
    logits: Float[Tensor, "layer prompt token"],
    apart: Float[Tensor, "layer prompt"],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """Return the fields of a `LensCurve` by name, from what a lens reads off (translated) streams `x`."""
    p = logits.softmax(-1)
    each = followed(p, asked.answers)
    null = [followed(t.softmax(-1), asked.answers).mean(1) for t in turned(model, x, samples, seed)]
    answers = asked.known(model, logits[-1])
    return {
        "probability": each.mean(1).cpu(),
        "interval": mean_interval(each.T, within=(0.0, 1.0)),
        "null": torch.stack(null, dim=1).cpu(),
        "rank": rank_of(logits, answers.expand(len(x), -1)).float().median(1).values.cpu(),
        "divergence": apart.mean(1).cpu(),
        "foil_probability": None if asked.foils is None else followed(p, asked.foils).mean(1).cpu(),
        "labels": {"layer": depth_labels(model), "bound": BOUNDS},
        "units": {"probability": "probability", "rank": "tokens more likely", "divergence": "nats"},
        "record": {"final norm": "applied at each depth with the scale of that depth", "position": -1, **asked.record},
        "reasons": one_prompt(len(asked.prompts), "probability"),
    }


def followed(
    p: Float[Tensor, "layer prompt token"], ids: Int[Tensor, "prompt"] | None
) -> Float[Tensor, "layer prompt"]:
    """Return the probability of one token per prompt at every depth; by default of the top token of the last depth."""
    ids = p[-1].argmax(-1) if ids is None else ids
    return p.gather(-1, ids.expand(len(p), -1).unsqueeze(-1))[..., 0]
