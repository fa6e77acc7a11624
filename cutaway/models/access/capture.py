"""Captured activations: a mapping from addresses to tensors, with the tokens they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cutaway.core.address import Address, unit_axis
from cutaway.core.finite import notice
from cutaway.core.refuse import Refused, nearest
from cutaway.core.result import Result
from cutaway.core.sites import BY_NAME
from cutaway.models.access import forward, taps
from cutaway.models.access.ports import per_head
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.anatomy.foreign_names import parsed
from cutaway.models.loading.identity import described
from cutaway.models.tokens import Tokens


class NotCaptured(Refused, KeyError):
    """The refusal of an activation that is not among those captured: a `KeyError` too, as mappings have it."""

    __str__ = Refused.__str__


@dataclass(frozen=True, kw_only=True)
class Activation(Result, kind="activation"):
    """An activation of one prompt, with the axes of its site and its tokens as labels."""

    activation: Float[Tensor, "*cell"]


class Activations(Mapping[str, Tensor]):
    """The activations that one forward showed at the asked places.

    `acts["resid_post.3"]` is [batch, position, d_model]; `acts["z.3.1"]` one head; `acts["z.3.1@-1"]` at the last real
    token; `acts["resid_post"]` all captured layers stacked in front. Iteration gives the places, without heads and
    positions; `in` and `get` know whatever the brackets know. Two are equal only if they are the same object.
    """

    def __init__(self, values: Mapping[Address, Tensor | Callable[[], Tensor]], tokens: Tokens):
        self._values = dict(values)
        self.tokens = tokens

    def __getitem__(self, key: object) -> Tensor:
        if _is_layered(key):
            return self.stack(str(key))
        address = self._found(key)
        value = self._values[address.place]
        if not isinstance(value, Tensor):
            value = self._values[address.place] = value()
        return self._select(value, address)

    def __iter__(self) -> Iterator[str]:
        return iter(map(str, self._values))

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        if _is_layered(key):
            return bool(self.layers(str(key)))
        try:
            address = self._found(key)
            return address.unit is None or 0 <= address.unit < self[address.place].shape[_axis(address)]
        except NotCaptured:
            return False

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def _found(self, key: object) -> Address:
        """Return the address of a key whose place was captured and whose position every prompt has."""
        if not isinstance(key, str | Address):
            raise NotCaptured(f"activation {key!r}", f"a {type(key).__name__} names no place", "write resid_post.3")
        try:
            address = parsed(key)
            if address.place in self._values and address.position is not None:
                self.tokens.column(address.position)
        except Refused as refusal:
            raise NotCaptured(*refusal.args) from None
        if address.place not in self._values:
            close = nearest(str(address.place), list(self))
            why = "it was not captured" + (f"; near: {close}" if close else "")
            raise NotCaptured(f"activation {key!s}", why, "capture it")
        return address

    def layers(self, site: str) -> list[int]:
        """Return the captured layers of a site, in order."""
        return sorted(a.layer for a in self._values if a.site == site and a.layer is not None)

    def stack(self, site: str) -> Tensor:
        """Return all captured layers of a site as one tensor, `layer` in front."""
        layers = self.layers(site)
        if not layers:
            raise NotCaptured(f"activation {site!r}", "no layer of it was captured", "capture it")
        return torch.stack([self[str(Address(site, i))] for i in layers])

    def result(self, address: str | Address, prompt: int = 0) -> Activation:
        """Return one activation of one prompt as a result, without padding: for frames, files and pictures.

        Raises:
            Refused: it was not captured, or the prompt does not exist.
        """
        if not 0 <= prompt < len(self.tokens):
            raise Refused(f"prompt {prompt}", f"{len(self.tokens)} were captured", f"use 0 to {len(self.tokens) - 1}")
        stacked, value = _is_layered(address), self[address]
        name = str(address) if stacked else str(parsed(address))
        axes = ["layer", *BY_NAME[name].axes.split()] if stacked else _axes(parsed(address))
        real = self.tokens.prompt[prompt].to(value.device)
        value = value.detach().select(axes.index("batch"), prompt)
        axes.remove("batch")
        labels: dict[str, list[Any]] = {"layer": self.layers(name)} if stacked else {}
        for i, axis in enumerate(axes):
            if axis in ("position", "q_pos", "k_pos"):
                value = value.index_select(i, real.nonzero()[:, 0])
                labels[axis] = self.tokens.labels(prompt)
        record = {"address": name, "prompt": self.tokens.texts[prompt]}
        return Activation(activation=value, grid=tuple(axes), labels=labels, record=record)

    def plot(self, address: str | Address, prompt: int = 0, **options: Any) -> Any:
        """Draw one activation of one prompt as a matplotlib figure: attention as query × key, a panel per head.

        Raises:
            Refused: it was not captured, or the prompt does not exist.
        """
        return self.result(address, prompt).plot(**{"title": str(address), **options})

    def to(self, device: torch.device | str) -> Activations:
        """Return the same activations on another device."""
        return Activations({a: self[str(a)].to(device) for a in self._values}, self.tokens.to(device))

    def _select(self, value: Tensor, address: Address) -> Tensor:
        axes = address.row.axes.split()
        if address.position is not None:
            rows = torch.arange(len(value), device=value.device)
            value = value[rows, self.tokens.column(address.position).to(value.device)]
            axes.remove("position")
        if address.unit is not None:
            axis = axes.index(str(unit_axis(address.row)))
            if not 0 <= address.unit < value.shape[axis]:
                why = f"{axes[axis]} goes from 0 to {value.shape[axis] - 1} here"
                raise NotCaptured(f"activation {address}", why, "choose one of them")
            value = value.select(axis, address.unit)
        return value


def _is_layered(key: object) -> bool:
    """Return True for the bare name of a site that every layer has: all its captured layers."""
    return isinstance(key, str) and key in BY_NAME and BY_NAME[key].scope == "layer"


def _axes(address: Address) -> list[str]:
    """Return the axes that are left of a site where an address chooses a position or a unit."""
    unit = unit_axis(address.row) if address.unit is not None else None
    position = "position" if address.position is not None else None
    return [a for a in address.row.axes.split() if a not in (unit, position)]


def _axis(address: Address) -> int:
    return address.row.axes.split().index(str(unit_axis(address.row)))


class Collector:
    """Gathers tensors while a forward runs; cheap sites that others determine are computed when first looked at.

    With `stops` it ends the forward as soon as it has everything and no edit waits for its turn.
    """

    def __init__(self, anatomy: Anatomy, places: Sequence[Address], live: bool, stops: bool = False):
        self.anatomy, self.live, self.stops = anatomy, live, stops
        self.asked = list(dict.fromkeys(a.place for a in places))
        self.found: dict[Address, Tensor] = {}
        # Derived sites follow from a view site, unless gradients must reach them or an edit has its say there.
        self.later: dict[Address, Derivation] = {}
        self.places: dict[Address, None] = {}
        for a in self.asked:
            if not live and (d := derivation(anatomy, a)) is not None and not taps.tapped(anatomy, a):
                self.later[a] = d
                self.places[d.base] = None
            else:
                self.places[a] = None

    def see(self, place: Address) -> Callable[[Tensor], Tensor]:
        """Return the function that stores one place's tensor."""
        return partial(self._store, place)

    def _store(self, place: Address, x: Tensor) -> Tensor:
        self.found[place] = x
        if self.stops and len(self.found) == len(self.places) and not taps.waiting(self.anatomy):
            raise forward.Enough
        if place.site in ("mlp_out", "attn_out") and self.anatomy.family.adds_in_place:
            return x.clone()  # the model then adds to the copy
        return x

    @property
    def share(self) -> float:
        """The part of the model's blocks that must run for these places."""
        n = self.anatomy.shape.n_layers
        whole = [n if a.layer is None and a.site not in ("embed", "pos_embed") else 0 for a in self.places]
        return max([*whole, *(a.layer + (a.site != "resid_pre") for a in self.places if a.layer is not None)]) / n

    def notice(self, tokens: Tokens) -> None:
        """Record the largest value of the deepest tensor: a NaN in the residual stream reaches every later layer."""
        if self.found:
            notice(list(self.found.values())[-1], tokens.mask)

    def activations(self, tokens: Tokens) -> Activations:
        """Return everything asked for, as a mapping."""
        values: dict[Address, Any] = {a: self._deferred(a) if a in self.later else self.found[a] for a in self.asked}
        return Activations(values, tokens)

    def _deferred(self, a: Address) -> Callable[[], Tensor]:
        d, base = self.later[a], self.found[self.later[a].base]
        stamp = _stamp(d.module)

        def compute() -> Tensor:
            if _stamp(d.module) != stamp:
                raise Refused(
                    f"activation {a}", "the model's weights have changed since it was captured", "capture it again"
                )
            with torch.no_grad():
                return d.function(base)

        return compute


@dataclass(frozen=True)
class Derivation:
    """Derivation of a site from another, by a function of that tensor and of a module's weights."""

    base: Address
    module: nn.Module
    function: Callable[[Tensor], Tensor]


def derivation(anatomy: Anatomy, a: Address) -> Derivation | None:
    """For a site that another determines: how it follows."""
    if a.site == "head_out" or a.site.endswith(".scale"):
        return anatomy.remember(("derivation", a), lambda: _derivation(anatomy, a))
    return None


def _derivation(anatomy: Anatomy, a: Address) -> Derivation | None:
    if a.site == "head_out" and a.layer is not None:
        o = anatomy.part(a.layer, "o")
        return Derivation(Address("z", a.layer), o, lambda z: per_head(o, z)) if o is not None else None
    if anatomy.family.post_norm:
        return None
    name = a.site.split(".")[0]
    module = anatomy.top("final") if a.layer is None else anatomy.part(a.layer, name)
    if module is None:
        return None
    if a.layer is None:
        base = Address("resid_post", anatomy.shape.n_layers - 1)
    else:
        base = Address("resid_mid" if name == "ln2" and not anatomy.parallel else "resid_pre", a.layer)
    return Derivation(base, module, lambda x: anatomy.norm(module).scale(x))


def _stamp(module: nn.Module) -> tuple[Any, ...]:
    """Return a stamp that changes when weights are exchanged or written to, or an adapter is switched on or off."""
    if not module._modules:  # the walk costs more than the rest
        return tuple([(id(p), p._version) for p in module._parameters.values() if p is not None])
    return *((id(p), p._version) for p in module.parameters()), described(module)[0]
