"""Reading the residual stream out of turn: final norm, unembedding and soft cap applied at any depth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.refuse import Code, Keyword, Refused
from cutaway.core.stats import generator, rotation
from cutaway.models.access.capture import Collector
from cutaway.models.access.forward import all_logits, last_logits
from cutaway.models.access.taps import attached
from cutaway.models.anatomy.rope import apart, in_order
from cutaway.models.anatomy.unembedding import readable
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens, uncontinued
from cutaway.tasks.answers import check_predicts, single_tokens
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.spelling import spelled
from cutaway.tasks.task import Task


@dataclass(frozen=True)
class Question:
    """The prompts that a lens reads, and the tokens it looks for.

    Attributes:
        prompts: the prompts as tokens.
        answers: the answer of each prompt [prompt]; None stands for the model's own next tokens.
        foils: the foil of each prompt [prompt]; None if prompts alone were given.
        record: where the answers come from.
    """

    prompts: Tokens
    answers: Int[Tensor, "prompt"] | None
    foils: Int[Tensor, "prompt"] | None
    record: dict[str, Any]

    def known(self, model: Model, logits: Float[Tensor, "prompt token"] | None = None) -> Int[Tensor, "prompt"]:
        """Return the answers; if there are none, the likeliest tokens of these logits or of a run of the prompts."""
        if self.answers is not None:
            return self.answers
        return (model.run_last(self.prompts) if logits is None else logits).argmax(-1)


def question(model: Model, about: Task | Prompts, answer: str | None = None) -> Question:
    """Return what a lens reads: a task's clean prompts with answer and foil, or prompts with the model's own next
    tokens or `answer` as their answers.

    Raises:
        Refused: a model that predicts no next token, an answer of several tokens, or one beside those of a task.
    """
    if isinstance(about, Task):
        if answer is not None:
            why = "the task has answers of its own"
            raise Refused((Keyword("answer", answer), " with a task"), why, "give its prompts alone")
        bound = about.bind(model, "logit_diff")
        if not bound.clean.tails:
            return Question(bound.clean, bound.answers, bound.foils, {})
        said = "the first token of each answer, which has several; a lens reads one next token"
        if bool((bound.answers == bound.foils).any()):
            bound = about.narrow(model).bind(model, "logit_diff")
            said = "the first token in which answer and foil differ, after the prompt and what they share"
        return Question(uncontinued(bound.clean), bound.answers, bound.foils, {"answer": said})
    check_predicts(model)
    prompts = about.bind(model)
    if answer is None:
        return Question(prompts, None, None, {"answer": "the model's own next token"})
    if about.ids is None:
        texts = [spelled(model, prompt, [answer])[0] for prompt in about]
        ids = single_tokens(model, list(about), texts, task=False)
    else:
        ids = [model.text.token_id(answer)] * len(prompts)
    return Question(prompts, torch.tensor(ids, device=prompts.ids.device), None, {"answer": answer})


#: largest difference of logits that are the same but for rounding, relative to the largest of them
AGREES = {torch.float32: 1e-4, torch.float64: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def depth_labels(model: Model) -> list[str]:
    """Return the names of the `layer` axis of a lens: the embedding, then the stream after each block."""
    return ["embed", *(str(i) for i in range(model.shape.n_layers))]


def along_depth(model: Model, prompts: Tokens, everywhere: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return the residual stream at every depth [layer, batch, (position,) d_model], the logits read off it, and their
    divergence from the model's own: at each prompt's last position or, of prompts of one length, at all.

    Raises:
        Refused: no lens fits the model (see `streams`), or the last depth misses the model's own logits.
    """
    x, own = streams(model, prompts, everywhere)
    logits = read_out(model, x)
    check_last(model, logits[-1], own)
    return x, logits, divergence(own, logits)


@torch.no_grad()
def streams(model: Model, prompts: Tokens, everywhere: bool = False) -> tuple[Tensor, Tensor]:
    """Return the residual stream at every depth [layer, batch, (position,) d_model] and the model's own logits: at each
    prompt's last position or, of prompts of one length, at all.

    Raises:
        Refused: the stream is normed between blocks (BERT), or something else than the last stream is unembedded, so
            that its depths share no basis with the unembedding.
    """
    if model.family.post_norm or model.anatomy.unembed is None:
        why = "it has no unembedding that reads its residual stream directly"
        raise Refused(f"lens on {model.name}", why, "use a causal language model")
    readable(model.anatomy, f"lens on {model.name}")
    at, rows = "" if everywhere else "@-1", apart(model.anatomy, prompts)
    places, found = model.places(["resid_pre.0", "resid_post"]), list[tuple[Tensor, Tensor]]()
    for some in [prompts] if len(rows) == 1 else [prompts.rows(part) for part in rows]:
        collector = Collector(model.anatomy, places, live=False)
        with model.edited(), attached(model.anatomy, {p: collector.see(p) for p in collector.places}):
            own = (all_logits if everywhere else last_logits)(model.anatomy, some).float()
        acts = collector.activations(some)
        found.append((torch.stack([acts[f"{p}{at}"] for p in places], dim=1), own))
    x, own = (in_order(rows, parts) for parts in zip(*found, strict=True))
    return x.movedim(1, 0), own


def check_last(model: Model, logits: Float[Tensor, "*rest token"], own: Float[Tensor, "*rest token"]) -> None:
    """Check that the logits read at the last depth are the model's own.

    Raises:
        Refused: they differ by more than rounding.
    """
    missed, size = float((logits - own).abs().max()), float(own.abs().max())
    if missed > AGREES.get(model.dtype, 1e-3) * size:
        why = f"at the last layer it misses the model's own logits by {missed:.2g} of {size:.2g}"
        raise Refused(
            f"lens on {model.name}", why, ("see ", Code("self_check(model)"), ": a site of this family may be wrong")
        )


@torch.no_grad()
def read_out(model: Model, x: Float[Tensor, "*rest d_model"], capped: bool = True) -> Float[Tensor, "*rest token"]:
    """Return the logits of any residual vectors, as the model itself would compute them after its last block.

    `capped=False` leaves out the family's soft cap.
    """
    return unembedded(model, x, capped)


def unembedded(model: Model, x: Float[Tensor, "*rest d_model"], capped: bool = True) -> Float[Tensor, "*rest token"]:
    """Return the same logits as `read_out`, with gradients to `x`."""
    way = readable(model.anatomy, f"lens on {model.name}")
    return way.logits(way.read(x.to(model.dtype)), capped).float()


def turned(model: Model, x: Float[Tensor, "*rest d_model"], samples: int, seed: int) -> Iterator[Tensor]:
    """Yield the readout of `x` in randomly rotated bases: the control, in which the unembedding should find nothing."""
    g = generator(seed)
    for _ in range(samples):
        yield read_out(model, x.float() @ rotation(model.shape.d_model, g).to(x.device))


def rank_of(logits: Float[Tensor, "*rest token"], ids: Int[Tensor, "*rest"]) -> Int[Tensor, "*rest"]:
    """Return the rank of tokens: the number of tokens that are strictly more likely (0 is the top)."""
    return (logits > logits.gather(-1, ids.unsqueeze(-1))).sum(-1)


def divergence(own: Float[Tensor, "*rest token"], early: Float[Tensor, "*more token"]) -> Float[Tensor, "*more"]:
    """KL(own ‖ early) in nats, from the model's own logits to those read at one depth, or at each (one axis more)."""
    p, q = own.log_softmax(-1), early.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
