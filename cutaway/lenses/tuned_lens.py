"""Where along depth does the answer appear, each layer read in a basis that was fitted to it?

The tuned lens (Belrose et al. 2023, arXiv:2303.08112): the residual stream after the embedding and after each block is
put through that depth's affine translator (`ca.lenses.train_tuned_lens`), the final norm and the unembedding.

* Fields as of the logit lens. Beside them, the logit lens on the same prompts (`logit_probability`,
  `logit_divergence`), and the intervals of both divergences, KL(model ‖ lens) in nats: 95 %, over prompts.
* `each_position`: divergences are means over the positions of a prompt but the first and special tokens, to judge a
  lens on held-out text; they are else those of the last position.
* Control: the logit lens, and the translated stream in a randomly rotated basis (`null`).
* Assumption: a translator sees the stream alone, and was trained to say what the model says in the end; what it reads
  may be correlated with the answer without being used by the model. The last depth has no translator.
* Cost: one forward, or two with `each_position`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.stats import mean_interval
from cutaway.lenses.decode import check_last, divergence, question, read_out, streams
from cutaway.lenses.lens import Lens
from cutaway.lenses.logit_lens import LensCurve, curve_fields, followed
from cutaway.lenses.tuned import TunedLens
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class TunedCurve(LensCurve, kind="tuned_curve"):
    """The answer along depth as a tuned lens reads it, with the logit lens beside it."""

    divergence_interval: Float[Tensor, "layer bound"]
    logit_probability: Float[Tensor, "layer"]
    logit_divergence: Float[Tensor, "layer"]
    logit_divergence_interval: Float[Tensor, "layer bound"]


@method(
    answers="Where along depth does the answer appear, each layer read in a basis that was fitted to it?",
    paper="Belrose et al. 2023, arXiv:2303.08112",
    cost="2 * prompts * F",
    control="logit_lens",
    rung="observational",
)
def tuned_lens(
    model: Model,
    task: Task | Prompts,
    lens: TunedLens,
    /,
    *,
    answer: str | None = None,
    each_position: bool = False,
    samples: int = 8,
    seed: int = 0,
) -> TunedCurve:
    """Read the answer's probability and rank off the translated residual stream at every depth.

    Args:
        answer: of prompts without a task, the answer to follow [default: what the model itself says next].
        each_position: take divergences over all positions of each prompt, not at its last.
        samples: how many random rotations make the null.
        seed: of the rotations.

    Raises:
        Refused: the lens is of another model, or the model's residual stream shares no basis with an unembedding.
    """
    return TunedCurve(**fitted_fields(model, task, lens, answer, each_position, samples, seed))


def fitted_fields(
    model: Model,
    task: Task | Prompts,
    lens: Lens,
    answer: str | None,
    each_position: bool,
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """Return the fields of a `TunedCurve` by name, from what any fitted lens reads."""
    asked = question(model, task, answer)
    lens.check(model)
    x, own = streams(model, asked.prompts)
    plain, y = read_out(model, x), lens.translate(x)
    check_last(model, plain[-1], own)
    logits = read_out(model, y)
    fitted, logit = divergence(own, logits), divergence(own, plain)
    if each_position:
        fitted, logit = _over_positions(model, asked.prompts, lens)
    fields = curve_fields(model, asked, y, logits, fitted, samples, seed)
    fields["units"] |= {"logit_probability": "probability", "logit_divergence": "nats"}
    fields["record"] |= {"positions of divergences": _POSITIONS if each_position else "the last"}
    interval, logit_interval = (mean_interval(kl.T, within=(0.0, float("inf"))) for kl in (fitted, logit))
    return fields | {
        "divergence_interval": interval,
        "logit_probability": followed(plain.softmax(-1), asked.answers).mean(1).cpu(),
        "logit_divergence": logit.mean(1).cpu(),
        "logit_divergence_interval": logit_interval,
    }


_POSITIONS = "all but the first and special tokens"


def _over_positions(model: Model, prompts: Tokens, lens: Lens) -> list[Float[Tensor, "layer prompt"]]:
    """Return each prompt's mean divergence over its positions, with the lens and without it."""
    special = torch.tensor(getattr(model.tokenizer, "all_special_ids", None) or [-1], device=prompts.ids.device)
    fitted, logit = list[Tensor](), list[Tensor]()
    for i in range(len(prompts)):
        row = prompts.row(i)
        x, own = streams(model, row, everywhere=True)
        x, own = x[:, 0], own[0]
        kept = ~torch.isin(row.ids[0], special)
        kept[0] = False  # often a sink, whose stream is like no other
        kept = (kept if bool(kept.any()) else ~kept).to(x.device)
        x, own = x[:, kept], own[kept]
        for found, lensed in ((fitted, lens.at), (logit, lambda depth, stream: stream)):
            each = [divergence(own, read_out(model, lensed(d, x[d]))).mean() for d in range(len(x))]
            found.append(torch.stack(each))
    return [torch.stack(found, dim=1) for found in (fitted, logit)]
