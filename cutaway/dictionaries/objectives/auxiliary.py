"""Further reconstructions beside the main one: of the error by silent latents, from prefixes, from wider codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cutaway.dictionaries.kernels.sparse import Pairs
from cutaway.dictionaries.kernels.sparse_matmul import dense_read, read, write
from cutaway.dictionaries.kernels.topk import Encoder, top_k
from cutaway.dictionaries.objectives.active import tangential
from cutaway.dictionaries.objectives.term import Part, Pass, Term

_DENSE = 0.02  # share of the silent latents from which all of them are computed


@dataclass(frozen=True)
class AuxK(Term):
    """‖e − ê‖² / ‖e‖², in units of the targets' variance, with ê the error's reconstruction by silent latents.

    The k largest pre-activations among latents that were not active for `after` tokens (None: ten million, or a
    twentieth of the run if that is less); e is held fixed, and b_dec has no part in ê (Gao et al. 2024,
    arXiv:2406.04093).
    """

    needs: ClassVar[str | None] = "encoder"
    weight: float = 1 / 32
    rise: float = 0.0
    k: int = 256
    after: int | None = None

    def of(self, p: Pass) -> Tensor:
        return sum((self._of(part, self.after or p.silent_after) * p.variance for part in p.parts), torch.zeros(()))

    def _of(self, part: Part, after: int) -> Tensor:
        silent = (part.silent >= after).nonzero()[:, 0]
        n = part.across.number(len(silent))
        if n == 0:
            return torch.zeros(())
        error = (part.target - part.out).detach()
        w_enc, b_enc, w_dec = (t.index_select(0, silent) for t in (part.w_enc, part.b_enc, part.w_dec))
        k, own = min(self.k, n), min(self.k, len(silent))
        if k > _DENSE * n:
            pre = dense_read(part.x, w_enc, b_enc, part.p).relu()
            if k < n:
                value, index = pre.detach().topk(own, sorted=False)
                pre = pre * torch.zeros_like(pre).scatter_(1, index, part.across.largest(value, k))
            guess = pre @ (tangential(w_dec) if part.unit else w_dec)
        else:
            with torch.no_grad():
                x = part.x if part.p is None else part.x - part.p
                index, value = top_k(x, Encoder(w_enc.detach(), b_enc.detach()), own)
                value = value * part.across.largest(value, k)
            pairs = Pairs.fixed(index, len(silent))
            pre = read(part.x, w_enc, b_enc, part.p, pairs, value.reshape(-1))
            guess = write(pre.relu(), w_dec, pairs, part.unit)
        missed, all_of_it = (e.pow(2).sum() / len(e) for e in (error - part.across.latents(guess), error))
        return missed / part.across.tokens(all_of_it).clamp(min=1e-12)


@dataclass(frozen=True)
class Matryoshka(Term):
    """Squared errors of reconstructions from the first widths[i] latents, added to that of the whole.

    (Bussmann et al. 2025, arXiv:2503.17547.) The latents of a prefix must explain the input without those behind them.
    """

    widths: tuple[int, ...]
    weight: float = 1.0
    rise: float = 0.0

    def of(self, p: Pass) -> Tensor:
        losses = [
            (part.target - out).pow(2).sum() / len(out)
            for part, nested in zip(p.parts, p.nested, strict=True)
            for out in nested[:-1]
        ]
        return sum(losses, torch.zeros(()))


@dataclass(frozen=True)
class MultiTopK(Term):
    """The squared error of the wider code of a TopK gate trained with `wide` (Gao et al. 2024)."""

    needs: ClassVar[str | None] = "wide"
    weight: float = 1 / 8
    rise: float = 0.0

    def of(self, p: Pass) -> Tensor:
        losses = []
        for part in p.parts:
            wide = part.across.latents(part.active.decode(part.active.more["wide"], part.w_dec, part.unit))
            losses.append((part.target - (part.out - part.own) - wide).pow(2).sum() / len(wide))
        return sum(losses, torch.zeros(()))


@dataclass(frozen=True)
class OpenGate(Term):
    """The loss of a gated dictionary: Σ ReLU(π_gate) n, and the squared error of decoding ReLU(π_gate), decoder fixed.

    (Rajamanoharan et al. 2024, arXiv:2404.16014.) `weight` multiplies the sparsity, the squared error has weight one.
    """

    needs: ClassVar[str | None] = "opened"
    weight: float
    rise: float = 0.05

    def now(self, done: float) -> float:
        return 1.0

    def of(self, p: Pass) -> Tensor:
        losses = []
        for part in p.parts:
            opened, norms = part.active.more["opened"], part.norms()
            sized = opened if norms is None else opened * part.active.at(norms)
            rest = (part.out - part.own).detach()
            error = part.target - rest - part.across.latents(part.active.decode(opened, part.w_dec.detach()))
            opening = part.across.latents(sized.sum()) / part.active.tokens
            losses.append(super().now(p.done) * opening + error.pow(2).sum() / len(error))
        return sum(losses, torch.zeros(()))
