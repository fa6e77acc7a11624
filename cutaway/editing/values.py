"""The value that makes a model say the new object: a change of one activation at the subject's end, by gradients.

δ is added at the subject's last token in every context. It minimises, by Adam with steps in units of the mean size of
the activation's entries,

    −mean log p(new object | context, prompt) + kl · KL(p ‖ p_δ after "{subject} is a") + ½ ‖δ‖² / ‖v₀‖²

within ‖δ‖ ≤ clamp · ‖v₀‖, and stops where the mean log-probability of the object per token exceeds log 0.95. The
published code takes its KL at the subject's last token, not behind "is a", and a penalty ‖δ‖ / ‖v₀‖², which has a unit;
both are mended here. A request whose prompt itself is "{subject} is a" has no such term. Several requests are optimised
side by side, each for itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.progress import part
from cutaway.editing.places import Case
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.dry import some
from cutaway.models.edits.library import Add
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens, batch, continued
from cutaway.tasks.continuations import log_probs

_SURE = math.log(0.95)  # mean log-probability per token at which a request is done
_DECAY = 0.5
_ROWS = 96  # of one batch


@dataclass(frozen=True)
class Search:
    """Settings of the search for a value.

    Attributes:
        steps: the most steps of Adam.
        rate: size of a step, in units of the root mean square of the activation.
        kl: weight of the KL divergence on "{subject} is a".
        clamp: the longest δ, in units of the activation's norm.
    """

    steps: int
    rate: float
    kl: float
    clamp: float


@dataclass(frozen=True)
class Found:
    """Values found for requests.

    Attributes:
        start: v₀, the activation at the subject's end of the bare prompt, in float64.
        delta: δ, in float64.
        log_prob: mean log-probability of the new object per token and context, at the best step seen.
    """

    start: Float[Tensor, "case d_model"]
    delta: Float[Tensor, "case d_model"]
    log_prob: Float[Tensor, "case"]


def values(model: Model, cases: Sequence[Case], place: Address, search: Search) -> Found:
    """Search the value of every request at a place."""
    size = max(1, _ROWS // (1 + max(len(c.prompt.tokens) for c in cases)))
    groups = [cases[i : i + size] for i in range(0, len(cases), size)]
    parts = []
    for i, group in enumerate(groups):
        with part(i, len(groups)):
            parts.append(_Together(model, group, place, search).run())
    return Found(*(torch.cat([getattr(p, n) for p in parts]) for n in ("start", "delta", "log_prob")))


class _Together:
    """Requests whose rows run in one batch: every context of every prompt, and behind them each "{subject} is a"."""

    def __init__(self, model: Model, cases: Sequence[Case], place: Address, search: Search):
        self.model, self.cases, self.place, self.search = model, cases, place, search
        placed = [*(c.prompt for c in cases), *(c.essence for c in cases)]
        counts = [len(p.tokens) for p in placed]
        self.case = torch.tensor([i % len(cases) for i, n in enumerate(counts) for _ in range(n)])
        self.essence = torch.arange(len(self.case)) >= sum(counts[: len(cases)])
        rows = [ids[mask].tolist() for p in placed for ids, mask in zip(p.tokens.ids, p.tokens.mask, strict=True)]
        texts = [t for p in placed for t in p.tokens.texts]
        objects = [[cases[int(i)].new] for i in self.case]
        self.tokens: Tokens = model.tokens(continued(batch(rows, texts=texts), objects))
        self.at = torch.cat([p.last for p in placed])
        own = torch.tensor([c.request.prompt != c.essence.tokens.texts[0] for c in cases])  # else the two would fight
        self.weight = torch.where(own, search.kl, 0.0)[self.case]
        self.target: Tensor | None = None

    def run(self) -> Found:
        """Search, and return each request's δ of the last step it took."""
        d = self.model.shape.d_model
        start = self._start()
        delta = torch.zeros(len(self.cases), d)
        scale, bound = start.norm(dim=1).float(), self.search.clamp * start.norm(dim=1).float()
        optimiser = torch.optim.Adam([delta], lr=self.search.rate)
        open_, log_prob = torch.ones(len(self.cases), dtype=torch.bool), torch.full((len(self.cases),), -math.inf)
        for _ in some(range(self.search.steps), 1):
            said, slope = self._gradient(delta)
            log_prob = torch.where(open_, said, log_prob)
            open_ &= log_prob < _SURE
            if not bool(open_.any()):
                break
            delta.grad = slope + 2 * _DECAY * delta / scale[:, None].square()
            before = delta.clone()
            optimiser.step()
            step = (delta - before) * (scale / math.sqrt(d))[:, None]
            moved = before + torch.where(open_[:, None], step, 0.0)
            delta.copy_(moved * (bound / moved.norm(dim=1).clamp_min(1e-12)).clamp_max(1.0)[:, None])
        else:
            log_prob = torch.where(open_, self._gradient(delta)[0], log_prob)
        return Found(start, delta.double(), log_prob)

    def _start(self) -> Float[Tensor, "case d_model"]:
        seen = self.model.capture(self.tokens, self.place, logits=False)[str(self.place)]
        own = seen[torch.arange(len(seen)), self.at.to(seen.device)].double().cpu()
        first = [int((self.case == i).nonzero()[0]) for i in range(len(self.cases))]
        return own[first]

    def _gradient(self, delta: Float[Tensor, "case d_model"]) -> tuple[Tensor, Tensor]:
        """Return the mean log-probability of each object per token, and the gradient of the loss by each δ."""
        rows = torch.arange(len(self.case))
        vector = torch.zeros(*self.tokens.ids.shape, delta.shape[1])
        vector[rows, self.at] = delta[self.case]
        said = torch.zeros(len(self.case))
        contexts = torch.bincount(self.case[~self.essence], minlength=len(self.cases)).float()
        lengths = torch.tensor([len(c.new) for c in self.cases]).float()

        def loss(seen: Seen, prompt: Tensor) -> Tensor:
            assert seen.continuations is not None
            device = seen.continuations.logits.device
            each = log_probs(seen.continuations)[:, 0] / lengths[self.case].to(device)
            said.copy_(each.detach().float().cpu())
            now = seen.continuations.logits[:, 0].float().log_softmax(-1)
            self.target = now.detach() if self.target is None else self.target
            kl = (self.target.exp() * (self.target - now)).sum(-1)
            essence, weight = self.essence.to(device), self.weight.to(device)
            return torch.where(essence, weight * kl, -each / contexts[self.case].to(device))

        measure = Measure(loss, Reads(last_logits=False, continuations=True))
        edit = Add(self.place, vector.to(self.tokens.ids.device))
        _, slopes, _ = self.model.gradients(self.tokens, self.place, measure, edit)
        own = slopes[str(self.place)].float().cpu()[rows, self.at]
        total = torch.zeros_like(delta).index_add_(0, self.case, own)
        mean = torch.zeros(len(self.cases)).index_add_(0, self.case[~self.essence], said[~self.essence]) / contexts
        return mean, total
