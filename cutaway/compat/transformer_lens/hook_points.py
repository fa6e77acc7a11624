"""Hook points: identity modules with TransformerLens' hooks, and the root module that manages them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cutaway.compat.transformer_lens.utils import Slice
from cutaway.core.refuse import Refused, nearest

Direction = Literal["fwd", "bwd", "both"]
NamesFilter = Callable[[str], bool] | Sequence[str] | str | None
HookFunction = Callable[..., Any]  # (tensor, hook=HookPoint) -> the tensor to go on with, or None
Hooks = Sequence[tuple[str | Callable[[str], bool], HookFunction]]
_PER_HEAD = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_result")


@dataclass
class LensHandle:
    """A hook on a hook point: torch's handle, and who may remove it."""

    hook: RemovableHandle
    is_permanent: bool = False
    context_level: int | None = None
    user_hook: HookFunction | None = None


class HookPoint(nn.Module):
    """An identity module on which hooks see, and may replace, a tensor or its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.fwd_hooks: list[LensHandle] = []
        self.bwd_hooks: list[LensHandle] = []
        self.ctx: dict[Any, Any] = {}
        self.name: str | None = None

    def __repr__(self) -> str:
        bits = [f"name={self.name!r}"] if self.name is not None else []
        bits += [f"{len(h)} {d}" for h, d in ((self.fwd_hooks, "fwd"), (self.bwd_hooks, "bwd")) if h]
        return f"HookPoint({', '.join(bits)})"

    def add_perma_hook(self, hook: HookFunction, dir: Literal["fwd", "bwd"] = "fwd") -> None:
        """Add a hook that `reset_hooks` leaves."""
        self.add_hook(hook, dir, is_permanent=True)

    def add_hook(self, hook, dir="fwd", is_permanent=False, level=None, prepend=False) -> None:
        """Add a hook: `hook(tensor, hook=self)` returns the tensor to go on with, or None for no change."""
        if dir not in ("fwd", "bwd"):
            raise ValueError(f"Invalid direction {dir}")

        def forward(module: nn.Module, given: Any, out: Any) -> Any:
            return hook(out, hook=self)

        def backward(module: nn.Module, given: Any, out: Any) -> Any:
            new = hook(out[0], hook=self)
            return new if new is None or isinstance(new, tuple) else (new,)

        called = f"partial({hook.func!r},...)" if isinstance(hook, partial) else repr(hook)
        forward.__name__ = backward.__name__ = called
        handle = (
            self.register_forward_hook(forward, prepend=prepend)
            if dir == "fwd"
            else self.register_full_backward_hook(backward, prepend=prepend)
        )
        handles = self.fwd_hooks if dir == "fwd" else self.bwd_hooks
        handles.insert(0 if prepend else len(handles), LensHandle(handle, is_permanent, level, hook))

    def has_hooks(self, dir: Direction = "both", including_permanent: bool = True, level: int | None = None) -> bool:
        """Return True if a hook of the direction and level is on this point."""
        return any(
            (including_permanent or not h.is_permanent) and (level is None or h.context_level == level)
            for h in self._of(dir)
        )

    def _of(self, dir: Direction) -> list[LensHandle]:
        if dir not in ("fwd", "bwd", "both"):
            raise ValueError(f"Invalid direction {dir}")
        return (self.fwd_hooks if dir != "bwd" else []) + (self.bwd_hooks if dir != "fwd" else [])

    def remove_hooks(self, dir: Direction = "fwd", including_permanent: bool = False, level: int | None = None) -> None:
        """Remove the hooks of a direction: of one context level, or of all."""
        gone = [
            h
            for h in self._of(dir)
            if including_permanent or (not h.is_permanent and (level is None or h.context_level == level))
        ]
        for handle in gone:
            handle.hook.remove()
        self.fwd_hooks = [h for h in self.fwd_hooks if h not in gone]
        self.bwd_hooks = [h for h in self.bwd_hooks if h not in gone]

    def forward(self, x: Tensor) -> Tensor:
        """Return the tensor itself."""
        return x

    def layer(self) -> int:
        """Return the layer in a name of the form blocks.LAYER.…"""
        return int(str(self.name).split(".")[1])


class HookedRootModule(nn.Module):
    """A module whose hook points are known by name, with TransformerLens' ways of running it."""

    mod_dict: dict[str, nn.Module]
    hook_dict: dict[str, HookPoint]

    def __init__(self, *args: Any):
        super().__init__()
        self.is_caching, self.context_level = False, 0

    def setup(self) -> None:
        """Name every module and hook point; call it when all are made."""
        self.mod_dict = {name: module for name, module in self.named_modules() if name}
        for name, module in self.mod_dict.items():
            module.name = name  # type: ignore[assignment]
        self.hook_dict = {n: m for n, m in self.mod_dict.items() if isinstance(m, HookPoint)}

    def hook_points(self) -> Any:
        """Return the hook points."""
        return self.hook_dict.values()

    def list_hooks(
        self, name_filter: NamesFilter = None, dir: Direction = "both", including_permanent: bool = True
    ) -> dict[str, list[LensHandle]]:
        """Return the hooks by name of their point; points without hooks are left out."""
        chosen = _filter(name_filter)
        found = {
            n: [h for h in p._of(dir) if including_permanent or not h.is_permanent] for n, p in self.hook_dict.items()
        }
        return {n: handles for n, handles in found.items() if handles and chosen(n)}

    def remove_all_hook_fns(self, direction="both", including_permanent=False, level=None) -> None:
        """Remove hooks from all points."""
        for point in self.hook_points():
            point.remove_hooks(direction, including_permanent, level)

    def reset_hooks(self, clear_contexts=True, direction="both", including_permanent=False, level=None) -> None:
        """Remove all hooks but permanent ones."""
        for point in self.hook_points() if clear_contexts else ():
            point.ctx = {}
        self.remove_all_hook_fns(direction, including_permanent, level)
        self.is_caching = False

    def check_hooks_to_add(self, hook_point: HookPoint, hook_point_name: str, hook: HookFunction, **_: Any) -> None:
        """Refuse hooks that would not fire; subclasses say which."""

    def _points(self, name: str | Callable[[str], bool]) -> list[tuple[str, HookPoint]]:
        if callable(name):
            return [(n, p) for n, p in self.hook_dict.items() if name(n)]
        if name not in self.hook_dict:
            near = nearest(name, self.hook_dict, 3)
            why = "the model has no hook point of that name" + (f"; near: {near}" if near else "")
            raise Refused(f"hook {name!r}", why, "see model.hook_dict for all names")
        return [(name, self.hook_dict[name])]

    def _add(self, name: str | Callable[[str], bool], hook: HookFunction, check: bool = True, **how: Any) -> None:
        for n, point in self._points(name):
            if check and not callable(name):
                self.check_hooks_to_add(point, n, hook)
            point.add_hook(hook, **how)

    def add_hook(self, name, hook, dir="fwd", is_permanent=False, level=None, prepend=False) -> None:
        """Add a hook to one point, or to all whose names a function accepts.

        Raises:
            Refused: no such hook point, or one that would not fire.
        """
        self._add(name, hook, dir=dir, is_permanent=is_permanent, level=level, prepend=prepend)

    def add_perma_hook(
        self, name: str | Callable[[str], bool], hook: HookFunction, dir: Literal["fwd", "bwd"] = "fwd"
    ) -> None:
        """Add a hook that `reset_hooks` leaves."""
        self._add(name, hook, dir=dir, is_permanent=True)

    @contextmanager
    def hooks(
        self, fwd_hooks=(), bwd_hooks=(), reset_hooks_end=True, clear_contexts=False, _check=True
    ) -> Iterator[Any]:
        """Within the block, these hooks are on the model."""
        try:
            self.context_level += 1
            for dir, hooks in (("fwd", fwd_hooks), ("bwd", bwd_hooks)):
                for name, hook in hooks:
                    self._add(name, hook, _check, dir=dir, level=self.context_level)
            yield self
        finally:
            if reset_hooks_end:
                self.reset_hooks(clear_contexts, including_permanent=False, level=self.context_level)
            self.context_level -= 1

    def run_with_hooks(
        self, *model_args, fwd_hooks=(), bwd_hooks=(), reset_hooks_end=True, clear_contexts=False, **model_kwargs
    ) -> Any:
        """Run the model with these hooks; backward hooks need `reset_hooks_end=False` to see a backward pass."""
        if bwd_hooks and reset_hooks_end:
            logging.warning("hooks are reset at the end of run_with_hooks, before a backward pass can reach them")
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*model_args, **model_kwargs)

    def get_caching_hooks(
        self, names_filter=None, incl_bwd=False, device=None, remove_batch_dim=False, cache=None, pos_slice=None
    ) -> tuple[dict[str, Tensor], list[tuple[str, HookFunction]], list[tuple[str, HookFunction]]]:
        """Return a dictionary, and the forward and backward hooks that fill it."""
        cache, cut, chosen = {} if cache is None else cache, Slice.unwrap(pos_slice), _filter(names_filter)
        self.is_caching = True

        def save(tensor: Tensor, hook: HookPoint, is_backward: bool = False) -> None:
            name = str(hook.name)
            kept = tensor.detach().to(device)
            kept = kept[0] if remove_batch_dim else kept
            axis = -3 if name.endswith(_PER_HEAD) else -2
            cache[name + "_grad" * is_backward] = cut.apply(kept, dim=axis) if tensor.dim() >= -axis else kept

        if names_filter is not None and not callable(names_filter):
            for name in [names_filter] if isinstance(names_filter, str) else names_filter:
                self._points(name)
        names = [n for n in self.hook_dict if chosen(n)]
        back = [(n, partial(save, is_backward=True)) for n in names] if incl_bwd else []
        return cache, [(n, save) for n in names], back

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: Any = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Run the model and return its output and the activations by hook name."""
        cache, forward, backward = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, pos_slice=pos_slice
        )
        # Caches hold what fires: no point is refused for a switch that is off.
        with self.hooks(forward, backward, reset_hooks_end, clear_contexts, _check=False):
            out = self(*model_args, **model_kwargs)
            if incl_bwd:
                out.backward()
        return out, cache


def _filter(names: NamesFilter) -> Callable[[str], bool]:
    if names is None:
        return lambda name: True
    if callable(names):
        return names
    return {names}.__contains__ if isinstance(names, str) else set(names).__contains__
