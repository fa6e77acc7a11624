"""End-to-end training: whole contexts as a source, and how far the model's answers move when it is spliced.

Shuffled single tokens cannot be run through a model, so the source here yields contexts whole, with the model's own
answers; `Divergence` runs the model once more with the reconstruction in place and hands gradients back to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from cutaway.core.address import parse
from cutaway.core.cursor import Rounds
from cutaway.core.record import hash_tensors
from cutaway.core.refuse import Refused
from cutaway.models.access import forward, taps
from cutaway.models.access.capture import Collector
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.streams.batch import Batch

Answer = Literal["kl", "ce"]


@dataclass(frozen=True)
class WholeBatch:
    """Contexts, the activations of their tokens one after the other, and what the model makes of them."""

    acts: dict[str, Float[Tensor, "token _"]]
    ids: Int[Tensor, "row position"]
    logits: Float[Tensor, "row position vocabulary"]
    later: dict[str, Float[Tensor, "row position _"]]
    shapes: dict[str, tuple[int, ...]]  # of the activations of one token, which may have heads
    context: Int[Tensor, "row"]  # the number of each

    def tokens(self) -> Batch:
        """Return the same as a batch of tokens; a context is a document of its own."""
        number = self.context[:, None].expand_as(self.ids).flatten()
        position = torch.arange(self.ids.shape[1]).expand_as(self.ids).flatten()
        mask = torch.ones_like(number, dtype=torch.bool)
        return Batch(self.acts, self.ids.flatten(), number, number, position, mask)


class Whole(Rounds):
    """Contexts of one length through the model, shuffled again in every round, without end."""

    SIZE = "rows"

    def __init__(
        self,
        model: Model,
        ids: Int[Tensor, "row position"],
        sites: tuple[str, ...],
        *,
        later: tuple[str, ...] = (),
        rows: int = 8,
        seed: int = 0,
    ):
        if not 1 <= rows <= len(ids):
            raise Refused(f"batches of {rows} contexts", f"there are {len(ids)}", "give as many, or fewer a batch")
        super().__init__(len(ids), rows, seed)
        self.model, self.ids, self.sites, self.later = model, ids, sites, later

    def __next__(self) -> WholeBatch:
        chosen = self.indices()
        t = whole(self.ids[chosen], self.model)
        found = self.model.capture(t, [*self.sites, *self.later, "logits"])
        acts = {s: found[s].flatten(2).flatten(0, 1) for s in self.sites}
        shapes = {s: tuple(found[s].shape[2:]) for s in self.sites}
        return WholeBatch(acts, t.ids, found["logits"], {s: found[s].flatten(2) for s in self.later}, shapes, chosen)

    def identity(self) -> dict[str, Any]:
        """Return the model and contexts."""
        return {"kind": "whole contexts", "model": self.model.identity(), "ids": hash_tensors({"ids": self.ids})}


@dataclass(frozen=True)
class Divergence:
    """Change of the model's predictions when reconstructions replace the sites written; for `Spliced`.

    `answer` "kl" is KL(model ‖ spliced) of the next-token distributions, in nats per token; "ce" the loss on the text.
    `later` adds the mean squared error, relative to the variance, at the source's later sites (Braun et al. 2024).
    """

    model: Model
    answer: Answer = "kl"
    later: float = 0.0

    def __call__(self, outs: Mapping[str, Tensor], batch: WholeBatch) -> Tensor:
        """Return the divergence, differentiable by the reconstructions."""
        anatomy, t = self.model.anatomy, whole(batch.ids, self.model)
        edits = [Replace(s, y.view(*batch.ids.shape, *batch.shapes[s])) for s, y in outs.items()]
        collector = Collector(anatomy, [parse(s) for s in batch.later], live=True) if self.later else None
        with torch.enable_grad(), self.model.edited(*edits), ExitStack() as stack:
            if collector is not None:
                sees = {p: collector.see(p) for p in collector.places}
                stack.enter_context(taps.attached(anatomy, sees, gradient=True))
            logits = forward.all_logits(anatomy, t).float()
        loss = self._answered(logits, batch)
        for a, found in (collector.found if collector is not None else {}).items():
            true = batch.later[str(a)]
            error = (found.flatten(2) - true).pow(2).mean()
            loss = loss + self.later * error / (true - true.mean((0, 1))).pow(2).mean()
        return loss

    def _answered(self, logits: Tensor, batch: WholeBatch) -> Tensor:
        if self.answer == "ce":
            return cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten())
        own, true = logits.log_softmax(-1).flatten(0, 1), batch.logits.float().log_softmax(-1).flatten(0, 1)
        return kl_div(own, true, log_target=True, reduction="batchmean")


def whole(ids: Int[Tensor, "row position"], model: Model) -> Tokens:
    """Return the contexts without padding, as the model takes them."""
    n = len(ids)
    return model.tokens(Tokens(ids, torch.ones_like(ids, dtype=torch.bool), ("",) * n, ((),) * n, ((),) * n))
