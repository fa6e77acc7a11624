"""Masked runs: every reader of the residual stream reads each writer's value of this run, or an alternative one.

A mask m over the edges of a wiring says how much of this run each reader gets: x_v = Σ_u [cur_u + (1 − m_uv)(alt_u −
cur_u)] over the writers u that the reader v hears. Ones leave the run as it is, zeros make it the run that the
alternative values come from, anything between blends. `cur` are the values of the masked run itself.

The model's own modules run. Readers whose masks are all ones read what they are handed; the others read the stream plus
Σ (1 − m)(alt − cur), through their own norm. Readers of a layer with the same mask share one stream, and what heads
write is expanded one layer at a time. Masks may need a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cutaway.core.address import Address, parse
from cutaway.core.refuse import Refused
from cutaway.models.access import taps
from cutaway.models.access.ports import output_rows
from cutaway.models.anatomy.linear import affine
from cutaway.models.anatomy.norms import wide
from cutaway.models.anatomy.offload import present
from cutaway.models.edits.wiring import Wiring
from cutaway.models.model import Model

_BRANCHES = ("q_in", "k_in", "v_in")
_EMBED, _LOGITS = Address("embed"), Address("logits")
Written = Mapping[Address, Tensor]  # by place, what its writers write: [batch position *head d_model], or broadcast


def places_written(wiring: Wiring) -> list[Address]:
    """Return the places whose activations `written` turns into what the writers write."""
    return [Address("resid_pre", 0), *dict.fromkeys(u.place for u in wiring.writers if u != _EMBED)]


def written(model: Model, activations: Mapping[str, Tensor]) -> dict[Address, Float[Tensor, "batch position *unit"]]:
    """Return what the writers write into the stream, by place: [batch position d_model], of heads [batch position head
    d_model].

    `activations` are those of a run, at some of `places_written`.
    """
    out = dict[Address, Tensor]()
    for a, x in ((parse(name), x) for name, x in activations.items()):
        whole = a.site != "z"
        out[_EMBED if a.site == "resid_pre" else a] = x if whole else head_writes(model, a.layer or 0, x)
    return out


def head_writes(
    model: Model, layer: int, z: Float[Tensor, "batch position head d_head"]
) -> Float[Tensor, "batch position head d_model"]:
    """Return what each head of a layer adds to the stream, with its gradient: z through W_O and the family's
    multiplier, and through a post-norm whose divisor is that of the whole layer's output. Biases are left out.
    """
    anatomy = model.anatomy
    o, post = anatomy.part(layer, "o"), anatomy.part(layer, "ln1_post")
    assert o is not None
    with present(o):
        _, bias = affine(o)
        out = torch.einsum("bphe,hed->bphd", z, output_rows(o, z.shape[2]).to(z))
    if post is not None:
        norm = anatomy.norm(post)
        total = out.sum(2) if bias is None else out.sum(2) + bias.to(out)
        out = norm.linear(wide(out), norm.scale(total)[:, :, None].expand(out.shape[:3])).to(z.dtype)
    return out if anatomy.multiplier == 1.0 else out * anatomy.multiplier


def check_mask(wiring: Wiring, mask: Tensor) -> None:
    """Check that a mask is one over the edges of a wiring: [writer reader], or [writer reader position].

    Raises:
        Refused: it has another shape.
    """
    writers, readers = wiring.heard.shape
    if mask.ndim not in (2, 3) or tuple(mask.shape[:2]) != (writers, readers):
        why = f"the wiring has {writers} writers and {readers} readers"
        raise Refused(f"mask of shape {tuple(mask.shape)}", why, "give [writer, reader] or one more axis, position")


def removed_by(wiring: Wiring, mask: Bool[Tensor, "mask ..."] | Float[Tensor, "mask ..."]) -> Float[Tensor, "..."]:
    """Return 1 − mask where there are edges, and 0 elsewhere, as `MaskedForward` takes it: [mask position reader
    writer], with one position for all where the mask has none.

    Args:
        mask: [mask writer reader], or [mask writer reader position].

    Raises:
        Refused: a mask of another shape.
    """
    for m in mask:
        check_mask(wiring, m)
    kept = mask if mask.is_floating_point() else mask.float()
    kept = kept if kept.ndim == 4 else kept.unsqueeze(3)
    return ((1 - kept) * wiring.heard.to(kept.device)[:, :, None]).permute(0, 3, 2, 1)


@dataclass(frozen=True, eq=False)
class _Shared:
    """The different masks among readers that read the same stream through the same norm.

    Attributes:
        removed: 1 − each of them.
        which: by place, the one that each of its readers has.
    """

    removed: Float[Tensor, "mask position row writer"]
    which: dict[Address, Int[Tensor, "reader"]]


@dataclass(eq=False)
class MaskedForward:
    """Functions for the taps of one forward, whose rows are copies of the same prompts, each copy under its own mask.

    Use `attached()` around a forward of the prompts, repeated once for each mask. With `since`, the forward starts at
    that block.

    Attributes:
        model: the model.
        wiring: its writers and readers.
        removed: 1 − mask, from `removed_by`.
        alternative: what stands in for what the writers write.
        since: the first block that runs.
        before: what the writers write before that block; empty if it is the first one.
    """

    model: Model
    wiring: Wiring
    removed: Float[Tensor, "mask position reader writer"]
    alternative: Written
    since: int = 0
    before: Written = field(default_factory=dict)

    def __post_init__(self) -> None:
        live, moves = self.removed.requires_grad, self.removed.detach() != 0
        heard = self.wiring.heard.to(moves.device)
        touched = heard.any(0) if live else moves.any(3).any(1).any(0)
        ablated = heard.any(1) if live else moves.any(2).any(1).any(0)
        self._readers: dict[Address, list[int]] = {}
        for i, v in enumerate(self.wiring.readers):
            self._readers.setdefault(v.place, []).append(i)
        on = {v.place for v, is_on in zip(self.wiring.readers, touched.tolist(), strict=True) if is_on}
        self._readers = {place: own for place, own in self._readers.items() if place in on}
        self._ablated = {u.place for u, is_on in zip(self.wiring.writers, ablated.tolist(), strict=True) if is_on}
        self._writer = {u: i for i, u in enumerate(self.wiring.writers)}
        self._stream: Tensor | None = None  # as the next reader is handed it
        self._branches: Tensor | None = None  # what the branches of attention read, a row for each different mask
        self._changes: list[Tensor] = []  # alt − cur of the writers so far, [mask, prompt, position, writer, d_model]
        self._at: list[int] = []  # the indices of these writers

    def attached(self) -> AbstractContextManager[taps.Fired]:
        """Return the context within which forwards are masked."""
        return taps.attached(self.model.anatomy, self.sees(), gradient=torch.is_grad_enabled())

    def sees(self) -> dict[Address, taps.See]:
        """Return the function of each place that is tapped."""
        out, last = dict[Address, taps.See](), self.model.shape.n_layers - 1
        for i in range(self.since, last + 1):
            branches = [a for s in _BRANCHES if (a := Address(s, i)) in self._readers]
            mlp, heads, whole = Address("mlp_in", i), Address("z", i), Address("mlp_out", i)
            if i == self.since or branches or mlp in self._readers:
                out |= self._into_block(i, branches)
            if mlp in self._readers:
                out |= self._into_mlp(mlp)
            if heads in self._ablated:
                out[heads] = self._leaving(heads, lambda z, i=i: head_writes(self.model, i, z))
            if whole in self._ablated:
                out[whole] = self._leaving(whole, lambda x: x)
        if _LOGITS in self._readers:
            out[Address("resid_post", last)] = self._into_unembedding()
        return out

    def _leaving(self, place: Address, writes: Callable[[Tensor], Tensor]) -> taps.See:
        def see(x: Tensor) -> Tensor:
            self._note(place, writes(x))
            return x

        return see

    def _note(self, place: Address, cur: Float[Tensor, "row position ..."]) -> None:
        """Append alt − cur of a place's writers."""
        change = self.alternative[place].to(cur) - cur.unflatten(0, (len(self.removed), -1))
        units = range(change.shape[3]) if place.site == "z" else [None]
        self._changes.append(change if place.site == "z" else change.unsqueeze(3))
        self._at += [self._writer[Address(place.site, place.layer, unit)] for unit in units]

    def _begin(self, x: Float[Tensor, "row position d_model"]) -> None:
        """Forget the last forward, and note what is written before the first block."""
        self._changes, self._at = [], []
        for place, cur in (self.before if self.since else {_EMBED: x}).items():
            if place in self._ablated:
                self._note(place, cur.repeat(len(self.removed), *[1] * (cur.ndim - 1)) if self.since else cur)

    def _into_block(self, layer: int, branches: Sequence[Address]) -> dict[Address, taps.See]:
        """Keep the stream that enters a block, and hand queries, keys and values what their masks leave of it."""
        shared, norm = self._shared(branches) if branches else None, self.model.anatomy.part(layer, "ln1")

        def enter(x: Tensor) -> Tensor:
            if layer == self.since:
                self._begin(x)
            self._stream = x
            self._branches = _through(norm, self._corrected(shared.removed)) if shared is not None else None
            return x

        def branch(place: Address) -> taps.See:
            def see(x: Tensor) -> Tensor:
                assert shared is not None
                assert self._branches is not None
                return self._branches.index_select(2, shared.which[place].to(x.device))

            return see

        return {Address("resid_pre", layer): enter} | {place: branch(place) for place in branches}

    def _into_mlp(self, place: Address) -> dict[Address, taps.See]:
        anatomy, layer = self.model.anatomy, place.layer or 0
        norm = anatomy.part(layer, "ln2") or (anatomy.part(layer, "ln1") if anatomy.parallel else None)
        shared = self._shared([place])

        def keep(x: Tensor) -> Tensor:
            self._stream = x
            return x

        def see(x: Tensor) -> Tensor:
            return _through(norm, self._corrected(shared.removed))[:, :, 0]

        return {place: see} if anatomy.parallel else {Address("resid_mid", layer): keep, place: see}

    def _into_unembedding(self) -> taps.See:
        shared = self._shared([_LOGITS])

        def see(x: Tensor) -> Tensor:
            self._stream = x
            return self._corrected(shared.removed)[:, :, 0]

        return see

    def _shared(self, places: Sequence[Address]) -> _Shared:
        """Return the different masks of the readers at some places; all of them where they need a gradient."""
        own = [i for a in places for i in self._readers[a]]
        removed = self.removed.index_select(2, torch.tensor(own, device=self.removed.device))
        which = torch.arange(len(own), device=removed.device)
        if len(own) > 1 and not removed.requires_grad:
            rows, which = removed.movedim(2, 0).flatten(1).unique(dim=0, return_inverse=True)
            removed = rows.unflatten(1, (*removed.shape[:2], removed.shape[3])).movedim(0, 2)
        return _Shared(removed, dict(zip(places, which.split([len(self._readers[a]) for a in places]), strict=True)))

    def _corrected(self, removed: Float[Tensor, "mask place row writer"]) -> Float[Tensor, "copy position row d_model"]:
        """Return the stream as each row of these masks leaves it."""
        assert self._stream is not None
        stream = self._stream.unsqueeze(2)
        if not self._changes:
            return stream.expand(-1, -1, removed.shape[2], -1)
        changes = self._changes[0] if len(self._changes) == 1 else torch.cat(self._changes, 3)
        self._changes, at = [changes], torch.tensor(self._at, device=removed.device)
        weights = removed.index_select(3, at).to(changes)[:, None]  # [mask, 1, position or 1, row, writer]
        return stream + (weights @ changes).flatten(0, 1)


def _through(norm: nn.Module | None, x: Float[Tensor, "copy position row d_model"]) -> Float[Tensor, "_ _ _ _"]:
    """Return streams behind a norm, whose taps do not see them."""
    if norm is None:
        return x
    with present(norm):
        return norm.forward(x.flatten(1, 2)).view_as(x)
