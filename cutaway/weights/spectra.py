"""Along which directions does a head read and write most, and which tokens lie along them?

Singular values and directions of the two circuits of an attention head (Millidge & Black 2022, The singular value
decompositions of transformer weight matrices are highly interpretable): W_Q W_Kᵀ (`attends`: from queries to keys) and
W_V W_O (`writes`: from the token attended to, to the logits), norms folded in.

* `value[circuit, head, component]`: the singular values, the largest first. `rank[circuit, head]`: (Σσ²)² / Σσ⁴, the
  number of equal ones that would be as even.
* `token[circuit, head, side, direction, choice]`: the tokens along the first singular directions: embeddings, through
  the norm before attention, and for `writes` on the side `to` rows of the unembedding, the final norm folded in. Both
  sides of a component have a common sign; it is the one in which tokens stand out more. `strength`: how far a token's
  product lies above the mean of the vocabulary, in standard deviations.
* Control (`null`, `rank_null`): the head's own W_Q and W_K, or W_V and W_O, with a random rotation of its d_head
  dimensions between them. Both keep their singular values, and only how one is laid to the other is lost. A circuit
  that is flatter than this has sides that avoid each other.
* `strength_null[circuit, head, side, sample]`: the strongest token along a random direction of those that the head
  reads, or writes.
* Assumption: bare embeddings. Rotary positions stand at distance zero, or at `offset`.
* Known failures: directions of nearly equal singular values are mixed at random. A token of the list need not be one
  that any text puts there. What all tokens have in common is enough for a head to look at places, and is no direction
  of them (`weights.distances`).
* Equivalences (tests): the singular value decomposition of the product multiplied out.
* Cost: no forward; with `offset`, or where rotary positions also scale (YaRN), one of a short prompt. One product of
  every head's first directions with the vocabulary, and `samples` small decompositions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import generator, rotation
from cutaway.models import circuits as weights
from cutaway.models.anatomy.per_layer import Factored
from cutaway.models.anatomy.weights import logit_readers
from cutaway.models.model import Model
from cutaway.models.rotary import check_offsets, qk_at

CIRCUITS = ("attends", "writes")
SIDES = ("from", "to")


@dataclass(frozen=True, kw_only=True)
class Spectra(Result, kind="spectra"):
    """Singular values and directions of heads' circuits.

    Attributes:
        value: the singular values.
        null: the same with a random rotation between the head's two matrices.
        rank: how many equal singular values would be as even.
        rank_null: the same with the rotations.
        token: ids of the tokens along the first directions; the labels have their texts.
        strength: how far a token stands out of the vocabulary along its direction, in standard deviations.
        strength_null: the strongest token along random directions that the head reads or writes.
    """

    value: Float[Tensor, "circuit head component"]
    null: Float[Tensor, "circuit head component sample"]
    rank: Float[Tensor, "circuit head"]
    rank_null: Float[Tensor, "circuit head sample"]
    token: Int[Tensor, "circuit head side direction choice"]
    strength: Float[Tensor, "circuit head side direction choice"]
    strength_null: Float[Tensor, "circuit head side sample"]

    def tokens(self, head: str, circuit: str = "writes", direction: int = 0) -> tuple[list[str], list[str]]:
        """Return the texts of the tokens along a direction, on the side that is read and the one that is written.

        Raises:
            Refused: no such head, circuit or direction, or a circuit that cannot be read.
        """
        at = (self._entries("circuit", circuit)[0], self._entries("head", head)[0])
        if why := self.reasons.get(circuit):
            raise Refused(f"tokens of {circuit!r}", why, "ask for another circuit")
        row = self._index("direction", self.token.shape[3], direction)
        here = self.labels["token"][at[0]][at[1]]
        return here[0][row], here[1][row]


@method(
    answers="Along which directions does a head read and write most, and which tokens lie along them?",
    paper="Millidge & Black 2022, The singular value decompositions of transformer weight matrices are highly "
    "interpretable",
    cost="offset * F",
    control="rotated_basis",
    rung="observational",
)
@torch.no_grad()
def spectra(
    model: Model,
    /,
    *,
    heads: tuple[str, ...] = (),
    directions: int = 3,
    tokens: int = 6,
    offset: int = 0,
    samples: int = 8,
    seed: int = 0,
) -> Spectra:
    """Decompose the circuits of heads into singular values and directions.

    Args:
        heads: these, as `layer.head` or `layer.*` [default: all].
        directions: how many of the first directions are read in the vocabulary.
        tokens: how many tokens along each.
        offset: the distance from query to key in `attends`, in tokens, at which rotary positions turn queries.
        samples: how many random rotations make the null.
        seed: of the rotations.

    Raises:
        Refused: an encoder, no such head or offset, an unembedding that is not linear, or values that are not linear in
            what the head reads.
    """
    if not model.family.causal:
        raise Refused(f"spectra of {model.name}", "it is an encoder", "ask a causal model")
    check_offsets(model, [offset])
    places, embed, reasons = weights.heads(model, heads), weights.embedded(model), dict[str, str]()
    unembed = logit_readers(model.anatomy, dtype=embed.dtype).detach()
    tables = {"attends": (embed, embed), "writes": (embed, unembed)}
    forms = {"writes": weights.ov(model, places)}
    try:
        forms["attends"] = qk_at(model, places, offset)
    except Refused as refusal:
        reasons["attends"] = refusal.why
    parts = dict[str, dict[str, Tensor]]()
    for circuit, form in forms.items():
        g = generator(seed)
        found = _values(form, samples, g)
        u, _, vh = form.svd()
        parts[circuit] = found | _tokens(u, vh.mT, tables[circuit], max(directions, 1), max(tokens, 1), samples, g)
    there = parts["writes"]
    blank = {
        n: torch.full_like(x, math.nan) if x.is_floating_point() else torch.zeros_like(x) for n, x in there.items()
    }
    stacked: dict[str, Any] = {n: torch.stack([parts.get(c, blank)[n] for c in CIRCUITS]).cpu() for n in there}
    return Spectra(
        **{n: x.float() if x.is_floating_point() else x for n, x in stacked.items()},
        labels=_labels(model, places, stacked["token"]),
        units={"value": "singular value", "rank": "dimensions", "strength": "standard deviations"},
        reasons={"value": "it is of the weights alone, which have no spread over prompts"} | reasons,
        record={"norms": "folded" if weights.readable(model).is_folded else "not folded", "tokens": len(embed)},
    )


def _values(form: Factored, samples: int, g: torch.Generator) -> dict[str, Tensor]:
    """Return the singular values of every head and those of drawn rotations, with the ranks of both."""
    left, right = (torch.linalg.qr(x)[1] for x in (form.left, form.right.mT))  # what is left of both sides' shape
    turns = rotation(left.shape[-1], g, samples=(samples,)).to(left)
    found = [torch.linalg.svdvals(x @ right.mT) for x in (left, *(left @ turn for turn in turns))]
    value, null = found[0], torch.stack(found[1:], -1)
    ranks = [x.square().sum(1).square() / x.pow(4).sum(1).clamp_min(1e-300) for x in (value.double(), null.double())]
    return {"value": value, "null": null, "rank": ranks[0], "rank_null": ranks[1]}


def _tokens(
    u: Float[Tensor, "head d_model component"],
    v: Float[Tensor, "head d_model component"],
    tables: tuple[Tensor, Tensor],
    directions: int,
    tokens: int,
    samples: int,
    g: torch.Generator,
) -> dict[str, Tensor]:
    """Return the tokens along the first directions of every head, and the strongest along random ones."""
    n = min(directions, u.shape[-1])
    drawn = torch.randn(u.shape[-1], samples, generator=g).to(u)
    out: dict[str, list[Tensor]] = {"token": [], "strength": [], "strength_null": []}
    for pair in zip(u, v, strict=True):
        standing = list[Tensor]()
        for x, table in zip(pair, tables, strict=True):
            y = torch.cat([x[:, :n], x @ drawn], 1).T.to(table) @ table.T  # [direction and sample, token]
            standing.append((y - y.mean(1, keepdim=True)) / y.std(1, correction=0, keepdim=True).clamp_min(1e-30))
        both = torch.stack(standing)  # [side, direction and sample, token]
        own = both[:, :n]
        flip = own.amax(-1).sum(0) < -own.amin(-1).sum(0)
        best = torch.where(flip[:, None], -own, own).topk(min(tokens, own.shape[-1]), -1)
        for name, x in zip(out, (best.indices, best.values, both[:, n:].amax(-1)), strict=True):
            out[name].append(x)
    return {name: torch.stack(x) for name, x in out.items()}


def _labels(
    model: Model, places: list[Address], ids: Int[Tensor, "circuit head side direction choice"]
) -> dict[str, list[Any]]:
    flat = [model.text.token_texts(row.tolist()) for row in ids.flatten(0, 3)]
    sizes, text = ids.shape[:4], list[Any](flat)
    for size in reversed(sizes[1:]):
        text = [text[i : i + size] for i in range(0, len(text), size)]
    return {
        "circuit": [*CIRCUITS],
        "side": [*SIDES],
        "head": [f"{a.layer}.{a.unit}" for a in places],
        "direction": [str(i) for i in range(sizes[3])],
        "token": text,
    }
