"""Taps: the one place where functions are attached to the sites of a live model, and taken off again.

`attached` installs hooks for the asked places only, removes them all whatever happens, and refuses if a forward ran
and a tap did not fire.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cutaway.core.address import Address
from cutaway.core.refuse import Code, Refused
from cutaway.core.sites import SITES
from cutaway.models.access import attention
from cutaway.models.access import state_space as scan
from cutaway.models.access.ports import Port, Side, port
from cutaway.models.anatomy.anatomy import Anatomy

See = Callable[[Tensor], Tensor]  # canonical tensor -> the same object, or its replacement

_ORDER = {row.name: n for n, row in enumerate(SITES)}


class Fired:
    """Which taps of one context have fired, and how many forwards have run to their end."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.taps: list[_Tap] = []
        self.forwards = 0

    def ran(self, *_: Any) -> None:
        """Notice the end of a forward (the hook of the whole model)."""
        self.forwards += 1

    def check(self) -> None:
        """Refuse if a forward ran and a tap was silent."""
        silent = [str(t.place) for t in self.taps if not t.heard]
        if self.forwards and silent:
            names = ", ".join(sorted(silent))
            raise Refused(
                f"tap at {names}",
                "the forward ran and never passed there",
                ("see ", Code("model.sites()"), " for what this model has"),
            )


@dataclass(eq=False, slots=True)
class _Tap:
    place: Address | str
    port: Port
    see: See
    gradient: bool
    heard: bool = False


class _Point:
    """The hook on one side of one module, in which the taps of a place form a chain.

    Later taps of a place get the output of earlier ones (nested edits add up, captures see edits), and places
    follow each other in the order of the site table (head_out before attn_out), whenever they were opened.
    """

    def __init__(self, module: nn.Module, side: Side):
        self.taps: list[_Tap] = []
        self.chains: list[list[_Tap]] = []
        register: Any = module.register_forward_hook if side == "out" else module.register_forward_pre_hook
        self.handle = register(self.after if side == "out" else self.before, with_kwargs=True)

    def arrange(self) -> None:
        """Group the open taps by place."""
        chains: dict[Address | str, list[_Tap]] = {}
        if len(self.taps) == 1:
            self.chains = [list(self.taps)]
            return
        for t in self.taps:
            chains.setdefault(t.place, []).append(t)
        self.chains = [chains[place] for place in sorted(chains, key=_order)]

    def before(self, module: nn.Module, args: Any, kw: Any) -> Any:
        """Show the module's input to the chains."""
        x = start = args[0] if args else kw["hidden_states"]
        for chain in self.chains:
            in_place = chain[0].port.side == "in_place"
            # Edits must not save for backward what is overwritten below.
            shown = x.clone() if in_place and torch.is_grad_enabled() and x.requires_grad else x
            written, _ = _pass(chain, shown, None)
            if not in_place:
                x = written
            elif written is not x:
                x.copy_(written)  # the same object is the residual branch: both readers see the edit
        if x is start:
            return None
        return ((x, *args[1:]), kw) if args else (args, {**kw, "hidden_states": x})

    def after(self, module: nn.Module, args: Any, kw: Any, out: Any) -> Any:
        """Show the module's output to the chains."""
        x = args[0] if args else kw.get("hidden_states", kw.get("input_ids"))
        y = start = tensor_of(out)
        for chain in self.chains:
            _, y = _pass(chain, x, y)
        return None if y is start else with_tensor(out, y)


def _order(place: Address | str) -> int:
    """Return the place's number on one side of a module; places without a site follow those that have one."""
    return len(_ORDER) if isinstance(place, str) else _ORDER[place.site]


# (module, side) -> the open point there. Points of the input side serve "in" and "in_place" ports.
_POINTS: dict[tuple[nn.Module, Side], _Point] = {}
_OPEN: list[Fired] = []  # every open context
_LOCK = threading.RLock()


def around(anatomy: Anatomy) -> list[tuple[str, See]]:
    """Return the open taps of this model, each place with its function, in the order they were attached."""
    return [(str(t.place), t.see) for fired in _OPEN if fired.anatomy is anatomy for t in fired.taps]


def tapped(anatomy: Anatomy, place: Address) -> bool:
    """Return True if a tap is open at a place."""
    if not _POINTS:
        return False
    p = port(anatomy, place)
    point = _POINTS.get((p.module, _hooked(p.side))) if p is not None else None
    return point is not None and any(t.place == place for t in point.taps)


def waiting(anatomy: Anatomy) -> bool:
    """Return True if any open tap of this model has not fired yet."""
    return any(not t.heard for fired in _OPEN if fired.anatomy.hf is anatomy.hf for t in fired.taps)


def busy(anatomy: Anatomy) -> bool:
    """Return True if any tap of this model is open."""
    if not _POINTS and not attention.any_watched():
        return False  # asked before every forward: the walk costs a tenth of a tiny one
    own = set(anatomy.hf.modules())
    return any(module in own for module, _ in _POINTS) or any(attention.is_watched(m) for m in own)


@contextmanager
def asleep(anatomy: Anatomy) -> Iterator[None]:
    """Within the block, no hooked tap of this model sees or changes anything, and none is missed: for runs about the
    model that are not the user's.
    """
    own, ran = set(anatomy.hf.modules()), [(f, f.forwards) for f in _OPEN if f.anatomy.hf is anatomy.hf]
    points = [(p, p.chains) for (module, _), p in _POINTS.items() if module in own]
    try:
        for point, _ in points:
            point.chains = []
        yield
    finally:
        for point, chains in points:
            point.chains = chains
        for fired, forwards in ran:
            fired.forwards = forwards


@contextmanager
def attached(
    anatomy: Anatomy,
    sees: Mapping[Address, See],
    gradient: bool = False,
    others: Mapping[str, tuple[Port, See]] | None = None,
) -> Iterator[Fired]:
    """Attach one function to each place (a site and layer) while open.

    `gradient` puts views and derived reads on the computation's path, so that gradients reach them. `others` are
    places that are no site, by names of their own, each with its port on a side of a module.

    Raises:
        Refused: a place this model does not have, or a tap that did not fire in a forward.
    """
    fired = Fired(anatomy)
    if not sees and not others:
        yield fired
        return
    watched: dict[Side, dict[nn.Module, dict[str, _Tap]]] = {"dispatch": {}, "scan": {}}
    hooked: dict[tuple[nn.Module, Side], list[_Tap]] = {}
    for place, see in sees.items():
        p = port(anatomy, place)
        if p is None:
            raise Refused(
                f"site {place}", f"a {anatomy.family.name} model has no such place", ("see ", Code("model.sites()"))
            )
        tap = _Tap(place, p, see, gradient)
        fired.taps.append(tap)
        if p.side in watched:
            watched[p.side].setdefault(p.module, {})[place.site] = tap
        else:
            hooked.setdefault((p.module, _hooked(p.side)), []).append(tap)
    for name, (p, see) in (others or {}).items():
        fired.taps.append(_Tap(name, p, see, gradient))
        hooked.setdefault((p.module, _hooked(p.side)), []).append(fired.taps[-1])

    with ExitStack() as stack:
        for side, there in watched.items():
            watch = scan.watching if side == "scan" else attention.watching
            stack.enter_context(watch({m: (frozenset(t), _watcher(t)) for m, t in there.items()}))
        stack.callback(_close, hooked)
        _open(hooked)
        stack.callback(_OPEN.remove, fired)
        _OPEN.append(fired)
        stack.callback(anatomy.hf.register_forward_hook(fired.ran).remove)
        yield fired
        fired.check()


def _watcher(taps_there: Mapping[str, _Tap]) -> attention.Watcher:
    chains = {site: [tap] for site, tap in taps_there.items()}
    return lambda site, raw: _pass(chains[site], raw, None)[0]


def _open(hooked: Mapping[tuple[nn.Module, Side], list[_Tap]]) -> None:
    with _LOCK:
        for key, new in hooked.items():
            if key not in _POINTS:
                _POINTS[key] = _Point(*key)
            _POINTS[key].taps += new
            _POINTS[key].arrange()


def _close(hooked: Mapping[tuple[nn.Module, Side], list[_Tap]]) -> None:
    with _LOCK:
        for key, old in hooked.items():
            point = _POINTS.get(key)
            if point is None:
                continue  # interrupted while opening
            point.taps = [t for t in point.taps if t not in old]
            if point.taps:
                point.arrange()
            else:
                point.handle.remove()
                del _POINTS[key]


def _hooked(side: Side) -> Side:
    return "in" if side == "in_place" else side


def _pass(chain: Sequence[_Tap], x: Any, y: Any) -> tuple[Any, Any]:
    """Show one canonical tensor to its chain; returns the module's input and output tensors to go on with."""
    p = chain[0].port
    gradient = chain[0].gradient if len(chain) == 1 else any(t.gradient for t in chain)
    value = p.read(x, y)
    if gradient and p.side == "in" and value is x:
        value = x.view_as(x)  # other modules may read the same tensor; the gradient here is this reader's alone
    new = value
    for tap in chain:
        tap.heard = True
        new = tap.see(new)
    raw = y if p.side == "out" else x
    if new is value and (value is raw or not gradient):
        return x, y
    written = p.write(new, x, y)
    return (x, written) if p.side == "out" else (written, y)


def tensor_of(out: Any) -> Any:
    """Return the tensor in what a module returns: itself, the logits, or the first of a tuple."""
    if isinstance(out, Tensor):
        return out
    return out["logits"] if hasattr(out, "keys") else out[0]


def with_tensor(out: Any, y: Tensor) -> Any:
    """Return a module's output with another tensor in its place."""
    if isinstance(out, Tensor):
        return y
    if hasattr(out, "keys"):
        return type(out)(**{**out, "logits": y})
    return type(out)((y, *out[1:])) if type(out) is not tuple else (y, *out[1:])
