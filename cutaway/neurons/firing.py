"""Activations of one neuron at every token of texts, beside those of random others of its layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.stats import DECILES, deciles, matched_random, ratio_interval
from cutaway.interventions.ablation_values import removals
from cutaway.interventions.span_losses import span_losses
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.models.watching import watched
from cutaway.neurons import contexts, memories
from cutaway.neurons.memories import Neuron

SPANS = ["largest decile", "between", "smallest decile"]


@dataclass(frozen=True)
class Firing:
    """Activations of a neuron, and of random others of its layer, at the tokens of texts.

    Attributes:
        neurons: the neuron, then the others.
        tokens: the texts.
        halves: the tokens of every second text, and of the others: without first, special and last ones.
        where: the tokens of both halves.
        acts: activations of each of the neurons.
        decile: decile of each token of `where`, by activation, for each of the neurons.
    """

    neurons: list[Neuron]
    tokens: Tokens
    halves: list[Bool[Tensor, "batch position"]]
    where: Bool[Tensor, "batch position"]
    acts: Float[Tensor, "unit batch position"]
    decile: Int[Tensor, "unit token"]

    @staticmethod
    def of(model: Model, tokens: Tokens, neuron: Neuron, samples: int, seed: int) -> Firing:
        """Run texts once.

        Raises:
            Refused: texts without a token between others, or a layer that has no other neuron.
        """
        layer, own = neuron
        others = [n for (n,) in matched_random([own], model.shape.d_mlp, seed=seed, samples=samples)]
        halves, units = contexts.halves(model, tokens), [own, *others]
        acts = torch.empty(len(units), *tokens.ids.shape)
        for rows in memories.batches(model, tokens):

            def see(x: Tensor, rows: list[int] = rows) -> Tensor:
                acts[:, rows] = x.detach()[..., units].float().cpu().permute(2, 0, 1)
                return x

            watched(model, tokens.rows(rows), {Address("mlp_post", layer): see})
        where = halves[0] | halves[1]
        ranked = torch.stack([deciles(x[where]) for x in acts])
        return Firing([(layer, n) for n in units], tokens, halves, where, acts, ranked)

    @property
    def values(self) -> Float[Tensor, "unit token"]:
        """The activations at the tokens of `where`."""
        return self.acts[:, self.where]

    @property
    def places(self) -> Int[Tensor, "token"]:
        """The tokens of `where`, counted through the padded batch."""
        return self.where.flatten().nonzero()[:, 0]

    def by_text(self, x: Float[Tensor, "token *cell"]) -> Float[Tensor, "text *cell"]:
        """Return the sums over the tokens of each text that has any."""
        text = self.where.nonzero()[:, 0].unique(return_inverse=True)[1]
        return torch.zeros(int(text.max()) + 1, *x.shape[1:]).index_add_(0, text, x)

    def strength(self) -> tuple[Float[Tensor, "decile"], Float[Tensor, "decile bound"], Float[Tensor, "decile unit"]]:
        """Return the mean activation of each decile, its interval over texts, and those of the other neurons."""
        member = torch.nn.functional.one_hot(self.decile, DECILES).float()  # [unit, token, decile]
        mean = (self.values[..., None] * member).sum(1) / member.sum(1)
        sums, count = self.by_text(self.values[0, :, None] * member[0]), self.by_text(member[0])
        return mean[0], ratio_interval(sums, count), mean[1:].T.contiguous()

    def extremes(self, k: int, flip: float) -> tuple[Float[Tensor, "half rank one"], Int[Tensor, "half rank one"]]:
        """Return the largest activations of each half, or the smallest with `flip` −1, and their places; NaN and −1 of
        a half without tokens.
        """
        found, places = torch.full((2, k, 1), torch.nan), torch.full((2, k, 1), -1)
        for h, half in enumerate(self.halves):
            if bool(half.any()):
                best = (self.acts[0][half] * flip).topk(k)
                found[h, :, 0] = best.values * flip
                places[h, :, 0] = half.flatten().nonzero()[best.indices, 0]
        return found, places

    def without(
        self, model: Model
    ) -> tuple[Float[Tensor, "span"], Float[Tensor, "span bound"], Float[Tensor, "span unit"]]:
        """Return the rise of the loss in nats at the tokens of each span if the neuron stays at its mean, its interval
        over texts, and the rise of each other neuron at the tokens of its own spans.
        """
        marks = self._spans().flatten(0, 1)  # a span of every neuron after the other: [span, prompt, position]

        def spans(tokens: Tokens, prompt: Int[Tensor, "row"]) -> Sequence[Bool[Tensor, "row column"]]:
            at = tokens.position_ids
            mine = marks.to(at.device)[:, prompt].gather(2, at.expand(len(marks), *at.shape))
            return [*(mine & tokens.mask)]

        gone = removals(model, self.tokens, [[Address("mlp_post", i, n)] for i, n in self.neurons], "mean")
        sums = span_losses(model, self.tokens, spans, [[], *gone]).unflatten(2, (-1, len(SPANS)))
        units = range(len(self.neurons))
        rise = torch.stack([sums[1 + u, :, u, :, 0] - sums[0, :, u, :, 0] for u in units])  # [unit, prompt, span]
        count = torch.stack([sums[0, :, u, :, 2] for u in units])
        mean = rise.sum(1) / count.sum(1)
        return mean[0], ratio_interval(rise[0], count[0]), mean[1:].T.contiguous()

    def _spans(self) -> Bool[Tensor, "unit span prompt position"]:
        last, d = DECILES - 1, self.decile
        own = torch.stack([d == last, (d > 0) & (d < last), d == 0], 1)  # [unit, span, token]
        there = self.where.new_zeros(*own.shape[:2], *self.where.shape)
        there[..., self.where] = own
        columns = self.tokens.column(0).cpu()[:, None] + torch.arange(self.where.shape[1])
        inside = columns < self.where.shape[1]
        return there.gather(3, columns.clamp_max(self.where.shape[1] - 1).expand_as(there)) & inside
