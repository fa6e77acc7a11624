"""How much of what a head does is suppressing tokens that it attends to and that were predicted?

Copy suppression (McDougall et al. 2023, arXiv:2310.04625): a head attends to a token that the stream already predicts,
and lowers its logit. Of a head's output at a query, Σ_k A_qk·v_k·W_O, only this is kept: of the `top` share of the
query's keys whose tokens have the largest logits in the stream that enters the block, the component c = A_qk·v_k·W_O·û
along the token's unembedding direction û (of length 1, final norm folded in) where c < 0. The rest stands at its mean.

1. `explained[way, head]`: 1 − KL(clean ‖ only this) / KL(clean ‖ head at its mean), a ratio of means over texts. 1:
   nothing else matters; 0: no better than the mean. `suppresses` keeps c < 0, `copies` keeps c > 0.
2. `effect[head]`: KL(clean ‖ head at its mean) in nats, mean over all tokens of a text. A head that does nothing has no
   share to explain: read it first.
3. `written[way, head]`: Σ_k |c| over the kept keys, mean over tokens.

* Without `heads`, the `most` heads that suppress most by `written`.
* Every second text gives the means and chooses heads; 1 to 3 are measured on the others. With one text, both are it.
* Each text's first token, and special tokens before its last, are kept as they are, not averaged in, and no keys:
  attention rests there.
* Interval: 95 %, over texts. Control (`null`): each key's direction is that of another token of the texts.
* Assumption: the direct path. A head whose suppression is read by later heads is explained all the same, as the model
  runs on.
* Known failures: a mean over few texts holds their topics, and the share can be negative. Keys of one token are tied,
  and kept or left together.
* Equivalence (test): the same edit by a hook on plain transformers. Ground truth (test): a head built to do this.
* Cost: a forward to each layer, and 1 + 2·(1 + samples) for each head, from its layer on. Patterns of all layers and
  clean logits are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Call, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt, ratio_interval
from cutaway.interventions.ablation_values import SINKS, ordinary, stand_in
from cutaway.models import circuits
from cutaway.models.access.capture import Activations
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.anatomy.unembedding import readable
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Add
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens, halves
from cutaway.tasks.answers import check_predicts
from cutaway.tasks.prompts import Prompts

WAYS = {"suppresses": -1.0, "copies": 1.0}  # → the sign of what is kept


@dataclass(frozen=True, kw_only=True)
class CopySuppression(Result, kind="copy_suppression"):
    """Shares of heads' effects that the suppression, or the copying, of predicted tokens explains.

    Attributes:
        explained: the share of the effect.
        interval: of `explained`, 95 %, over texts.
        null: `explained` with the directions of other tokens.
        effect: KL divergence from the clean predictions with the head at its mean.
        effect_interval: of `effect`, 95 %, over texts.
        written: length of what is kept, mean over tokens.
    """

    explained: Float[Tensor, "way head"]
    interval: Float[Tensor, "way head bound"]
    null: Float[Tensor, "way head sample"]
    effect: Float[Tensor, "head"]
    effect_interval: Float[Tensor, "head bound"]
    written: Float[Tensor, "way head"]


@method(
    answers="How much of what a head does is suppressing tokens that it attends to and that were predicted?",
    paper="McDougall et al. 2023, arXiv:2310.04625",
    cost="prompts * (1 + 2 * layers + head * (3 + 2 * samples)) * F",
    control="other_tokens",
    rung="interventional",
)
def copy_suppression(
    model: Model,
    prompts: Prompts,
    /,
    *,
    heads: tuple[str, ...] = (),
    most: int = 4,
    top: float = 0.05,
    samples: int = 4,
    seed: int = 0,
) -> CopySuppression:
    """Keep only what a head does against tokens that it attends to and that were predicted, and see what is left.

    Args:
        heads: these, as `layer.head` or `layer.*`; without, those that suppress most.
        most: without `heads`, how many.
        top: the share of a query's keys that count as predicted; at least one key.
        samples: how many exchanges of directions make the null.
        seed: of the exchanges.

    Raises:
        Refused: an encoder, no such head, a share outside of 0 to 1, one token in each text, or logits that are not
            linear in what heads write.
    """
    check_predicts(model)
    if not 0 < top <= 1:
        raise Refused(Call("copy_suppression", {"top": top}), "it is a share of keys", "ask for above 0, up to 1")
    tokens, asked = prompts.bind(model), circuits.heads(model, heads)
    first, second = (tokens.rows(rows) for rows in halves(tokens))
    ids, shifts = tokens.ids.unique(), _shifts(tokens, samples, seed)
    there = dict.fromkeys(a.layer for a in asked if a.layer is not None)
    chose, held = ({i: _Layer.of(model, t, i, top, ids, shifts) for i in there} for t in (first, second))
    score = [float(chose[a.layer or 0].written(a.unit or 0)[0]) for a in asked]
    order = range(len(asked)) if heads else sorted(range(len(asked)), key=lambda i: -score[i])[: max(most, 1)]
    chosen = [asked[i] for i in order]
    effects = [e for a in chosen for e in held[a.layer or 0].edits(a, chose[a.layer or 0])]
    kl = _divergence(model, second, effects).unflatten(0, (len(chosen), -1)).movedim(-1, 0)  # [prompt, head, variant]
    whole, left = kl[..., 0], kl[..., 1:].unflatten(-1, (len(WAYS), 1 + samples))
    share = (1 - left.mean(0) / whole.mean(0)[:, None, None]).float().movedim(1, 0)  # [way, head, draw]
    spread = ratio_interval((whole[..., None] - left[..., 0]).movedim(-1, 1), whole[:, None].expand(-1, len(WAYS), -1))
    return CopySuppression(
        explained=share[..., 0].clone(),
        interval=spread,
        null=share[..., 1:].clone(),
        effect=whole.mean(0).float(),
        effect_interval=mean_interval(whole, within=(0.0, torch.inf)),
        written=torch.stack([held[a.layer or 0].written(a.unit or 0) for a in chosen], 1),
        labels={"way": list(WAYS), "head": [f"{a.layer}.{a.unit}" for a in chosen], "bound": BOUNDS},
        units={"explained": "share of effect", "null": "share of effect", "effect": "nats", "written": "stream"},
        reasons=one_prompt(len(second), "explained", "effect"),
        record={
            "split": f"every second text gave the means and chose heads, measured on the other {len(second)}",
            "left in place": SINKS,
            "predicted": f"the first {top:g} of a query's keys, at least one",
        },
    )


@dataclass(frozen=True)
class _Layer:
    """Values and patterns of the heads of a layer at one batch of texts, along the directions of their tokens.

    Attributes:
        where: the tokens that are averaged in and edited.
        directions: unembedding directions of length 1 of the keys' tokens, their own first, then those exchanged.
        along: A_qk·v_k·W_O·û by draw of the directions, at predicted keys, 0 elsewhere.
        z: what the output projection reads.
    """

    model: Model
    where: Bool[Tensor, "batch q_pos"]
    directions: Float[Tensor, "draw batch k_pos d_model"]
    along: Float[Tensor, "draw batch head q_pos k_pos"]
    z: Float[Tensor, "batch q_pos head d_head"]

    @staticmethod
    @torch.no_grad()
    def of(
        model: Model, tokens: Tokens, layer: int, top: float, ids: Int[Tensor, "some"], shifts: Sequence[int]
    ) -> _Layer:
        """Run texts of these tokens up to a layer; `shifts` say which other token's direction each has in a draw.

        Raises:
            Refused: logits are not linear in what its heads write, or the texts have one token each.
        """
        acts = model.capture(tokens, [f"{s}.{layer}" for s in ("resid_pre", "pattern", "v", "z")], logits=False)
        where, place = ordinary(model, tokens), torch.searchsorted(ids, tokens.ids)
        rows = circuits.readers(model, layer, ids, torch.float32)
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        directions = torch.stack([rows.roll(s, 0)[place.to(rows.device)] for s in (0, *shifts)])
        group = model.shape.n_heads // model.shape.n_kv_heads
        values = acts[f"v.{layer}"].float().repeat_interleave(group, 2)  # [batch, k_pos, head, d_head]
        out = model.weights.o[layer].detach().float()  # [head, d_head, d_model]
        seen = torch.einsum("bkhd,hdm,sbkm->sbhk", values, out, directions.to(out))
        pattern = acts[f"pattern.{layer}"].float() * _predicted(model, tokens, acts, layer, ids, place, top)[:, None]
        return _Layer(model, where, directions, pattern[None] * seen[:, :, :, None, :], acts[f"z.{layer}"].float())

    def written(self, head: int) -> Float[Tensor, "way"]:
        """Return the mean over tokens of what a head writes against, and along, the directions of predicted tokens."""
        own = self.along[0, :, head][self.where.to(self.along.device)]
        return torch.stack([(sign * own).clamp_min(0).sum(-1).mean() for sign in WAYS.values()]).cpu()

    def edits(self, head: Address, means: _Layer) -> list[list[Edit]]:
        """Return the edits that put a head at the mean of other texts, and that keep each way, by draw."""
        where, place = self.where.to(self.z.device)[..., None], Address("attn_out", head.layer)
        stand = [stand_in(rest, means.where, "mean") for rest in means._rests(head)]
        return [[Add(place, (mean - rest) * where)] for mean, rest in zip(stand, self._rests(head), strict=True)]

    def _rests(self, head: Address) -> list[Float[Tensor, "batch q_pos d_model"]]:
        """Return a head's whole output, and what each way leaves of it, by draw of directions."""
        layer, unit = head.layer or 0, head.unit or 0
        rests = [self.z[:, :, unit] @ self.model.weights.o[layer][unit].detach().float()]
        for sign in WAYS.values():
            for along, directions in zip(self.along[:, :, unit], self.directions, strict=True):
                rests.append(rests[0] - sign * (sign * along).clamp_min(0) @ directions.to(along))
        return rests


def _shifts(tokens: Tokens, samples: int, seed: int) -> list[int]:
    """Return by how many places the directions of all tokens are exchanged in each draw."""
    return torch.randint(1, max(len(tokens.ids.unique()), 2), (samples,), generator=generator(seed)).tolist()


def _predicted(
    model: Model,
    tokens: Tokens,
    acts: Activations,
    layer: int,
    ids: Int[Tensor, "some"],
    place: Int[Tensor, "batch k_pos"],
    top: float,
) -> Bool[Tensor, "batch q_pos k_pos"]:
    """Return True at the keys whose tokens the stream predicts most at a query, among those it may look at."""
    way = readable(model.anatomy, f"copy suppression in {model.name}")
    x = acts[f"resid_pre.{layer}"]
    every = torch.stack([way.logits(way.read(row))[:, ids].float() for row in x])  # [batch, q_pos, some]
    place, mask = place.to(every.device), tokens.mask.to(every.device)
    logits = every.gather(-1, place[:, None].expand(-1, every.shape[1], -1))
    order = torch.arange(mask.shape[1], device=every.device)
    allowed = ordinary(model, tokens).to(mask.device)[:, None] & mask[:, :, None] & (order[:, None] >= order)
    logits = logits.masked_fill(~allowed, -torch.inf)
    count = (top * allowed.sum(-1)).ceil().long().clamp_min(1)
    least = logits.sort(-1, descending=True).values.gather(-1, count[..., None] - 1)
    return allowed & (logits >= least)


def _divergence(model: Model, tokens: Tokens, variants: Sequence[Sequence[Edit]]) -> Float[Tensor, "variant prompt"]:
    """Return KL(clean ‖ variant) in nats, mean over the tokens of each text."""
    site = Address("logits")
    clean = model.capture(tokens, [site])[str(site)].double().log_softmax(-1)

    def apart(seen: Seen, prompt: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        assert seen.activations is not None
        real, rows = seen.activations.tokens.mask, prompt.to(tokens.mask.device)
        said = seen.activations[str(site)][real.to(clean.device)].double().log_softmax(-1)  # [token of a row, token]
        own = clean[rows][tokens.mask[rows].to(clean.device)]
        each = (own.exp() * (own - said)).sum(-1)
        return torch.stack([row.mean() for row in each.split(real.sum(-1).tolist())])

    return sweep(model, tokens, variants, Measure(apart, Reads(last_logits=False, places=(site,)))).double().cpu()
