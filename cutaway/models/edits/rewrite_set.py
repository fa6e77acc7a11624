"""Sets of rewrites that belong together: one file, one record, kept on a model until they are taken back.

stack = RewriteStack(model)
stack.push(edit)                         # the user's model has the new weights from here on
stack.pop()                              # and from here on the bytes of before
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.files import held, read_header, reading
from cutaway.core.refuse import Refused
from cutaway.models.access.forward import alone
from cutaway.models.edits.rewrites import (
    Rewrite,
    make_rewrites,
    open_rewrites,
    place_of,
    rewritten,
    save_rewrites,
)
from cutaway.models.model import Model


@dataclass(frozen=True, eq=False)
class Rewrites:
    """Rewrites that are one change of a model, such as the layers of one edit.

    Attributes:
        rewrites: the rewrites, in the order in which they are made.
        record: where they come from, ready for JSON.
    """

    rewrites: tuple[Rewrite, ...]
    record: Mapping[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Rewrite]:
        return iter(self.rewrites)

    def __len__(self) -> int:
        return len(self.rewrites)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of all rewrites, by the number of the rewrite and their name."""
        return {f"{i}.{name}": t for i, r in enumerate(self.rewrites) for name, t in r.tensors().items()}

    def save(self, path: str | Path) -> Path:
        """Write the rewrites and their record to one safetensors file."""
        return save_rewrites(path, *self.rewrites, record=self.record)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a file that `save` wrote.

        Raises:
            Refused: the file is missing, damaged, or holds something else.
        """
        rewrites = open_rewrites(path)
        with reading(path):
            return cls(rewrites, held(read_header(path), "record", dict, {}))

    def on(self, model: Model) -> AbstractContextManager[Model]:
        """Run the model with these rewrites within a block."""
        return rewritten(model, *self.rewrites)


class RewriteStack:
    """Rewrites kept on a model: the last ones pushed are taken back first, each bit for bit.

    Use it where a model keeps its new weights beyond one block; `rewritten` is for one block. Between calls nothing
    holds the model, so that what else writes to the same weights is undone with the rewrites above it.

    Attributes:
        model: the model whose weights change.
    """

    def __init__(self, model: Model):
        self.model = model
        self._undo: list[tuple[tuple[Rewrite, ...], ExitStack]] = []

    def __len__(self) -> int:
        return len(self._undo)

    @property
    def rewrites(self) -> tuple[tuple[Rewrite, ...], ...]:
        """The rewrites of each push that stands."""
        return tuple(made for made, _ in self._undo)

    def push(self, *rewrites: Rewrite) -> None:
        """Change the model's weights until the matching `pop`; nothing is written if one of the rewrites is refused.

        Raises:
            Refused: as `rewritten`.
        """
        self._undo.append((rewrites, make_rewrites(self.model, *rewrites)))

    def pop(self) -> tuple[Rewrite, ...]:
        """Write back the bytes from before the last push, and return its rewrites.

        Raises:
            Refused: nothing was pushed.
        """
        if not self._undo:
            raise Refused("taking back a rewrite", "none stands on the stack", "push one first")
        rewrites, undo = self._undo.pop()
        with alone(self.model.hf):
            undo.close()
        return rewrites

    def clear(self) -> None:
        """Take back all rewrites, the last one first."""
        while self._undo:
            self.pop()


@dataclass(frozen=True)
class Change:
    """Size of a rewrite on a model, and the part of it that the dtype of the weight rounds away.

    Attributes:
        weight: the name of the weight.
        size: ‖Δ‖ / ‖W‖ in the Frobenius norm, of the slice that changes.
        rounding: ‖(W′ − W) − Δ‖ / ‖Δ‖, W′ being the stored weight.
        lost: share of the entries with Δ ≠ 0 whose stored value does not change.
        heads: the query heads that share the slice, where it is a head's key or value.
    """

    weight: str
    size: float
    rounding: float
    lost: float
    heads: tuple[int, ...] = ()


@torch.no_grad()
def changes(model: Model, *rewrites: Rewrite) -> list[Change]:
    """Measure rewrites on the model, each on the weights that those before it leave; the model stays as it is.

    Raises:
        Refused: as `rewritten`.
    """
    found = list[Change]()
    with rewritten(model), ExitStack() as made:
        for rewrite in rewrites:
            old = place_of(model, rewrite).read()
            found.append(_change(model, rewrite, old))
            made.enter_context(rewritten(model, rewrite))
    return found


def _change(model: Model, rewrite: Rewrite, old: Float[Tensor, "..."]) -> Change:
    before = old.double()
    delta = rewrite.delta_from(old)
    stored = rewrite.apply(old).double() - before
    moved = delta != 0
    size = float(delta.norm())
    return Change(
        rewrite.weight,
        size / max(float(before.norm()), torch.finfo(torch.double).tiny),
        float((stored - delta).norm()) / size if size else 0.0,
        float((stored[moved] == 0).double().mean()) if bool(moved.any()) else 0.0,
        _sharing(model, rewrite.weight),
    )


def _sharing(model: Model, weight: str) -> tuple[int, ...]:
    """Return the query heads that read a key or value head."""
    name, _, head = weight.rpartition(".")
    if name.partition(".")[0] not in ("k", "v") or "." not in name:
        return ()
    group = model.shape.n_heads // model.shape.n_kv_heads
    return tuple(range(int(head) * group, (int(head) + 1) * group))


def difference(model: Model, other: Model) -> Rewrites:
    """Return the rewrites that make `model` have the weights of `other`, bit for bit: one per parameter that differs.

    Parameters that share their memory count once.

    Raises:
        Refused: models whose parameters differ in name, shape or dtype.
    """
    own, its = (dict(m.hf.named_parameters()) for m in (model, other))
    what = f"the difference of {model.name} and {other.name}"
    for name in dict.fromkeys((*own, *its)):
        kinds = [(tuple(p.shape), p.dtype) if (p := side.get(name)) is not None else None for side in (own, its)]
        if kinds[0] != kinds[1]:
            said = " and ".join("absent" if k is None else f"{k[0]} in {k[1]}" for k in kinds)
            raise Refused(what, f"{name} is {said}", "compare two checkpoints of one architecture, in one dtype")
    changed = [n for n in own if not torch.equal(own[n].detach().cpu(), its[n].detach().cpu())]
    record = {"from": model.identity(), "to": other.identity()}
    return Rewrites(tuple(Rewrite(n, value=its[n].detach().clone(), tied=True) for n in changed), record)
