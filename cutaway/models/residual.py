"""The residual stream as an exact sum: embedding, every head, every attention bias, every MLP (or its neurons).

The sum equals `resid_post` of the last layer; through the final norm with its scale frozen and the unembedding it
equals the logits. Norms after attention or MLP (Gemma 2, OLMo 2) act linearly with their scales frozen, and the
family's residual multiplier is included (Elhage et al. 2021, transformer-circuits.pub/2021/framework).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.models.edits import Edit
from cutaway.models.model import Model, Prompts
from cutaway.models.norms import Norm
from cutaway.models.weights import bias, matrix


@dataclass(frozen=True, kw_only=True)
class Decomposition(Result, kind="decomposition"):
    """Contributions to the residual stream at one position of each prompt, and the stream they sum to.

    Components are named by address (`embed`, `head_out.9.6`, `mlp_out.3`, `mlp_post.3.17`) and `attn_bias.9`,
    `mlp_bias.3`. `scale` is the final norm's divisor there.
    """

    contribution: Float[Tensor, "batch component d_model"]
    total: Float[Tensor, "batch d_model"]
    scale: Float[Tensor, "batch"]


def decompose(
    model: Model, prompts: Prompts, position: int = -1, *, neurons: Sequence[int] = (), edits: Sequence[Edit] = ()
) -> Decomposition:
    """Split the residual stream at `position` into components; the MLPs of the layers in `neurons` into neurons.

    Raises:
        Refused: the stream itself is normed between additions (BERT), so that no sum exists.
    """
    body, n = model.body, model.shape.n_layers
    if body.family.post_norm:
        raise Refused(
            f"decomposition of {model.name}", "its residual stream is normed after every addition", "use captures"
        )
    t = model.tokens(prompts)
    sites: list[str] = ["resid_pre.0", "z", "mlp_out", f"resid_post.{n - 1}", *(f"mlp_post.{i}" for i in neurons)]
    has_pos = body.top("pos") is not None
    acts = model.capture(t, [*sites, "pos_embed"] if has_pos else sites, edits, logits=False)
    names, parts = ["embed"], [acts[f"resid_pre.0@{position}"]]
    if has_pos:
        pos = acts[f"pos_embed@{position}"]
        names, parts = ["embed", "pos_embed"], [parts[0] - pos, pos]
    for i in range(n):
        heads, rest = _attention(model, i, acts[f"z.{i}@{position}"])
        names += [str(Address("head_out", i, h)) for h in range(heads.shape[1])] + [f"attn_bias.{i}"]
        parts += [*heads.unbind(1), rest]
        if i in neurons:
            each, rest = _neurons(model, i, acts[f"mlp_post.{i}@{position}"], acts[f"mlp_out.{i}@{position}"])
            names += [str(Address("mlp_post", i, k)) for k in range(each.shape[1])] + [f"mlp_bias.{i}"]
            parts += [*each.unbind(1), rest]
        else:
            names.append(f"mlp_out.{i}")
            parts.append(acts[f"mlp_out.{i}@{position}"])
    total = acts[f"resid_post.{n - 1}@{position}"].float()
    final = body.top("final")
    scale = body.norm(final).scale(total) if final is not None else torch.ones(len(total), device=total.device)
    return Decomposition(
        contribution=torch.stack([p.float() for p in parts], dim=1),
        total=total,
        scale=scale,
        labels={"component": names},
        units={"contribution": "residual stream", "total": "residual stream"},
        record={"model": model.identity(), "position": position, "final norm": "scale frozen at its value in this run"},
    )


def logit_contributions(
    model: Model, parts: Decomposition, tokens: Int[Tensor, "batch"], foils: Int[Tensor, "batch"] | None = None
) -> tuple[Float[Tensor, "batch component"], Float[Tensor, "batch"]]:
    """Each component's share of the logit of `tokens` (minus that of `foils`), and the share of the final biases.

    Units are logits before any soft cap; the final norm's scale is frozen, its centring and weight are applied to
    every component. Components plus bias sum to the logit (difference).
    """
    head, final = model.body.unembed, model.body.top("final")
    if head is None:
        raise Refused(f"logit contributions of {model.name}", "it has no unembedding", "load the language-model head")
    w, b = matrix(head).double(), bias(head).double()
    direction = w[:, tokens].T - (w[:, foils].T if foils is not None else 0.0)
    offset = b[tokens] - (b[foils] if foils is not None else 0.0)
    x = parts.contribution.double()
    if final is not None:
        norm = _double(model.body.norm(final))
        offset = offset + direction @ norm.bias
        x = norm.linear(x, parts.scale.double()[:, None].expand(x.shape[:2]))
    m = model.body.logit_multiplier
    return (torch.einsum("bcd,bd->bc", x, direction) * m).float(), (offset * m).float()


def uncapped(model: Model, logits: Float[Tensor, "*rest token"]) -> Float[Tensor, "*rest token"]:
    """Logits before the family's soft cap, which decompositions refer to."""
    cap = model.body.softcap
    return (
        logits if not cap else cap * torch.atanh((logits.double() / cap).clamp(-1 + 1e-12, 1 - 1e-12)).to(logits.dtype)
    )


def _attention(model: Model, layer: int, z: Float[Tensor, "batch head d_head"]) -> tuple[Tensor, Tensor]:
    """Contribution of each head, and what is left for the bias: [batch, head, d_model], [batch, d_model]."""
    body, w = model.body, model.weights
    heads = torch.einsum("bhe,hed->bhd", z.float(), w.o(layer).float())
    rest = w.o_bias(layer).float().expand(len(z), -1)
    return _through(model, heads, rest, body.part(layer, "ln1_post"))


def _neurons(model: Model, layer: int, post: Float[Tensor, "batch neuron"], out: Tensor) -> tuple[Tensor, Tensor]:
    """Contribution of each neuron, and the bias."""
    w = model.weights
    each = post.float().unsqueeze(-1) * w.mlp_out(layer).float()
    rest = w.mlp_out_bias(layer).float().expand(len(post), -1)
    return _through(model, each, rest, model.body.part(layer, "ln2_post"))


def _through(model: Model, parts: Tensor, rest: Tensor, post: torch.nn.Module | None) -> tuple[Tensor, Tensor]:
    """Parts and bias through a post-norm with its scale frozen, times the residual multiplier."""
    m = model.body.multiplier
    if post is None:
        return parts * m, rest * m
    norm = model.body.norm(post)
    scale = norm.scale(parts.sum(1) + rest)
    whole = norm.linear(parts, scale[:, None].expand(parts.shape[:2]))
    return whole * m, (norm.linear(rest, scale) + norm.bias) * m


def _double(norm: Norm) -> Norm:
    return Norm(norm.weight.double(), norm.bias.double(), norm.centred, norm.eps)
