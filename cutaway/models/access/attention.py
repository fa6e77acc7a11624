"""Attention taps: queries, keys, values, scores and patterns of any family, with the model's own kernels.

Two mechanisms, both inert unless a module is being watched, both gone afterwards:

* a name-preserving dispatch over transformers' attention registry: the registered functions are wrapped under their
  own names while a tap is open, so families that compare names, and masks chosen by name, see no change;
* a torch function mode inside modules that compute attention inline (GPT-J, BLOOM, Falcon …).

Scores and patterns are those of the family's own eager attention: soft caps, masks and casts are never imitated.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cutaway.core.refuse import Code, Refused
from cutaway.models.access.positions import FRAME

# Watched module -> functions that see (site, raw tensor) and return it or its replacement, outermost first.
Watcher = Callable[[str, Tensor], Tensor]
_WATCHED: dict[nn.Module, list[tuple[frozenset[str], Watcher]]] = {}
_LOCK = threading.RLock()
_INSTALLED: dict[str, Any] = {"count": 0, "originals": {}}
_FORWARDS: dict[nn.Module, Any] = {}  # what stood in __dict__["forward"]: another library's wrapper, or nothing
_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "baddbmm"})
SITES = frozenset({"q", "k", "v", "scores", "pattern"})
FORMED = ("scores", "pattern")


Switch = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Eager:
    """A call of a family's eager attention that is not made whole: `access.tiles` makes it on parts.

    Attributes:
        function: the family's eager attention.
        module: the attention module.
        query: queries [batch, head, position, d_head].
        key: keys [batch, kv_head, position, d_head].
        value: values, likewise.
        mask: the mask that the model's own kernel got; None for none.
        causal: True if that kernel hides the keys behind each query itself.
        keywords: the other arguments.
    """

    function: Callable[..., Any]
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    keywords: dict[str, Any]


@contextmanager
def watching(
    watchers: Mapping[nn.Module, tuple[frozenset[str], Watcher]],
    opens: Switch | None = None,
    closes: Switch | None = None,
) -> Iterator[None]:
    """Within the block, each attention module's watcher gets its q, k, v, scores or pattern, of those sites only.

    The tensors are raw: [batch, head, position, …]. `opens` and `closes` prepare a module of another kind.
    """
    opened: list[nn.Module] = []
    opens, closes = opens or _open, closes or _close
    try:
        with _LOCK:
            for module, watcher in watchers.items():
                if module not in _WATCHED:
                    opens(module)
                _WATCHED.setdefault(module, []).append(watcher)
                opened.append(module)
        yield
    finally:
        with _LOCK:
            for module in opened:
                _WATCHED[module].remove(watchers[module])
                if not _WATCHED[module]:
                    del _WATCHED[module]
                    closes(module)


def is_watched(module: nn.Module) -> bool:
    """Return True if the module is watched at present."""
    return module in _WATCHED


def any_watched() -> bool:
    """Return True if any module of any model is watched at present."""
    return bool(_WATCHED)


def watchers(module: nn.Module, site: str) -> list[Callable[[Tensor], Tensor]]:
    """Return the functions that see one site of a module, outermost first."""
    return [partial(see, site) for sites, see in _WATCHED.get(module, ()) if site in sites]


def uses_interface(module: nn.Module) -> bool:
    """Return True if the module hands its attention to transformers' registry."""
    return _calls_interface(type(module))


@cache
def _calls_interface(kind: type) -> bool:
    return "get_interface(" in inspect.getsource(kind.forward)  # type: ignore[attr-defined]


def seen(module: nn.Module, site: str, x: Tensor) -> Tensor:
    """Pass a site's tensor through its watchers and return the outcome."""
    for sites, see in _WATCHED[module]:
        if site in sites:
            x = see(site, x)
    return x


def shown(module: nn.Module, site: str, x: Tensor, keys: int) -> Tensor:
    """Pass the first `keys` columns of k, v, scores or pattern, which are tokens, through their watchers.

    The other columns are sinks of the softmax, or what a cache of fixed size has left over; they stay as they are.
    """
    axis = -1 if site in FORMED else -2
    more = x.shape[axis] - keys
    if more <= 0:
        return seen(module, site, x)
    part = x.narrow(axis, 0, keys)
    new = seen(module, site, part)
    return x if new is part else torch.cat([new, x.narrow(axis, keys, more)], axis)


def _filled(keys: int) -> int:
    frame = FRAME.get()
    return keys if frame is None else frame.filled(keys)


def wants(module: nn.Module, *sites: str) -> bool:
    """Return True if one of these sites of a module is watched."""
    return any(s in wanted for wanted, _ in _WATCHED.get(module, ()) for s in sites)


def _open(module: nn.Module) -> None:
    _install() if uses_interface(module) else wrap(module, _inline_forward(module, module.forward))


def _close(module: nn.Module) -> None:
    _uninstall() if uses_interface(module) else unwrap(module)


def _install() -> None:
    from transformers import AttentionInterface

    if _INSTALLED["count"] == 0:
        registry = AttentionInterface._global_mapping
        _INSTALLED["originals"] = dict(registry)
        for key in [*registry, "eager"]:
            registry[key] = _dispatcher(key, registry.get(key))
    _INSTALLED["count"] += 1


def _uninstall() -> None:
    from transformers import AttentionInterface

    _INSTALLED["count"] -= 1
    if _INSTALLED["count"] == 0:
        registry, originals = AttentionInterface._global_mapping, _INSTALLED["originals"]
        for key in [k for k, function in registry.items() if getattr(function, "_cutaway", False)]:
            if key in originals:
                registry[key] = originals[key]
            else:
                del registry[key]


@cache
def _dispatcher(name: str, original: Callable[..., Any] | None) -> Callable[..., Any]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kw: Any
    ) -> Any:
        attention_mask = _apart(module, query, key, attention_mask, kw.get("is_causal"))
        if original is not None and module not in _WATCHED:
            return original(module, query, key, value, attention_mask, **kw)
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        own = original or eager
        if own is None:
            raise Refused(
                f"attention of {type(module).__name__}", "it has no eager form", Code("load it with attention='sdpa'")
            )
        if module not in _WATCHED:
            return own(module, query, key, value, attention_mask, **kw)
        keys = _filled(key.shape[2])
        q, k, v = seen(module, "q", query), shown(module, "k", key, keys), shown(module, "v", value, keys)
        if not wants(module, *FORMED, "tiles"):
            return own(module, q, k, v, attention_mask, **kw)
        if name not in ("eager", "sdpa") or eager is None:
            raise Refused(
                f"scores of {type(module).__name__} under {name!r} attention",
                "that kernel never forms them and its masks have another shape",
                Code("load the model with attention='sdpa' or 'eager'"),
            )
        if wants(module, "tiles"):
            causal = name == "sdpa" and attention_mask is None and _causal(module, kw.get("is_causal"))
            parts = Eager(eager, module, q, k[:, :, :keys], v[:, :, :keys], attention_mask, causal, kw)
            _show(module, parts)
        if not wants(module, *FORMED):
            return own(module, q, k, v, attention_mask, **kw)
        mask = _additive(module, q, k, attention_mask, kw.get("is_causal")) if name == "sdpa" else attention_mask
        with _SoftmaxTap(module, keys):
            return eager(module, q, k, v, mask, **kw)

    attend._cutaway = True  # type: ignore[attr-defined]
    return attend


def _apart(module: nn.Module, q: Tensor, k: Tensor, mask: Any, causal: bool | None) -> Any:
    """Return a mask that also hides from each continuation of a prompt the others beside it, where there are several.

    A sliding window counts columns, and a later continuation stands further from its prompt than its positions say: it
    sees of the prompt what the column of its position sees.
    """
    frame = FRAME.get()
    tails = None if frame is None else frame.tails(q.device)
    if frame is None or tails is None:
        return mask
    own = slice(frame.offset, frame.offset + q.shape[2])
    several = slice(None) if len(tails.hidden) == len(q) else slice(1)  # a growing batch has prompts of one layout
    hidden, prompt = tails.hidden[several, own], tails.prompt[several, None, None]
    whole = _additive(module, q, k, mask, causal)
    if whole is None:
        whole = torch.zeros((), dtype=q.dtype, device=q.device)
    else:
        whole = whole[..., : hidden.shape[-1]].expand(max(len(whole), len(hidden)), -1, -1, -1)
        rows = (tails.origin[several, own] - frame.offset)[:, None, :, None]
        whole = torch.where(prompt, whole.gather(2, rows.expand(len(whole), whole.shape[1], -1, whole.shape[3])), whole)
    return whole.masked_fill(hidden[:, None], torch.finfo(q.dtype).min)


def _additive(module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool | None) -> Tensor | None:
    """Return the additive mask that the eager form needs, from what the fused kernel was given (None or boolean)."""
    causal = _causal(module, causal)
    if mask is None and causal and q.shape[2] > 1:
        key = (q.shape[2], k.shape[2], q.dtype, q.device)
        frame = FRAME.get()
        made = frame.masks if frame is not None else {}  # the layers of one forward share theirs
        if key not in made:
            hidden = torch.full((1, 1, *key[:2]), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device)
            made[key] = hidden.triu_(1)  # as the fused kernel counts: from the first column on
        return made[key]
    if mask is not None and mask.dtype == torch.bool:
        zero = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        mask = zero.masked_fill(~mask, torch.finfo(q.dtype).min)
    return mask


def _causal(module: nn.Module, given: bool | None) -> bool:
    return getattr(module, "is_causal", True) if given is None else given


def _show(module: nn.Module, call: Eager) -> None:
    for sites, see in _WATCHED[module]:
        if "tiles" in sites:
            see("tiles", call)  # type: ignore[arg-type]


class _SoftmaxTap(TorchFunctionMode):
    """Around an eager attention function: the first softmax's argument is `scores`, its value `pattern`."""

    def __init__(self, module: nn.Module, keys: int):
        super().__init__()
        self.module, self.keys, self.done = module, keys, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.done and getattr(func, "__name__", "") == "softmax":
            self.done = True
            scores = shown(self.module, "scores", args[0], self.keys)
            return shown(self.module, "pattern", func(scores, *args[1:], **(kwargs or {})), self.keys)
        return func(*args, **(kwargs or {}))


class _InlineTap(TorchFunctionMode):
    """Inside a module that computes attention itself: the products around its softmax carry q, k and v."""

    def __init__(self, module: nn.Module, heads: int):
        super().__init__()
        self.module, self.heads, self.stage, self.keys = module, heads, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._fused(func, args, kwargs)
        if name in _PRODUCTS and self.stage in (0, 2) and _is_batched(args, kwargs):
            self.stage += 1
            return self._product(func, name, args, kwargs)
        if name == "softmax" and self.stage == 1:
            self.stage = 2
            raw = _hiding(self._headed(args[0]))
            scores = self._flat(shown(self.module, "scores", raw, self.keys), args[0])
            pattern = func(scores, *args[1:], **kwargs)
            return self._flat(shown(self.module, "pattern", self._headed(pattern), self.keys), pattern)
        return func(*args, **kwargs)

    def _product(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        named, at = "batch1" in kwargs, 1 if name == "baddbmm" else 0
        a, b = (kwargs["batch1"], kwargs["batch2"]) if named else args[at : at + 2]
        if self.stage == 1:
            a = self._flat(seen(self.module, "q", self._headed(a)), a)
            k, self.keys = b.transpose(-1, -2), _filled(b.shape[-1])
            b = self._flat(shown(self.module, "k", self._headed(k), self.keys), k).transpose(-1, -2)
        else:
            b = self._flat(shown(self.module, "v", self._headed(b), self.keys), b)
        return (
            func(*args, **{**kwargs, "batch1": a, "batch2": b})
            if named
            else func(*args[:at], a, b, *args[at + 2 :], **kwargs)
        )

    def _fused(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.stage = 3  # products further on in the module, of an edit at its output say, are no attention
        keys = _filled(args[1].shape[-2])
        q = seen(self.module, "q", args[0])
        k, v = (shown(self.module, s, x, keys) for s, x in zip("kv", args[1:3], strict=True))
        given, causal = kwargs.get("attn_mask"), bool(kwargs.get("is_causal"))
        mask = _apart(self.module, q, k, given, causal)
        if mask is not given:
            kwargs = {**kwargs, "attn_mask": mask, "is_causal": False}
        if not wants(self.module, *FORMED):
            return func(q, k, v, *args[3:], **kwargs)
        scores = q @ k.transpose(-1, -2) * (kwargs.get("scale") or 1 / math.sqrt(q.shape[-1]))
        mask = _additive(self.module, q, k, mask, bool(kwargs.get("is_causal")))
        scores = shown(self.module, "scores", scores if mask is None else scores + mask, keys)
        return shown(self.module, "pattern", scores.softmax(-1), keys).to(v.dtype) @ v

    def _headed(self, x: Tensor) -> Tensor:
        return x if x.ndim == 4 else x.view(-1, self.heads, *x.shape[1:])

    def _flat(self, new: Tensor, old: Tensor) -> Tensor:
        return new if new.ndim == old.ndim else new.reshape(old.shape)


def _hiding(scores: Tensor) -> Tensor:
    """Hide each continuation of a prompt from the others, in scores [batch, head, query, key]."""
    frame = FRAME.get()
    found = None if frame is None else frame.tails(scores.device)
    return scores if found is None else scores.masked_fill(found.hidden[:, None], torch.finfo(scores.dtype).min)


def _is_batched(args: Any, kwargs: Any) -> bool:
    """Return True if a product is of two activations, not of an activation and a weight matrix."""
    other = kwargs.get("batch2", args[1] if len(args) > 1 else None)
    return isinstance(other, Tensor) and other.ndim >= 3


def wrap(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Run `forward` instead of a module's own, until `unwrap`."""
    _FORWARDS[module] = module.__dict__.get("forward")
    module.__dict__["forward"] = forward


def unwrap(module: nn.Module) -> None:
    """Give a module its own forward back."""
    before = _FORWARDS.pop(module)
    if before is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = before


def _inline_forward(module: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head")
    heads = next((int(h) for n in names if (h := getattr(module, n, None))), 1)

    def forward(*args: Any, **kw: Any) -> Any:
        if module not in _WATCHED:
            return plain(*args, **kw)
        with _InlineTap(module, heads):
            return plain(*args, **kw)

    return forward
