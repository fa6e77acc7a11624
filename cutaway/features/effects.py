"""Direct effects of latents on logits, decoder neighbours, and what ablating a latent does to a model's predictions.

* The direct effect of a latent on a token's logit is the product of what one unit of the latent adds to the residual
  stream with the token's row of the unembedding, through the norms behind it; their scales are left out. It is given in
  standard deviations over the vocabulary. The null are random directions of the same width.
* Ablating a latent sets it to 0 at all positions and keeps the reconstruction error. `loss` is the change of the mean
  cross-entropy of the tokens that follow the example; `logit` that of the mean logit of the tokens that the latent
  raises most, at the example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import parse
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary, place_of
from cutaway.dictionaries.norms import FixedNorm
from cutaway.dictionaries.splice import Splice, ablate_latents
from cutaway.features.store.feature_store import FeatureStore
from cutaway.features.store.latents import Example, StoredLatents
from cutaway.models import circuits
from cutaway.models.anatomy.weights import logit_readers
from cutaway.models.model import Model
from cutaway.models.tokens import batch

MEASURES = ["loss", "logit"]
_NORMS: dict[str, Literal["ln1_post", "ln2_post"]] = {"mlp_out": "ln2_post", "attn_out": "ln1_post"}
_STREAM = ("resid_pre", "resid_mid", "resid_post", "embed", *_NORMS)


def writes_to_logits(model: Model, d: Dictionary, latent: int) -> Float[Tensor, "d_model"]:
    """Return what one unit of a latent adds to the residual stream, over all the sites that it writes.

    Raises:
        Refused: it writes no site of the residual stream.
    """
    block = d.blocks[place_of(d, latent)[0]]
    return _into_stream(model, {s: d.direction(latent, s) for s in block.writes}, f"latent {latent}")


def rows_to_logits(model: Model, d: Dictionary) -> Float[Tensor, "latent d_model"]:
    """Return what one unit of each latent adds to the residual stream, over all the sites that it writes.

    Raises:
        Refused: a block writes no site of the residual stream.
    """
    found = list[Tensor]()
    for number, rows in enumerate(d.decoder):
        own = {s: n.push(t) if isinstance(n := d.writing.get(s), FixedNorm) else t for s, t in rows.items()}
        found.append(_into_stream(model, own, f"the latents of block {number}"))
    return torch.cat(found)


def _into_stream(model: Model, written: Mapping[str, Float[Tensor, "*rest width"]], what: str) -> Tensor:
    """Return the sum over sites of the residual stream, each through the norm behind it."""
    total: Tensor | None = None
    for site, rows in written.items():
        address = parse(site)
        if address.site not in _STREAM:
            continue
        own = rows.float().to(model.device)
        if address.site in _NORMS and address.layer is not None:
            own = circuits.behind(model, _NORMS[address.site], address.layer, own)
        total = own if total is None else total + own
    if total is None:
        why = "it writes no site of the residual stream"
        raise Refused(f"the logits of {what}", why, "ablate it to see what it does")
    return total


def direct_effects(model: Model, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row token"]:
    """Return the direct effects of directions on all logits, the weights of norms folded in, their scales left out.

    Raises:
        Refused: the model has no unembedding, or one that is not linear.
    """
    return rows @ logit_readers(model.anatomy, dtype=torch.float32).detach().T


def logit_effects(model: Model, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row token"]:
    """Return the direct effects of directions on all logits, in standard deviations over the vocabulary.

    Raises:
        Refused: the model has no unembedding, or one that is not linear.
    """
    found = direct_effects(model, rows)
    return (found - found.mean(1, keepdim=True)) / found.std(1, keepdim=True).clamp_min(1e-30)


def decoder_rows(d: Dictionary, latent: int) -> tuple[Float[Tensor, "latent width"], int]:
    """Return the decoder rows of a latent's block, each of length 1, over all sites, and the block's first latent."""
    block = place_of(d, latent)[0]
    rows = torch.cat([t.float() for t in d.decoder[block].values()], 1)
    return torch.nn.functional.normalize(rows, dim=1), d.starts[block]


def chosen_examples(latents: StoredLatents, latent: int, most: int) -> list[Example]:
    """Return examples of different contexts: random ones first, then the largest."""
    found: dict[int, Example] = {}
    for example in (*latents.sampled(latent), *latents.top(latent)):
        found.setdefault(example.context, example)
    return list(found.values())[:most]


def ablated(
    model: Model,
    store: FeatureStore,
    d: Dictionary,
    latent: int,
    examples: Sequence[Example],
    raised: Int[Tensor, "token"] | None,
) -> Float[Tensor, "example measure"]:
    """Return the changes of loss and logit by which each example shows a latent's ablation; NaN without raised tokens.

    Raises:
        Refused: a dictionary that cannot be spliced in.
    """
    edit = Splice(d, error=True, changes=(ablate_latents(latent),))
    return torch.stack([_ablated(model, store, edit, e, raised) for e in examples])


def _ablated(
    model: Model, store: FeatureStore, edit: Splice, example: Example, raised: Tensor | None
) -> Float[Tensor, "measure"]:
    ids = store.context(example.context)["ids"]
    tokens = batch([ids[ids >= 0].tolist()]).to(model.device)
    clean, changed = (model.run(tokens, edits)[0].float() for edits in ((), edit))
    after, at = tokens.ids[0, example.position + 1 :], slice(example.position, -1)
    losses = [
        torch.nn.functional.cross_entropy(x[at], after) if len(after) else x.new_tensor(torch.nan)
        for x in (clean, changed)
    ]
    if raised is None:
        logit = clean.new_tensor(torch.nan)
    else:
        logit = (changed - clean)[example.position, raised.to(clean.device)].mean()
    return torch.stack([losses[1] - losses[0], logit]).cpu()


def of_like_density(latents: StoredLatents, latent: int, samples: int, g: torch.Generator) -> list[int]:
    """Return random other latents among the 64 whose densities are nearest in logarithm."""
    count = latents.count.double()
    away = (count.clamp_min(1e-9).log() - count[latent].log()).abs()
    away[latent], away[count == 0] = torch.inf, torch.inf
    near = away.argsort(stable=True)[: min(64, int(away.isfinite().sum()))]
    return near[torch.randperm(len(near), generator=g)[:samples]].tolist()
