"""Single neurons as memories: the value that one writes, the keys that it reads, and how strongly it fires.

The MLP of a layer writes Σ c·v over its neurons: v is a row of W_out, the value, and c the activation (`mlp_post`), the
coefficient. A key is a column of W_in, or two where a gate multiplies (Geva et al. 2021, arXiv:2012.14913).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.models import circuits
from cutaway.models.anatomy import rope
from cutaway.models.edits.edit import Edit
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.models.watching import in_batches, watched

#: a neuron: its layer and its number there
Neuron = tuple[int, int]
_TOKENS = 1 << 13  # most positions that run at once, unless one prompt has more
_CELLS = 1 << 24  # most logits that are made at once
_FORM = "neurons are written as layer.neuron, separated by commas"


def dense_layers(model: Model, wanted: Sequence[int] = ()) -> list[int]:
    """Return the layers whose MLP is one matrix of values, or those wanted of them.

    Raises:
        Refused: a wanted layer has none, or the model has no such layer.
    """
    places = [a.layer for a in model.places("mlp_post") if a.layer is not None]
    there = [i for i in places if all(model.anatomy.part(i, n) is not None for n in ("up", "down"))]
    if not there:
        raise Refused(f"neurons of {model.name}", "none of its layers has an MLP with one W_out", "use mlp_out")
    if not set(wanted) <= set(there):
        have = f"neurons are in layers {there[0]} to {there[-1]}"
        raise Refused(f"layers {','.join(map(str, wanted))}", have, "write for example 0,3,5")
    return sorted(set(wanted)) or there


def named(model: Model, names: Sequence[str]) -> list[Neuron]:
    """Return the neurons of these names, each once: `3.17,5.2`, or all of a layer as `3.*`.

    Raises:
        Refused: another form, or no such neuron.
    """
    found = model.places([f"mlp_post.{n}" if n[:1].isdigit() else n for n in names])
    if any(a.site != "mlp_post" or a.unit is None or a.position is not None for a in found):
        raise Refused(f"neurons {','.join(names)!r}", _FORM, "write for example 3.17,5.2")
    dense_layers(model, [a.layer for a in found if a.layer is not None])
    return [(a.layer, a.unit) for a in found if a.layer is not None and a.unit is not None]


def strongest(size: Float[Tensor, "layer neuron"], layers: Sequence[int], top: int) -> list[Neuron]:
    """Return the `top` neurons of every layer by size, the largest first."""
    order = size.topk(min(top, size.shape[1]), dim=1).indices.tolist()
    return [(layer, i) for layer, row in zip(layers, order, strict=True) for i in row]


def asked(model: Model, tokens: Tokens, names: Sequence[str], layers: Sequence[int], top: int) -> list[Neuron]:
    """Return the neurons of these names; without, the `top` of each layer by their mean update at the last tokens.

    Raises:
        Refused: no such neuron or layer, or a model without dense MLPs.
    """
    there, chosen = dense_layers(model, layers), named(model, names)
    return chosen or strongest(updates(model, coefficients(model, tokens, there), there).mean(0), there, max(top, 1))


def by_layer(neurons: Sequence[Neuron]) -> dict[int, list[int]]:
    """Return where in a list the neurons of each layer stand."""
    out = dict[int, list[int]]()
    for at, (layer, _) in enumerate(neurons):
        out.setdefault(layer, []).append(at)
    return out


def label(neuron: Neuron) -> str:
    """Return the name of a neuron, as `named` reads it."""
    return f"{neuron[0]}.{neuron[1]}"


@torch.no_grad()
def values(model: Model, layer: int) -> Float[Tensor, "neuron d_model"]:
    """Return what every neuron of a layer writes, up to a common factor: W_out, through a norm behind the MLP."""
    v = model.weights.mlp_out[layer].detach().float() * model.anatomy.multiplier
    post = model.anatomy.part(layer, "ln2_post")
    if post is None:
        return v
    norm = model.anatomy.norm(post)
    return norm.centre(v) * norm.weight.to(v.dtype)


@torch.no_grad()
def toward_logits(model: Model, x: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
    """Return directions of the stream as the unembedding's rows meet them: final norm folded in, its scale left out."""
    final = model.anatomy.top("final")
    if final is None:
        return x
    norm = model.anatomy.norm(final)
    return norm.centre(x) * norm.weight.to(x)


@torch.no_grad()
def keys(model: Model, layer: int) -> dict[str, Float[Tensor, "neuron d_model"]]:
    """Return what every neuron of a layer reads in the stream, the norm before it folded in: `reads`, or in a gated MLP
    `gate reads` and `linear reads`.
    """
    w = circuits.readable(model)
    norm = model.anatomy.part(layer, "ln2") or model.anatomy.part(layer, "ln1") if w.is_folded else None
    gated = model.anatomy.part(layer, "gate") is not None
    views = {"gate reads": w.mlp_gate, "linear reads": w.mlp_in} if gated else {"reads": w.mlp_in}
    found = {name: view[layer].detach().float().T for name, view in views.items()}
    return {n: x if norm is None else model.anatomy.norm(norm).centre(x) for n, x in found.items()}


def logits_of(
    x: Float[Tensor, "row d_model"], table: Float[Tensor, "token d_model"]
) -> Iterator[Float[Tensor, "some token"]]:
    """Yield the products of directions with every row of a table, as many directions at once as fit."""
    for some in x.split(max(1, _CELLS // len(table))):
        yield some.to(table.device) @ table.T


def mixed(
    vectors: Float[Tensor, "neuron d_model"],
    norms: Float[Tensor, "row"],
    g: torch.Generator,
    without: int | None = None,
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row neuron"]]:
    """Return random mixes of a layer's vectors, or of all but one, of these norms, and their weights: its neurons in a
    randomly rotated basis.
    """
    weights = torch.randn(len(norms), len(vectors), generator=g).to(vectors.device)
    if without is not None:
        weights[:, without] = 0
    made = weights @ vectors
    scale = (norms.to(made.device) / made.norm(dim=-1).clamp_min(1e-30))[:, None]
    return made * scale, weights * scale


def coefficients(model: Model, tokens: Tokens, layers: Sequence[int]) -> Float[Tensor, "prompt layer neuron"]:
    """Return the activation of every neuron at each prompt's last token, from one forward."""
    return at_last(model, tokens, {"mlp_post": layers})["mlp_post"]


def at_last(
    model: Model, tokens: Tokens, sites: Mapping[str, Sequence[int]], edits: Sequence[Edit] = ()
) -> dict[str, Float[Tensor, "prompt layer _"]]:
    """Return some layers of sites at each prompt's last token, in float32, from one forward under edits."""
    parts, done = list[dict[str, Tensor]](), list[Sequence[int]]()
    for rows in batches(model, tokens):
        some, found = tokens.rows(rows), dict[Address, Tensor]()

        def see(place: Address, x: Tensor, at: Tensor = some.last, found: dict[Address, Tensor] = found) -> Tensor:
            found[place] = x.detach()[torch.arange(len(x), device=x.device), at.to(x.device)].float()
            return x

        places = {site: [Address(site, i) for i in layers] for site, layers in sites.items()}
        watched(model, some, {a: partial(see, a) for each in places.values() for a in each}, edits)
        parts.append({site: torch.stack([found[a].cpu() for a in each], 1) for site, each in places.items()})
        done.append(rows)
    return {site: rope.in_order(done, [part[site] for part in parts]) for site in sites}


def updates(
    model: Model, c: Float[Tensor, "prompt layer neuron"], layers: Sequence[int]
) -> Float[Tensor, "prompt layer neuron"]:
    """Return |c|·‖v‖ of every neuron as a share of its layer's sum."""
    size = c.abs() * torch.stack([values(model, i).norm(dim=-1).cpu() for i in layers])
    return size / size.sum(-1, keepdim=True).clamp_min(1e-30)


def batches(model: Model, tokens: Tokens) -> Iterator[list[int]]:
    """Yield the rows of a batch that run together."""
    return in_batches(model, tokens, _TOKENS // tokens.ids.shape[1])
