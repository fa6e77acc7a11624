"""Orthogonal weights: the rewrites after which nothing in a model writes along a direction (Arditi et al. 2024).

W ← W − W v̂ v̂ᵀ of the embedding and of every matrix that writes to the residual stream, with inputs first
(arXiv:2406.11717). It equals projecting the direction out of the embedding and of every output of attention and MLP.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.refuse import Code, Refused
from cutaway.directions.direction import Direction
from cutaway.models.edits.rewrites import Rewrite
from cutaway.models.model import Model

_MATRICES, _BIASES = ("o", "mlp_out"), ("o_bias", "mlp_out_bias")


def orthogonalised(model: Model, direction: Direction) -> list[Rewrite]:
    """Return the rewrites that take a direction out of all that writes to the residual stream.

    `rewritten(model, *rewrites)` makes them, `save_rewrites` writes them to a file.

    Raises:
        Refused: several vectors, another width, an embedding that is tied to the unembedding, learned positions, or
            outputs that are normed before they are added.
    """
    if len(direction.vector) != 1:
        raise Refused(
            f"weights without {direction.name!r}", "it has several vectors", Code("direction.select(address=…)")
        )
    direction.check(model)
    _check(model, direction)
    v = normalize(direction.vector[0].to(torch.double), dim=0)
    record = {"direction": direction.identity(), "paper": "Arditi et al. 2024, arXiv:2406.11717"}
    out = [Rewrite("embed", factors=_factors(model.weights.embed, v), record=record)]
    for layer in range(model.shape.n_layers):
        for name in _MATRICES:
            factors = _factors(getattr(model.weights, name)[layer], v)
            out.append(Rewrite(f"{name}.{layer}", factors=factors, record=record))
        for name in _BIASES:
            bias = getattr(model.weights, name)[layer].double()
            if bool(bias.any()):
                delta = (-(bias @ v.to(bias.device)) * v.to(bias.device)).float()
                out.append(Rewrite(f"{name}.{layer}", delta=delta, record=record))
    return out


def _factors(w: Float[Tensor, "*head row d_model"], v: Float[Tensor, "d_model"]) -> tuple[Tensor, Tensor]:
    """Return u and v of W + u v = W − W v̂ v̂ᵀ."""
    v = v.to(w.device)
    u = -(w.double() @ v)[..., None]
    return u.float(), v.float().expand(*w.shape[:-2], 1, -1).contiguous()


def _check(model: Model, direction: Direction) -> None:
    what, places = f"weights of {model.name} without {direction.name!r}", model.sites()
    embedding, output = model.hf.get_input_embeddings(), model.hf.get_output_embeddings()
    if output is not None and embedding.weight is output.weight:
        why = "the embedding is tied to the unembedding, whose logits would change with it"
        raise Refused(what, why, ("untie them with ", Code("ca.models.untied(model)")))
    if places["pos_embed"].startswith("read"):
        raise Refused(what, "learned positions write to the stream too", Code("direction.at(…).project_out()"))
    if model.family.post_norm or model.family.ln1_post or model.family.ln2_post or not model.family.ln1:
        raise Refused(what, "outputs are normed before they are added", Code("direction.at(…).project_out()"))
