"""Which heads pass on what earlier heads have moved, and from where?

Two heads in a row are a virtual head (Elhage et al. 2021, A mathematical framework for transformer circuits): its
pattern is the product A₂A₁ of theirs, its OV circuit W_OV¹ W_OV². The receiver reads all that is in the stream through
the norm before its attention, which is linear with its scale s frozen. Of its `head_out` o₂ at a query q, what came
through the sender is p_q = Σ_m A₂[q, m] (w₁[m] / s_m) W_OV², where w₁ is what the sender wrote.

* `share[sender, receiver]` = Σ_q p_q · o₂_q / Σ_q ‖o₂_q‖², sums over all queries but the first; mean over prompts.
  Shares of all that is in the stream (heads, embedding, MLPs, biases) sum to 1 where values have no bias; a negative
  share works against the rest. `interval`: 95 %, over prompts.
* `looks[key, sender, receiver]`: attention of the virtual pattern to the first token; without it, to the query itself,
  1, 2 or 3 tokens back, or further back; and to earlier occurrences of the query's token. It is the mean over the
  queries that have such keys, then over prompts.
* Controls: what the sender writes, turned by a random rotation of the stream (`null`). The receiver's keys shuffled
  among those up to each query (`looks_null`), so that what it reads no longer fits what the sender brought there.
* Pairs whose receiver does not come after the sender are NaN. What the receiver would pass on if it read the sender all
  the same is in `null`, and 95 % of those shares lie in `backward`.
* Assumption: the direct path, through the values. What the sender does to the receiver's pattern (Q- and K-composition,
  `weights.composition`), and what layers in between make of it, is left out: induction heads copy the token to which a
  previous-token head points them, and pass on little of what that head writes.
* Known failures: a share is no effect: a head may pass on what nothing reads (patch the path). Trained streams have
  directions that most heads write and read, and a random rotation has none: compare with `backward`, which is
  wide where late layers write more than early ones. Where both heads rest on the first token, so does the virtual head.
  Sliding windows do not limit the shuffled keys.
* Equivalence (test): token by token, with the shares of the rest of the stream.
* Cost: one forward; for every pair, a product of two patterns for each draw. Name heads where texts are long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt, rotation
from cutaway.models import circuits
from cutaway.models.access.capture import Activations
from cutaway.models.anatomy.residual import check_sum
from cutaway.models.edits.edge_mask import head_writes
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.models.watching import in_batches
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.repeats import Repeats
from cutaway.weights.alignment import percentiles
from cutaway.weights.virtual import virtual_pattern

KEYS = ("first token", "itself", "1 back", "2 back", "3 back", "further back", "same token")
_CELLS = 1 << 25  # most numbers of what senders write at once, unless one prompt has more


@dataclass(frozen=True, kw_only=True)
class VirtualHeads(Result, kind="virtual_heads"):
    """Shares of heads' outputs that earlier heads have moved before, and where both together look.

    Attributes:
        share: the share of the receiver's output that came through the sender.
        interval: of `share`, 95 %, over prompts.
        null: `share` with what the sender writes turned at random.
        looks: attention of the virtual pattern to keys of a kind.
        looks_interval: of `looks`, 95 %, over prompts.
        looks_null: `looks` with the keys of the receiver shuffled.
        backward: the 2.5 and 97.5 percentiles of shares among pairs that cannot compose.
    """

    share: Float[Tensor, "sender receiver"]
    interval: Float[Tensor, "sender receiver bound"]
    null: Float[Tensor, "sender receiver sample"]
    looks: Float[Tensor, "key sender receiver"]
    looks_interval: Float[Tensor, "key sender receiver bound"]
    looks_null: Float[Tensor, "key sender receiver sample"]
    backward: Float[Tensor, "bound"]


@method(
    answers="Which heads pass on what earlier heads have moved, and from where?",
    paper="Elhage et al. 2021, A mathematical framework for transformer circuits",
    cost="prompts * F",
    control="rotated_basis",
    rung="observational",
)
@torch.no_grad()
def virtual_heads(
    model: Model,
    prompts: Prompts | Repeats,
    /,
    *,
    senders: tuple[str, ...] = (),
    receivers: tuple[str, ...] = (),
    samples: int = 8,
    seed: int = 0,
) -> VirtualHeads:
    """Split what heads write by the earlier heads that it came through, and follow both patterns to the source.

    Args:
        senders: heads that move first, as `layer.head` or `layer.*` [default: all].
        receivers: heads that pass on [default: all].
        samples: how many random rotations, and shuffles of keys, make the nulls.
        seed: of both.

    Raises:
        Refused: an encoder, no such head, no receiver in a later layer than a sender, prompts of one token, or heads
            whose values are not linear in the stream.
    """
    if not model.family.causal:
        raise Refused(f"virtual heads of {model.name}", "it is an encoder", "ask a causal model")
    check_sum(model)
    first, then = circuits.heads(model, senders), circuits.heads(model, receivers)
    late = torch.tensor([[(a.layer or 0) < (b.layer or 0) for b in then] for a in first])
    if not late.any():
        why = "no receiver is in a later layer than a sender"
        raise Refused(f"virtual heads of {model.name}", why, "name senders of earlier layers")
    tokens = prompts.bind(model)
    if int(tokens.lengths.max()) < 2:
        raise Refused("virtual heads", "no prompt has two tokens, and so nothing to move", "give longer ones")
    sums = _Sums.of(model, tokens, first, then, samples, seed)
    asks, of = sums.there[:, 0], sums.there.sum(0)  # each query has the first token among its keys
    own = [sums.looks[some, k] for k, some in enumerate(sums.there.T)]
    few = {k: f"{('no', 'one')[n]} prompt has such keys" for k, n in zip(KEYS, of.tolist(), strict=True) if n < 2}
    reasons = few | ({"looks": "too few prompts have keys of some kinds: those say so"} if few else {})
    reasons |= {"share": "some receivers do not come after the sender"} if not late.all() else {}
    reasons |= {"backward": "every receiver comes after every sender"} if late.all() else {}
    hidden, bounds, share = ~late, ~late[..., None], sums.share[asks]
    return VirtualHeads(
        share=share.mean(0).masked_fill(hidden, math.nan),
        interval=mean_interval(share).masked_fill(bounds, math.nan),
        null=sums.turned / of[0],
        looks=torch.stack([x.mean(0) for x in own]).masked_fill(hidden, math.nan),
        looks_interval=torch.stack([mean_interval(x, within=(0.0, 1.0)) for x in own]).masked_fill(bounds, math.nan),
        looks_null=(sums.shuffled / of[:, None, None, None]).masked_fill(bounds, math.nan),
        backward=percentiles(share.mean(0)[hidden]),
        labels={"key": [*KEYS], "sender": _names(first), "receiver": _names(then), "bound": BOUNDS},
        units={
            **dict.fromkeys(("share", "interval", "null", "backward"), "share of output"),
            **dict.fromkeys(("looks", "looks_interval", "looks_null"), "attention"),
        },
        reasons=reasons | one_prompt(int(of[0]), "share", "looks"),
        record={"controls": {"looks": "shuffled_keys"}, "prompts with keys": dict(zip(KEYS, of.tolist(), strict=True))},
    )


@dataclass(frozen=True)
class _Sums:
    """Values of every prompt, of which the fields are means.

    Attributes:
        share: the share of the receiver's output that came through the sender.
        turned: the same of what the sender writes turned at random, summed over prompts.
        looks: attention of the virtual pattern, mean over the queries that have such keys.
        shuffled: the same with the receiver's keys shuffled, summed over prompts.
        there: True where a prompt has such keys.
    """

    share: Float[Tensor, "prompt sender receiver"]
    turned: Float[Tensor, "sender receiver sample"]
    looks: Float[Tensor, "prompt key sender receiver"]
    shuffled: Float[Tensor, "key sender receiver sample"]
    there: Bool[Tensor, "prompt key"]

    @staticmethod
    def of(
        model: Model, tokens: Tokens, first: Sequence[Address], then: Sequence[Address], samples: int, seed: int
    ) -> _Sums:
        """Run the prompts batch by batch, and read all pairs; those that are no virtual head look nowhere."""
        n, pair, g = len(tokens), (len(first), len(then)), generator(seed)
        sums = _Sums(
            torch.zeros(n, *pair),
            torch.zeros(*pair, samples),
            torch.zeros(n, len(KEYS), *pair),
            torch.zeros(len(KEYS), *pair, samples),
            torch.zeros(n, len(KEYS), dtype=torch.bool),
        )
        turns, places = _turns(model, samples, g), _places(model, first, then)
        for rows in in_batches(model, tokens, _CELLS // (len(first) * tokens.ids.shape[1] * model.shape.d_model)):
            acts = model.capture(tokens.rows(rows), places, logits=False)
            some = [(b, row) for b, row in enumerate(rows) if tokens.lengths[row] > 1]
            run = {row: _Prompt.of(model, acts, b, first, samples, g) for b, row in some}
            for row, prompt in run.items():
                sums.there[row] = prompt.keys.flatten(1).any(1).cpu()
            for layer in dict.fromkeys(a.layer or 0 for a in then):
                sums._add(_Reader.of(model, acts, layer, then, turns), run, sum((a.layer or 0) < layer for a in first))
        return sums

    def _add(self, reader: _Reader, run: Mapping[int, _Prompt], before: int) -> None:
        """Add the receivers of one layer; the first `before` senders lie in front of it."""
        for row, prompt in run.items():
            share = reader.shares(prompt)
            self.share[row, :, reader.at] = share[..., 0]
            self.turned[:, reader.at] += share[..., 1:]
            if before:
                looks = reader.looks(prompt, before)
                self.looks[row, :, :before, reader.at] = looks[..., 0]
                self.shuffled[:, :before, reader.at] += looks[..., 1:]


@dataclass(frozen=True)
class _Prompt:
    """Outputs and patterns of the senders in one prompt.

    Attributes:
        index: its row in the batch.
        real: the columns of its tokens.
        written: what each sender adds to the stream.
        patterns: their patterns.
        keys: keys of each kind, over the number of queries that have any.
        order: per draw, the keys of each query shuffled; first as they are.
    """

    index: int
    real: Int[Tensor, "position"]
    written: Float[Tensor, "sender position d_model"]
    patterns: Float[Tensor, "sender q_pos k_pos"]
    keys: Float[Tensor, "key q_pos k_pos"]
    order: Int[Tensor, "draw q_pos k_pos"]

    @staticmethod
    @torch.no_grad()
    def of(
        model: Model, acts: Activations, index: int, first: Sequence[Address], samples: int, g: torch.Generator
    ) -> _Prompt:
        """Read the senders of one row of a batch."""
        real, written, patterns = acts.tokens.mask[index].nonzero()[:, 0], list[Tensor](), list[Tensor]()
        for layer in dict.fromkeys(a.layer or 0 for a in first):
            units = [a.unit for a in first if a.layer == layer]
            own = head_writes(model, layer, acts[f"z.{layer}"][index, real][None].float())[0]
            written.append(own[:, units].movedim(1, 0))
            patterns.append(acts[f"pattern.{layer}"][index, units].float()[:, real][:, :, real])
        at = torch.arange(len(real))
        drawn = torch.rand(samples, len(at), len(at), generator=g).masked_fill(at[:, None] < at, 2.0).argsort(-1)
        order = torch.cat([at.expand(1, len(at), -1), drawn]).to(real.device)
        return _Prompt(index, real, torch.cat(written), torch.cat(patterns), _keys(acts.tokens.ids[index, real]), order)


@dataclass(frozen=True)
class _Reader:
    """Patterns, outputs and weights of the receivers of one layer.

    Attributes:
        at: their places among all receivers.
        pattern: their patterns, with the padding.
        z: what their output projections read.
        out: W_O.
        values: W_V, turned by each draw; first as it is.
        scale: divisor of the norm before attention.
    """

    at: list[int]
    pattern: Float[Tensor, "prompt receiver q_pos k_pos"]
    z: Float[Tensor, "prompt position receiver d_head"]
    out: Float[Tensor, "receiver d_head d_model"]
    values: Float[Tensor, "receiver draw d_head d_model"]
    scale: Float[Tensor, "prompt position"]

    @staticmethod
    def of(
        model: Model,
        acts: Activations,
        layer: int,
        then: Sequence[Address],
        turns: Float[Tensor, "draw d_model d_model"],
    ) -> _Reader:
        """Read the receivers of one layer of a batch."""
        here = {i: a for i, a in enumerate(then) if a.layer == layer}
        units, form, z = (
            [a.unit for a in here.values()],
            circuits.ov(model, [*here.values()]),
            acts[f"z.{layer}"].float(),
        )
        normed = f"ln1.scale.{layer}" in acts
        scale = acts[f"ln1.scale.{layer}"].float() if normed else z.new_ones(z.shape[:2])
        values = form.left.to(turns).mT[:, None] @ turns
        pattern = acts[f"pattern.{layer}"][:, units].float()
        return _Reader(
            [*here], pattern, z[:, :, units], model.weights.o[layer][units].detach().to(z), values.to(z.device), scale
        )

    def shares(self, prompt: _Prompt) -> Float[Tensor, "sender receiver draw"]:
        """Return the shares of the receivers' outputs that came through the senders."""
        z, pattern = self.z[prompt.index, prompt.real][1:], self.pattern[prompt.index][:, prompt.real][:, 1:]
        back = torch.einsum("qhe,hed,hfd->hqf", z, self.out, self.out)  # outputs as values see them
        asked = torch.einsum("hqm,hqf->hmf", pattern[:, :, prompt.real], back)
        asked = asked / self.scale[prompt.index, prompt.real][:, None]
        read = torch.einsum("hmf,hsfd->hsmd", asked, self.values)
        through = prompt.written.flatten(1) @ read.flatten(0, 1).flatten(1).T
        return (through.unflatten(1, read.shape[:2]) / torch.einsum("qhf,hqf->h", z, back)[:, None]).cpu()

    def looks(self, prompt: _Prompt, before: int) -> Float[Tensor, "key sender receiver draw"]:
        """Return the attention of the virtual patterns to keys of every kind, by shuffle of the receivers' keys."""
        own, kinds = self.pattern[prompt.index][:, prompt.real][:, :, prompt.real], prompt.keys.flatten(1).T
        size, found = max(1, _CELLS // own.numel()), list[Tensor]()
        for order in prompt.order:
            then = own.gather(-1, order.expand_as(own))[:, None]  # [receiver, 1, q_pos, m]
            parts = (virtual_pattern(a, then).flatten(2) @ kinds for a in prompt.patterns[:before].split(size))
            found.append(torch.cat(list(parts), 1))
        return torch.stack(found, -1).permute(2, 1, 0, 3).cpu()


def _keys(ids: Int[Tensor, "position"]) -> Float[Tensor, "key q_pos k_pos"]:
    """Return the keys of each kind, over the number of queries that have any."""
    at = torch.arange(len(ids), device=ids.device)
    back, first = at[:, None] - at, (at == 0).expand(len(at), -1)
    near = [(back == n) & ~first for n in range(4)]
    kinds = [first, *near, (back > 3) & ~first, (back > 0) & (ids[:, None] == ids)]
    every = torch.stack(kinds) & (at > 0)[:, None]
    return every / every.any(-1).sum(-1).clamp_min(1)[:, None, None]


def _turns(model: Model, samples: int, g: torch.Generator) -> Float[Tensor, "draw d_model d_model"]:
    """Return random rotations of the dimensions that readers see, as matrices of the stream; first the identity."""
    d, n = model.shape.d_model, circuits.dims(model)
    seen = torch.linalg.qr(torch.cat([torch.ones(d, 1), torch.eye(d)[:, 1:]], 1))[0][:, d - n :]
    drawn = seen @ rotation(n, g, samples=(samples,)) @ seen.T
    return torch.cat([torch.eye(d)[None], drawn])


def _places(model: Model, first: Sequence[Address], then: Sequence[Address]) -> list[str]:
    """Return the activations that are read."""
    heads = sorted({a.layer or 0 for a in (*first, *then)})
    norms = sorted({a.layer or 0 for a in then}) if circuits.readable(model).is_folded else []
    return [f"{s}.{i}" for s in ("z", "pattern") for i in heads] + [f"ln1.scale.{i}" for i in norms]


def _names(places: Sequence[Address]) -> list[str]:
    return [f"{a.layer}.{a.unit}" for a in places]
