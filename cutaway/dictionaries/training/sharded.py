"""A dictionary in training over several processes, each with a shard of the latents and a part of the tokens.

The steps are those of `Learner`; this adds the exchanges (`training/mesh.py`). Rows of encoder, decoder, biases,
thresholds, their optimiser state and the counters of silent latents belong to one shard; b_dec and skips are held by
all, and their gradients are completed so that all hold the same bits. The numbers are those of one process up to the
order in which float32 sums are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from cutaway.core.refuse import Keyword, Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.gates import Chosen
from cutaway.dictionaries.kernels.topk import Encoder
from cutaway.dictionaries.objectives import Pass, Spliced
from cutaway.dictionaries.objectives.active import Active
from cutaway.dictionaries.training.learner import Learner, Report, SiteMoments
from cutaway.dictionaries.training.mesh import LatentShards, flat_sum, per_latent
from cutaway.dictionaries.training.recipe import Recipe


class ShardedLearner(Learner):
    """A dictionary in training of which this process holds a shard of the latents.

    Every process of the mesh makes one and calls the same methods in the same order; `step` is given the whole batch.
    """

    def __init__(self, recipe: Recipe, moments: SiteMoments, shards: LatentShards, silent_after: int = 10_000_000):
        _check(recipe, shards)
        self.across = self.shards = shards
        self._inner: dict[str, Tensor] = {}  # b_dec as encoders subtract it: its gradient there is a shard's own
        super().__init__(recipe, moments, shards.device, silent_after)

    def step(self, acts: Mapping[str, Tensor], rate: float, done: float, batch: Any = None) -> Report | None:
        return super().step(self.shards.take(acts), rate, done, batch)

    def forward(self, acts: Mapping[str, Tensor], done: float = 1.0, batch: Any = None) -> Pass:
        sites = self.recipe.reads if self.recipe.subtract else ()
        self._inner = {s: self.weights[f"b_dec.{s}"].detach().requires_grad_() for s in sites}
        return super().forward(acts, done, batch)

    def losses(self, p: Pass) -> tuple[Report, Tensor]:
        """Return the report of all tokens, and this replica's share of the loss."""
        own, loss = super().losses(p)
        share, alike = self.shards.share, 1 / self.shards.count
        numbers = [own.loss * share, own.error, own.deviation, *(t * share for t in own.terms.values())]
        sums = torch.stack([t.to(self.shards.device, torch.float64) * alike for t in numbers] + [own.active.double()])
        total, error, deviation, *terms, active = self.shards.summed(sums)
        return Report(total, error, deviation, active, dict(zip(own.terms, terms, strict=True))), loss * share

    def dictionary(self, **about: Any) -> Dictionary:
        """Return the whole dictionary, on the processor of every process."""
        whole = copy(self)
        whole.weights = {n: self._whole(n, w.detach()) for n, w in self.weights.items()}
        whole.buffers = {n: self._whole(n, b) for n, b in self.buffers.items()}
        return Learner.dictionary(whole, **about)

    def silent(self) -> float:
        own = [self.buffers[f"silent.{b}"] >= self.silent_after for b in range(len(self.recipe.blocks))]
        count = self.shards.summed(torch.cat(own).sum(), "latent")
        return float(count) / sum(block.n_latents for block in self.recipe.blocks)

    # --- parts of a step

    def _gradients(self, loss: Tensor) -> dict[str, Tensor]:
        asked = [*self.weights.values(), *self._inner.values()]
        found = iter(torch.autograd.grad(loss, asked, allow_unused=True))
        own = {n: g for n, g in zip(self.weights, found, strict=False) if g is not None}
        shared = {n: g / self.shards.count for n, g in own.items() if not per_latent(n, g)}
        for site, g in zip(self._inner, found, strict=True):
            if g is not None:
                shared[f"b_dec.{site}"] = shared[f"b_dec.{site}"] + g
        if shared:
            shared = dict(zip(shared, flat_sum(list(shared.values()), self.shards), strict=True))
        return {n: shared[n] if n in shared else self.shards.summed(g, "data") for n, g in own.items()}

    def _p(self, b: int) -> Tensor | None:
        if not self.recipe.subtract:
            return None
        held = [self._inner.get(s, self.weights[f"b_dec.{s}"]) for s in self.recipe.blocks[b].reads]
        return held[0] if len(held) == 1 else torch.cat(held)

    def _chosen(self, b: int, centred: Tensor, encoder: Encoder) -> Chosen:
        n_latents = self.recipe.blocks[b].n_latents
        return self.recipe.gating.choose_shard(centred, encoder, self._own(b), self.shards, n_latents)

    def _prefixes(self, b: int) -> tuple[int, ...]:
        start, end = self.shards.bounds(self.recipe.blocks[b].n_latents)
        return tuple(min(max(w, start), end) - start for w in self.recipe.prefixes)

    def _decoded(self, b: int, active: Active) -> list[Tensor]:
        steps = super()._decoded(b, active)
        return list(self.shards.latents(torch.stack(steps)).unbind(0))

    def _notice(self, b: int, active: Active) -> None:
        self.recipe.gating.learned(active, self._scale(b), self._own(b), self.shards)
        fires = self.shards.summed(active.fires, "data")
        silent = self.buffers[f"silent.{b}"]
        silent.add_(self.shards.all).masked_fill_(fires > 0, 0)
        if not self.recipe.gating.fixed:
            count = self.shards.summed(fires.sum(), "latent")
            self._reform(b, float(count) / (self.shards.all * self.recipe.blocks[b].n_latents))

    def _start(self) -> None:
        """The start of one process, of which the own rows are kept."""
        super()._start()
        for held in (self.weights, self.buffers):
            for n, t in held.items():
                if per_latent(n, t):
                    start, end = self.shards.bounds(len(t))
                    held[n] = t[start:end].clone()

    def _whole(self, name: str, t: Tensor) -> Tensor:
        if not per_latent(name, t):
            return t.cpu().clone()
        return self.shards.whole(t, self.recipe.blocks[int(name.split(".")[1])].n_latents)


def _check(recipe: Recipe, shards: LatentShards) -> None:
    """Refuse what cannot be spread so."""
    if not recipe.gating.encodes:
        why = "each of its steps needs the best latent of all processes"
        raise Refused(f"{recipe.gating.name} over {shards.count} processes", why, "train it in one")
    k = int(getattr(recipe.gating, "k", 1))
    for block in recipe.blocks:
        size = -(-block.n_latents // shards.count)
        least = block.n_latents - size * (shards.count - 1)
        if least < k:
            why = f"a shard has {max(least, 0)} latents, and needs {k}"
            raise Refused(f"{block.n_latents} latents over {shards.count} processes", why, "use fewer, or replicas")
        recipe.gating.check(block.n_latents, size)
    if shards.replicas > 1 and any(isinstance(t, Spliced) for t in recipe.terms):
        why = "the model needs the reconstruction of every token"
        raise Refused(
            "an end-to-end objective over replicas", why, ("spread the latents alone, ", Keyword("replicas", 1))
        )
