"""Rewrites: changes of weights as data, made for the length of a block and undone bit for bit.

    with rewritten(model, Rewrite("mlp_out.5", factors=(u, v))):
        model.run(prompt)                    # W_out of layer 5 is W + u @ v here

A rewrite names a weight and says how it changes. Within the block every run, of `model.hf` too, has the new weights;
the model's identity says so in every record. Behind the block each byte is what it was before, also after an exception.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cutaway.core.content import content
from cutaway.core.files import held, read_tensors, reading, write_tensors
from cutaway.core.record import versions
from cutaway.core.refuse import Refused
from cutaway.models.access.forward import alone
from cutaway.models.anatomy.linear import MERGE, is_linear, matrix, table
from cutaway.models.anatomy.unembedding import unembedding
from cutaway.models.loading.identity import REWRITES
from cutaway.models.loading.provenance import restored, weights
from cutaway.models.model import Model

_LAYERED = (
    "q",
    "k",
    "v",
    "o",
    "mlp_in",
    "mlp_gate",
    "mlp_out",
    "o_bias",
    "mlp_in_bias",
    "mlp_gate_bias",
    "mlp_out_bias",
)
_WHOLE = ("embed", "unembed", "unembed_bias")
_HOUSE = re.compile(rf"(?:({'|'.join(_LAYERED)})\.(\d+)(?:\.(\d+))?|({'|'.join(_WHOLE)}))")
_OPEN: WeakKeyDictionary[nn.Module, list[set[int]]] = WeakKeyDictionary()  # memory written by rewrites that stand
_FORMS = ("delta", "factors", "value")


@dataclass(frozen=True, eq=False)
class Rewrite:
    """A change of one weight W, given in exactly one of three forms.

    Attributes:
        weight: a name of `model.weights` with layer and, for q, k, v and o, optionally a head (`mlp_out.5`, `q.3.1`,
            `embed`), the path of a linear module, or the path of a parameter. All but the last have their inputs first.
        delta: W becomes W + delta.
        factors: (u, v) of low rank: W becomes W + u @ v, u [..., rows, rank] and v [..., rank, columns].
        value: W becomes this value.
        rows: limits the change to these rows, in this order.
        columns: limits the change to these columns.
        tied: accept that other weights, which share the memory of this one, change with it.
        record: where the rewrite comes from, ready for JSON.

    Raises:
        Refused: no form, several, or numbers that are not finite.
    """

    weight: str
    delta: Float[Tensor, "..."] | None = field(default=None, repr=False)
    factors: tuple[Float[Tensor, "..."], Float[Tensor, "..."]] | None = field(default=None, repr=False)
    value: Float[Tensor, "..."] | None = field(default=None, repr=False)
    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None
    tied: bool = False
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [name for name in _FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            why = f"it gives {' and '.join(given)}" if given else "it does not say how the weight changes"
            raise Refused(f"rewrite of {self.weight}", why, "give one of delta=, factors=(u, v) and value=")
        if not all(bool(t.isfinite().all()) for t in self.tensors().values()):
            raise Refused(f"rewrite of {self.weight}", "its numbers are not all finite", "check how it was computed")
        for name in ("rows", "columns"):
            if len(set(chosen := getattr(self, name) or ())) != len(chosen):
                raise Refused(f"rewrite of {self.weight}", f"it names one of its {name} twice", "name each once")

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the change by name: delta, value, or u and v."""
        if self.factors is not None:
            return dict(zip("uv", self.factors, strict=True))
        return {name: t for name in ("delta", "value") if (t := getattr(self, name)) is not None}

    def identity(self) -> str:
        """Hash the change: the weight, the slice and every number."""
        return content((self.weight, self.rows, self.columns, self.tensors()))

    def describe(self) -> dict[str, Any]:
        """Describe the rewrite for records: its weight, form, slice, hash and own record."""
        part = {name: list(chosen) for name in ("rows", "columns") if (chosen := getattr(self, name)) is not None}
        form = f"rank {self.factors[0].shape[-1]}" if self.factors is not None else next(iter(self.tensors()))
        own = {"record": dict(self.record)} if self.record else {}
        return {"weight": self.weight, "form": form, **part, "hash": self.identity(), **own}

    def apply(self, old: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Compute the new weight from the old one, in float32 or wider, rounded once to the old dtype."""
        if self.value is not None:
            return self.value.to(old.device, old.dtype)
        wide = torch.promote_types(old.dtype, torch.float32)
        parts = [t.to(old.device, wide) for t in self.tensors().values()]
        return (old.to(wide) + (parts[0] @ parts[1] if self.factors is not None else parts[0])).to(old.dtype)

    def delta_from(self, old: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the change that is meant of a weight, in float64 and before any rounding."""
        if self.value is not None:
            return self.value.to(old.device).double() - old.double()
        parts = [t.to(old.device).double() for t in self.tensors().values()]
        return parts[0] @ parts[1] if self.factors is not None else parts[0]

    def save(self, path: str | Path) -> Path:
        """Write the rewrite to a safetensors file, which `open_rewrites` opens."""
        return save_rewrites(path, self)

    def shape(self) -> tuple[int, ...]:
        """Return the shape of the slice that changes.

        Raises:
            Refused: u and v do not multiply.
        """
        if self.factors is None:
            return tuple(next(iter(self.tensors().values())).shape)
        u, v = self.factors
        if u.ndim < 2 or v.ndim < 2 or u.shape[:-2] != v.shape[:-2] or u.shape[-1] != v.shape[-2]:
            why = f"u {tuple(u.shape)} and v {tuple(v.shape)} do not multiply"
            raise Refused(f"rewrite of {self.weight}", why, "give u [..., rows, rank] and v [..., rank, columns]")
        return (*u.shape[:-1], v.shape[-1])


@contextmanager
def rewritten(model: Model, *rewrites: Rewrite) -> Iterator[Model]:
    """Within the block, the model runs with these weights; contexts nest, and later rewrites see earlier ones.

    Other threads' runs of this model wait until the context is left. Whatever else writes to these weights inside the
    block is undone with it.

    Raises:
        Refused: a weight that is not there, has another shape, is quantised, offloaded or computed from others, or
            shares its memory with weights that the rewrite does not name (`tied=True` accepts that).
    """
    with alone(model.hf), make_rewrites(model, *rewrites):
        yield model


def make_rewrites(model: Model, *rewrites: Rewrite) -> ExitStack:
    """Change the weights, and return the stack whose `close` writes back the bytes that were there.

    Nothing is written unless every rewrite fits the model.

    Raises:
        Refused: as `rewritten`.
    """
    if model.anatomy.unembed is not None:  # measured of the model as it is, not of a rewritten one
        unembedding(model.anatomy)
    _ = model.anatomy.multiplier
    with alone(model.hf), ExitStack() as undo:
        places = [(r, place_of(model, r)) for r in rewrites]
        memory = {v.untyped_storage().data_ptr() for _, place in places for v in place.views}
        if model.made is not None:
            undo.callback(restored, model, weights(model), memory)
            open_ = _OPEN.setdefault(model.hf, [])
            for outer in open_:
                outer |= memory
            open_.append(memory)
            undo.callback(open_.remove, memory)
        active = REWRITES.setdefault(model.hf, [])
        undo.callback(active.__delitem__, slice(len(active), None))
        for rewrite, place in places:
            old = place.read()
            undo.callback(place.write, old)
            place.write(rewrite.apply(old))
            active.append(rewrite.describe())
        return undo.pop_all()


def save_rewrites(path: str | Path, *rewrites: Rewrite, record: Mapping[str, Any] | None = None) -> Path:
    """Write rewrites to one safetensors file, with their weights, slices and records as JSON in its header.

    `record` is the one of all of them together.
    """
    items = [
        {"weight": r.weight, "rows": r.rows, "columns": r.columns, "tied": r.tied, "record": dict(r.record)}
        for r in rewrites
    ]
    tensors = {f"{i}.{name}": t for i, r in enumerate(rewrites) for name, t in r.tensors().items()}
    header = {"kind": "rewrites", "rewrites": items, "record": dict(record or {}), "versions": versions()}
    return write_tensors(path, tensors, header)


def open_rewrites(path: str | Path) -> tuple[Rewrite, ...]:
    """Open the rewrites of a file, in their order.

    Raises:
        Refused: the file is missing, damaged, or holds something else.
    """
    tensors, header = read_tensors(path)
    if header.get("kind") != "rewrites":
        raise Refused(f"file {str(path)!r}", "it holds no rewrites", "give a file that save_rewrites wrote")
    with reading(path):
        return tuple(_opened(item, i, tensors) for i, item in enumerate(held(header, "rewrites", list)))


def _opened(item: Any, i: int, tensors: Mapping[str, Tensor]) -> Rewrite:
    own: dict[str, Any] = {
        name: tensors[f"{i}.{name}"] for name in ("delta", "value", "u", "v") if f"{i}.{name}" in tensors
    }
    if "u" in own or "v" in own:
        own["factors"] = own.pop("u"), own.pop("v")
    for name in ("rows", "columns"):
        own[name] = None if item[name] is None else tuple(int(n) for n in item[name])
    return Rewrite(held(item, "weight", str), tied=held(item, "tied", bool), record=held(item, "record", dict), **own)


@dataclass(frozen=True)
class Place:
    """The memory that a rewrite changes: views of one parameter, several where heads lie too far apart for one view.

    Attributes:
        views: one view [...], or one [rows, columns] per head.
        index: the slice of each view.
        per_head: True if `views` are heads, which are read and written as one stack.
    """

    views: tuple[Tensor, ...]
    index: tuple[Any, ...]
    per_head: bool

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return a copy of the values."""
        parts = [v[self.index] for v in self.views]
        return torch.stack(parts) if self.per_head else parts[0].clone()

    @torch.no_grad()
    def write(self, new: Tensor) -> None:
        """Put values there."""
        for view, part in zip(self.views, new if self.per_head else [new], strict=True):
            view[self.index] = part


def place_of(model: Model, rewrite: Rewrite) -> Place:
    """Find the memory of a rewrite's weight, checked.

    Raises:
        Refused: as `rewritten`.
    """
    what = f"rewrite of {rewrite.weight}"
    house = _HOUSE.fullmatch(rewrite.weight)
    views, per_head = _named(model, house) if house else ((_at_path(model.hf, rewrite.weight),), False)
    _check_memory(model.hf, views, rewrite)
    first, index = views[0], _index(rewrite, views[0])
    shape = (*([len(views)] if per_head else []), *first[index].shape)
    if rewrite.shape() != shape:
        raise Refused(what, f"it has the shape {rewrite.shape()} and the weight {shape}", "give it as the weight is")
    return Place(views, index, per_head)


def _index(rewrite: Rewrite, view: Tensor) -> tuple[Any, ...]:
    """Index the slice of a view; rows and columns are its last two axes (rows alone where it has one)."""
    axes = {"rows": max(view.ndim - 2, 0), "columns": view.ndim - 1}
    index: list[Any] = [slice(None)] * view.ndim
    for name, axis in axes.items():
        chosen = getattr(rewrite, name)
        if chosen is None:
            continue
        if (name == "columns" and view.ndim < 2) or not all(0 <= n < view.shape[axis] for n in chosen):
            size = f"the weight is {tuple(view.shape)}"
            raise Refused(
                f"rewrite of {rewrite.weight}", f"{name} {list(chosen)} are not there: {size}", "choose others"
            )
        index[axis] = torch.tensor(chosen, dtype=torch.long, device=view.device)
    if rewrite.rows is not None and rewrite.columns is not None:
        index[axes["rows"]] = index[axes["rows"]][:, None]
    return tuple(index)


def _named(model: Model, house: re.Match[str]) -> tuple[tuple[Tensor, ...], bool]:
    """Return views of a weight under its name in `model.weights`, and True if they are one per head."""
    name, weights, anatomy = house[1] or house[4], model.weights, model.anatomy
    if house[1] is None:
        return (getattr(weights, name),), False
    layer, what = int(house[2]), f"rewrite of {house[0]}"
    if layer >= model.shape.n_layers:
        raise Refused(what, f"layers go to {model.shape.n_layers - 1} here", "choose another layer")
    if name not in ("q", "k", "v", "o"):
        if house[3] is not None:
            raise Refused(what, f"{name} has no heads", f"write {name}.{layer}, and rows= or columns= for a part")
        return (getattr(weights, name)[layer],), False
    whole = getattr(weights, name)[layer]  # [head, rows, columns]
    views, per_head = (whole,), False
    fused = anatomy.part(layer, "fused")
    if name == "q" and fused is not None and anatomy.family.qkv != "concat":
        # [d_model, kv_head, queries of the group, then k, v, d_head]: query heads of several groups are no single view
        grouped = matrix(fused).reshape(len(whole[0]), model.shape.n_kv_heads, -1, model.shape.d_head)
        group = len(whole) // model.shape.n_kv_heads
        views, per_head = tuple(grouped[:, h // group, h % group] for h in range(len(whole))), True
    if house[3] is None:
        return views, per_head
    head = int(house[3])
    if head >= len(whole):
        raise Refused(what, f"its heads go to {len(whole) - 1} here", "choose another head")
    return (views[head] if per_head else whole[head],), False


def _at_path(hf: Any, path: str) -> Tensor:
    """Return the parameter at a path as it is stored, or the matrix of the linear module there, inputs first."""
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        if name == path:
            return parameter.detach()
    try:
        module = hf.get_submodule(path)
    except AttributeError:
        module = None
    if module is None or not path or not (is_linear(module) or isinstance(module, nn.Embedding)):
        instead = "give a name of model.weights (mlp_out.5, q.3.1, embed), or a path in model.hf"
        raise Refused(f"rewrite of {path}", "the model has no such weight", instead)
    return table(module) if isinstance(module, nn.Embedding) else matrix(module)


def _check_memory(hf: nn.Module, views: Sequence[Tensor], rewrite: Rewrite) -> None:
    """Refuse what is not the model's own plain memory, and memory that other weights share."""
    what = f"rewrite of {rewrite.weight}"
    if any(v.is_meta for v in views):
        raise Refused(what, "its numbers are not in memory (offloaded)", "load the model where all weights fit")
    spans = [_span(v) for v in views]
    named = list(hf.named_parameters(remove_duplicate=False))
    owners = {n: p for n, p in named if any(a < z and y < b for y, z in [_span(p)] for a, b in spans)}
    plain = all(
        type(p) in (Tensor, nn.Parameter) and p.is_floating_point() and not p.is_quantized for p in owners.values()
    )
    if not owners or not plain:
        why = "it is not stored as the model applies it (quantised, an adapter, spread, a scale of the family)"
        raise Refused(what, why, f"{MERGE}, or give the path of a parameter")
    if len(owners) > 1 and not rewrite.tied:
        raise Refused(
            what, f"{', '.join(owners)} share its memory, and all would change", "say tied=True if they should"
        )


def _span(t: Tensor) -> tuple[int, int]:
    """Return the address of the first byte of a tensor, and of the one behind its last."""
    if t.is_meta or not t.numel() or t.layout is not torch.strided:
        return 0, 0
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
