"""What would the model say at every depth and position of one prompt?

The logit lens (nostalgebraist 2020) as a grid: for the first prompt of a task, or of prompts alone, the top token of
the lens after the embedding and after each block at every position, its probability, and the probability and rank of
the answer there. Of prompts alone the answer is `answer`, or what the model itself says next.

* Control: the top token's probability in a randomly rotated basis (`null`, pooled over one rotation per sample).
* It describes one prompt: there is no interval, as `reasons` says. `logit_lens` gives the curve with intervals.
* Cost: one forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.result import Result
from cutaway.lenses.decode import along_depth, depth_labels, question, rank_of, turned
from cutaway.models.model import Model
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class LensGrid(Result, kind="lens_grid"):
    """The lens at every depth and position of one prompt; `labels["token"]` are the top tokens as words."""

    probability: Float[Tensor, "layer position"]
    null: Float[Tensor, "layer position sample"]
    token: Int[Tensor, "layer position"]
    answer_probability: Float[Tensor, "layer position"]
    answer_rank: Int[Tensor, "layer position"]
    divergence: Float[Tensor, "layer position"]


@method(
    answers="What would the model say at every depth and position of one prompt?",
    paper="nostalgebraist 2020, Interpreting GPT: the logit lens",
    cost="F",
    control="rotated_basis",
    rung="observational",
)
def lens_grid(
    model: Model, task: Task | Prompts, /, *, answer: str | None = None, samples: int = 4, seed: int = 0
) -> LensGrid:
    """Read the top token and the answer off the residual stream at every depth and position of the first prompt.

    Args:
        answer: of prompts without a task, the answer to follow [default: what the model itself says next].
        samples: how many random rotations make the null.
        seed: of the rotations.

    Raises:
        Refused: the model's residual stream shares no basis with an unembedding.
    """
    asked = question(model, task.take(1), answer)
    tokens = asked.prompts.row(0)
    x, logits, apart = (t[:, 0] for t in along_depth(model, tokens, everywhere=True))
    whole = logits.logsumexp(-1)
    most, top = logits.max(-1)
    followed = (top[-1, -1] if asked.answers is None else asked.answers[0]).expand(top.shape)
    null = [(t.amax(-1) - t.logsumexp(-1)).exp() for t in turned(model, x, samples, seed)]
    words = [model.text.token_texts(row) for row in top]
    return LensGrid(
        probability=(most - whole).exp().cpu(),
        null=torch.stack(null, dim=-1).cpu(),
        token=top.cpu(),
        answer_probability=(logits.gather(-1, followed.unsqueeze(-1))[..., 0] - whole).exp().cpu(),
        answer_rank=rank_of(logits, followed).cpu(),
        divergence=apart.cpu(),
        labels={"layer": depth_labels(model), "position": tokens.labels(), "token": words, "probability": words},
        units={"probability": "probability", "answer_probability": "probability", "divergence": "nats"},
        reasons={"probability": "one prompt; logit_lens has intervals over prompts"},
        record={"prompt": tokens.texts[0] or " ".join(tokens.pieces[0]), **asked.record},
    )
