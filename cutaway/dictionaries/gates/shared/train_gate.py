"""The gate in training: which pairs it uses, what their values are, and which frozen gate it ends as.

A `TrainGate` is frozen numbers. The tensors that it learns (`parameters`) and those that it keeps (`buffers`) are held
by the learner and handed in as `own`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor

from cutaway.dictionaries.gates.shared.gate import Gate
from cutaway.dictionaries.kernels import topk as select
from cutaway.dictionaries.kernels.reduce import ALONE, Across
from cutaway.dictionaries.kernels.sparse import Pairs
from cutaway.dictionaries.kernels.topk import Encoder
from cutaway.dictionaries.objectives import AuxK, Term
from cutaway.dictionaries.objectives.active import Active

Own = Mapping[str, Tensor]


class Chosen(NamedTuple):
    """The pairs that may be active or get a gradient.

    Attributes:
        pairs: the pairs.
        value: their pre-activations [entry], if they are known already.
        inner: 1 for the pairs [entry] that are in the code, where more are chosen than that; None if not known yet.
    """

    pairs: Pairs
    value: Tensor | None = None
    inner: Tensor | None = None


@dataclass(frozen=True)
class Flags:
    """Settings of a gate as the command line gives them; None where a flag was not given (k has a default)."""

    k: int
    wide: int | None = None
    penalty: float | None = None
    penalty_kind: str | None = None
    l0: float | None = None

    def weight(self, usual: float) -> float:
        """Return the weight of the penalty, or the usual one if none was given."""
        return usual if self.penalty is None else self.penalty


class TrainGate(ABC):
    """A gate in training.

    Attributes:
        fixed: True if the gate chooses a set number of latents, and so needs no dense form.
        encodes: True if it has an encoder; matching pursuit reads with the decoder's rows.
        retrained_by: name of the gate that trains another dictionary with the same frozen gate; "" for this one.
        needs: terms of the objective without which the gate would not learn.
        flags: names of the `Flags` that the gate understands.
        penalties: values of the flag `penalty_kind` that it understands.
    """

    fixed: ClassVar[bool] = False
    encodes: ClassVar[bool] = True
    retrained_by: ClassVar[str] = ""
    needs: ClassVar[tuple[type[Term], ...]] = ()
    flags: ClassVar[tuple[str, ...]] = ("k",)
    penalties: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """The name of the frozen gate, by which files know both."""
        return type(self).__name__.removeprefix("Train")

    @property
    def offers(self) -> frozenset[str]:
        """Quantities that terms of the objective may read (`Term.needs`)."""
        return frozenset({"encoder"} if self.encodes else ())

    def parameters(self, n: int) -> dict[str, Tensor]:
        """Return the starting values of what is learned by gradient, for n latents."""
        return {}

    def buffers(self) -> dict[str, Tensor]:
        """Return the starting values of what is kept from batch to batch."""
        return {}

    def check(self, n_latents: int, shard: int | None = None) -> None:  # noqa: B027 (most gates fit any number)
        """Refuse a number of latents that the gate cannot have, or a size of shards that it cannot be cut into."""

    @abstractmethod
    def choose(self, x: Tensor, encoder: Encoder, own: Own) -> Chosen:
        """Choose pairs of a batch."""

    def choose_shard(self, x: Tensor, encoder: Encoder, own: Own, across: Across, n_latents: int) -> Chosen:
        """Choose the pairs of this process where several hold a shard of the `n_latents` each."""
        return self.choose(x, encoder, own)

    @abstractmethod
    def active(self, pre: Tensor, chosen: Chosen | None, tokens: int, own: Own) -> Active:
        """Return values from pre-activations, differentiable; without `chosen`, `pre` is [token, latent]."""

    def learned(  # noqa: B027 (most gates have nothing to learn so)
        self, active: Active, scale: Tensor | None, own: Own, across: Across = ALONE
    ) -> None:
        """Update `own` after a batch that has been trained on; `scale` are the norms of norm-aware gating."""

    @abstractmethod
    def gate(self, own: Own) -> Gate:
        """Return the gate of the finished dictionary."""

    def customary(self) -> tuple[Term, ...]:
        """Return the usual objective: silent latents brought back, or a penalty if the gate sets no number."""
        return (AuxK(),) if self.encodes else ()

    @classmethod
    def like(cls, gate: Any, k: int) -> TrainGate:
        """Return a gate in training that ends as one like a frozen `gate`, with about k active latents per token."""
        return cls.of_k(k)

    @classmethod
    def of_flags(cls, flags: Flags) -> tuple[TrainGate, tuple[Term, ...]]:
        """Return the gate and the objective that the command line asks for."""
        gate = cls.of_k(flags.k)
        return gate, gate.customary()

    @classmethod
    def of_k(cls, k: int) -> Self:
        """Return the gate with k active latents per token."""
        return cls(k) if cls.fixed else cls()  # type: ignore[call-arg]

    def as_dict(self) -> dict[str, Any]:
        """Return the kind and the numbers, ready for JSON."""
        return {"kind": self.name, **asdict(self)}  # type: ignore[call-overload]


def top_of_shards(x: Tensor, encoder: Encoder, k: int, signed: bool, across: Across) -> Chosen:
    """Choose, of the k largest of each token over all latents, those that this process holds."""
    n = len(encoder.w)
    index, value = select.top_k(x, encoder, min(k, n), signed)  # [token, k]
    order = index.argsort(dim=1)  # of equals the lowest win
    index, value = index.gather(1, order), value.gather(1, order)
    won = across.largest(ranked(index, value, encoder).abs(), k) * (value != 0)
    found = Pairs.fixed(index, n)
    if x.device.type != "cpu" and not signed:  # what did not win stays as 0: counting it would wait for the device
        return Chosen(found, (value * won).reshape(-1))
    entries = won.reshape(-1).nonzero()[:, 0]
    return Chosen(select.take_entries(found, entries), value.reshape(-1)[entries])


def ranked(index: Tensor, value: Tensor, encoder: Encoder) -> Tensor:
    """Return values in the units in which the latents are compared."""
    return value if encoder.scale is None else value * encoder.scale[index]


def fixed_pairs(index: Tensor, value: Tensor, n: int) -> Chosen:
    """Return the choice of [token, k] latents and their pre-activations, of n latents."""
    return Chosen(Pairs.fixed(index, n), value.reshape(-1))


def pairs_of(chosen: Chosen | None) -> Pairs | None:
    """Return the pairs of a choice; None if all latents of all tokens are there."""
    return None if chosen is None else chosen.pairs


def at_pairs(per_latent: Tensor, chosen: Chosen | None) -> Tensor:
    """Return a number per latent [latent] as a number per pair [entry], or as it is if all latents are there."""
    return per_latent if chosen is None else per_latent.index_select(0, chosen.pairs.index)


def positive_values(pre: Tensor, chosen: Chosen | None, tokens: int) -> Active:
    """Return max(π, 0), the values of most gates."""
    return Active(pre, pre.relu(), pairs_of(chosen), tokens)
