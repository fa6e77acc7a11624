"""BatchTopK: the k · tokens largest pre-activations of a batch are active."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.gates.jumprelu import JumpRelu
from cutaway.dictionaries.gates.shared.gate import EncoderGate, Gate, positive, within
from cutaway.dictionaries.gates.shared.train_gate import (
    Chosen,
    Own,
    TrainGate,
    positive_values,
)
from cutaway.dictionaries.kernels import topk as select
from cutaway.dictionaries.kernels.reduce import ALONE, Across
from cutaway.dictionaries.kernels.topk import Encoder
from cutaway.dictionaries.objectives.active import Active


@dataclass(frozen=True, eq=False)
class BatchTopK(EncoderGate):
    """The k · tokens largest max(π, 0) of the batch; with a `threshold`, π where π > threshold instead.

    (Bussmann et al. 2024, arXiv:2412.06410.) The threshold is what training found the smallest kept value to be; with
    it a token's code does not depend on its batch.
    """

    k: int
    threshold: float | None = None

    def __post_init__(self) -> None:
        positive(self, self.k)

    @property
    def whole_batch(self) -> bool:
        return self.threshold is None

    def with_threshold(self, least: float) -> BatchTopK:
        return self if self.threshold is not None else replace(self, threshold=least)

    def per_latent(self, n_latents: int, dtype: torch.dtype, device: torch.device) -> Gate:
        if self.threshold is None:
            return self
        return JumpRelu(torch.full((n_latents,), self.threshold, dtype=dtype, device=device))

    def apply(self, pre: Float[Tensor, "token latent"]) -> SparseCode:
        kept = pre.relu()
        if self.threshold is not None:
            return SparseCode.from_dense(kept * (pre > self.threshold))
        flat = kept.reshape(-1)
        entry = flat.topk(within(self, self.k, pre) * len(pre), sorted=False).indices
        value = flat[entry]
        active = value != 0
        entry = entry[active]
        n = pre.shape[1]
        return SparseCode.of_entries(entry // n, entry % n, value[active], (len(pre), n))


@dataclass(frozen=True)
class TrainBatchTopK(TrainGate):
    """The k · tokens largest of the batch; a running mean of the smallest one becomes the threshold.

    The mean is over about the last tenth of the run so far, and never over much more than 1 / (1 − keep) batches.
    """

    fixed: ClassVar = True
    k: int
    keep: float = 0.999

    def buffers(self) -> dict[str, Tensor]:
        return {"floor": torch.zeros(()), "batches": torch.zeros((), dtype=torch.int64)}

    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        return self.choose_shard(x, encoder, own, ALONE, len(encoder.w))

    def choose_shard(self, x: Tensor, encoder: Encoder, own: Own, across: Across, n_latents: int) -> Chosen:
        pairs, value, _ = select.batch_top_k(x, encoder, self.k * len(x), 0.75 * float(own["floor"]), across)
        return Chosen(pairs, value)

    def learned(self, active: Active, scale: Tensor | None, own: Own, across: Across = ALONE) -> None:
        value = active.value.detach() if scale is None else active.value.detach() * active.at(scale)
        none = value.new_tensor(torch.inf)
        least = across.least(torch.cat([torch.where(value > 0, value, none).reshape(-1), none[None]]).min())
        if not least.isinf():
            share = max(1 - self.keep, 10 / (10 + int(own["batches"])))
            own["floor"].lerp_(least, share)
            own["batches"].add_(1)

    def active(self, pre: Tensor, chosen: Chosen | None, tokens: int, own: Own) -> Active:
        return positive_values(pre, chosen, tokens)

    def gate(self, own: Own) -> BatchTopK:
        return BatchTopK(self.k, float(own["floor"]))

    @classmethod
    def like(cls, gate: BatchTopK | JumpRelu, k: int) -> TrainBatchTopK:
        return cls(gate.k if isinstance(gate, BatchTopK) else k)
