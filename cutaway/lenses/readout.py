"""Reading the residual stream out of turn: final norm, unembedding and soft cap applied at any depth."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.models.model import Model, Prompts
from cutaway.models.weights import bias, matrix


def depth_labels(model: Model) -> list[str]:
    """Names of the `layer` axis of a lens: the embedding, then the stream after each block."""
    return ["embed", *(str(i) for i in range(model.shape.n_layers))]


def streams(
    model: Model, prompts: Prompts, position: int | None = -1
) -> Float[Tensor, "layer batch d_model"] | Float[Tensor, "layer batch position d_model"]:
    """The residual stream at every depth, at one position or at all.

    Raises:
        Refused: the stream is normed between blocks (BERT), so that its depths share no basis with the unembedding.
    """
    if model.family.post_norm or model.body.unembed is None:
        why = "it has no unembedding that reads its residual stream directly"
        raise Refused(f"lens on {model.name}", why, "use a causal language model")
    at = "" if position is None else f"@{position}"
    acts = model.capture(prompts, ["resid_pre.0", "resid_post"], logits=False)
    return torch.stack([acts[f"resid_pre.0{at}"], *(acts[f"resid_post.{i}{at}"] for i in range(model.shape.n_layers))])


def read_out(model: Model, x: Float[Tensor, "*rest d_model"], capped: bool = True) -> Float[Tensor, "*rest token"]:
    """Logits of any residual vectors, as the model itself would compute them after its last block.

    `capped=False` leaves out the family's soft cap.
    """
    head, final, body = model.body.unembed, model.body.top("final"), model.body
    assert head is not None
    with torch.no_grad():
        y = final(x.to(model.dtype)) if final is not None else x.to(model.dtype)
        logits = torch.nn.functional.linear(y, matrix(head).T, bias(head)).float() * body.logit_multiplier
    return cap * torch.tanh(logits / cap) if capped and (cap := body.softcap) else logits


def turned(model: Model, x: Float[Tensor, "*rest d_model"], samples: int, seed: int) -> Iterator[Tensor]:
    """What is read out of `x` in randomly rotated bases: the control, in which the unembedding should find nothing."""
    g = generator(seed)
    for _ in range(samples):
        yield read_out(model, x.float() @ _rotation(model.shape.d_model, g).to(x.device))


def _rotation(width: int, g: torch.Generator) -> Float[Tensor, "d_model d_model"]:
    """A random rotation (Haar)."""
    q, r = torch.linalg.qr(torch.randn(width, width, generator=g))
    return q * r.diagonal().sign()


def single(prompts: int) -> dict[str, str]:
    """What a record says of the interval that one prompt cannot have."""
    return {} if prompts > 1 else {"no_interval": "one prompt"}


def rank_of(logits: Float[Tensor, "*rest token"], ids: Int[Tensor, "*rest"]) -> Int[Tensor, "*rest"]:
    """How many tokens are strictly more likely (0 is the top)."""
    return (logits > logits.gather(-1, ids.unsqueeze(-1))).sum(-1)


def divergence(
    final: Float[Tensor, "1 *rest token"], early: Float[Tensor, "layer *rest token"]
) -> Float[Tensor, "layer *rest"]:
    """KL(final ‖ early) in nats."""
    p, q = final.log_softmax(-1), early.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
