"""Hand-written hooks on plain transformers, without the package: what every number in this room is held against.

One prompt at a time, without padding and without a cache. Both models are laid out as Llama is; Gemma 3 also norms what
attention and MLP write, and its norms multiply by 1 + weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[str, int]  # site and layer
Change = Callable[[Tensor], Tensor]
Cuts = Mapping[int, Iterable[tuple[int, int]]]  # layer → edges (query, key) that attention may not use


def module(hf: Any, site: str, layer: int) -> tuple[nn.Module, str]:
    """The module at which a site is, and whether it is what goes in or what comes out."""
    block = hf.model.layers[layer]
    normed = hasattr(block, "post_feedforward_layernorm")
    return {
        "resid_pre": (block, "in"),
        "resid_post": (block, "out"),
        "attn_out": (block.post_attention_layernorm if normed else block.self_attn.o_proj, "out"),
        "mlp_out": (block.post_feedforward_layernorm if normed else block.mlp.down_proj, "out"),
        "z": (block.self_attn.o_proj, "in"),
        "v": (block.self_attn.v_proj, "out"),
        "mlp_post": (block.mlp.down_proj, "in"),
    }[site]


@contextmanager
def hooked(hf: Any, changes: Mapping[Place, Change], cuts: Cuts | None = None) -> Iterator[None]:
    """While open, every place's value goes through its function, and the cut edges get no attention."""
    handles = [_hook(*module(hf, *place), change) for place, change in changes.items()]
    for layer, edges in (cuts or {}).items():
        attention = hf.model.layers[layer].self_attn
        handles.append(attention.register_forward_pre_hook(_masked(hf, layer, list(edges)), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(m: nn.Module, side: str, change: Change) -> Any:
    if side == "in":
        return m.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    return m.register_forward_hook(
        lambda _, args, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
    )


def _masked(hf: Any, layer: int, edges: list[tuple[int, int]]) -> Callable[..., Any]:
    """A hook that gives one layer's attention a mask of its own."""

    def before(_: nn.Module, args: Any, kw: dict[str, Any]) -> Any:
        hidden = kw["hidden_states"] if "hidden_states" in kw else args[0]
        n = hidden.shape[1]
        mask = sees(hf, layer, n)
        for query, key in edges:
            mask[query, key] = False
        least = torch.finfo(hidden.dtype).min
        return args, {**kw, "attention_mask": torch.zeros(n, n).masked_fill(~mask, least)[None, None].to(hidden.dtype)}

    return before


def sees(hf: Any, layer: int, n: int) -> Tensor:
    """Which key each query of a layer may attend to: [query, key]."""
    at = torch.arange(n)
    mask = at[:, None] >= at[None]
    types = getattr(hf.config, "layer_types", None)
    if types is not None and types[layer] == "sliding_attention":
        mask &= at[:, None] - at[None] < hf.config.sliding_window
    return mask


def last(
    hf: Any, ids: Sequence[int], changes: Mapping[Place, Change] | None = None, cuts: Cuts | None = None
) -> Tensor:
    """Logits after the last token, [token]."""
    with hooked(hf, changes or {}, cuts), torch.no_grad():
        return hf(torch.tensor([list(ids)]), use_cache=False, logits_to_keep=1).logits[0, -1].float()


def read(hf: Any, ids: Sequence[int], places: Iterable[Place]) -> tuple[Tensor, dict[Place, Tensor]]:
    """Last logits, and the value at each place: [position, …], heads on an axis of their own."""
    found: dict[Place, Tensor] = {}

    def keep(place: Place) -> Change:
        def see(x: Tensor) -> Tensor:
            found[place] = split(hf, place[0], x)[0].clone()
            return x

        return see

    logits = last(hf, ids, {place: keep(place) for place in places})
    return logits, found


def split(hf: Any, site: str, x: Tensor) -> Tensor:
    """z and v with their heads on an axis; everything else as it is."""
    return x.unflatten(-1, (-1, hf.config.head_dim)) if site in ("z", "v") else x


def put(hf: Any, site: str, value: Tensor | float, head: int | None = None, at: Sequence[int] | None = None) -> Change:
    """A change that writes `value` at one head (or all of the site) and at some positions (or all)."""

    def change(x: Tensor) -> Tensor:
        new = split(hf, site, x).clone()
        where = slice(None) if at is None else list(at)
        if head is None:
            new[0, where] = value
        else:
            new[0, where, head] = value
        return new.reshape(x.shape)

    return change


def slopes(hf: Any, ids: Sequence[int], places: Iterable[Place], answer: int, foil: int) -> dict[Place, Tensor]:
    """Gradient of logit(answer) − logit(foil) after the last token at each place."""
    kept: dict[Place, Tensor] = {}

    def keep(place: Place) -> Change:
        def see(x: Tensor) -> Tensor:
            kept[place] = x
            x.retain_grad()
            return x

        return see

    begin: dict[Place, Change] = {("resid_pre", 0): lambda x: x.detach().requires_grad_()}
    with hooked(hf, begin | {p: keep(p) for p in places if p != ("resid_pre", 0)}):
        logits = hf(torch.tensor([list(ids)]), use_cache=False, logits_to_keep=1).logits[0, -1]
        (logits[answer] - logits[foil]).backward()
    return {p: split(hf, p[0], x.grad)[0] for p, x in kept.items()}


def shares(hf: Any, ids: Sequence[int], answer: int, foil: int) -> dict[str, float]:
    """What embedding, heads and MLPs write toward answer over foil at the last position, all scales frozen; float64."""
    n = len(hf.model.layers)
    every: list[Place] = [("resid_pre", 0), ("resid_post", n - 1)]
    _, found = read(hf, ids, [*every, *((s, i) for s in ("z", "mlp_out") for i in range(n))])
    at = {place: x[-1].double() for place, x in found.items()}
    parts = {"embed": at["resid_pre", 0]}
    for i, block in enumerate(hf.model.layers):
        z, w = at["z", i], block.self_attn.o_proj.weight.double()
        heads = torch.stack([w[:, h * z.shape[1] : (h + 1) * z.shape[1]] @ z[h] for h in range(len(z))])
        if hasattr(block, "post_feedforward_layernorm"):
            heads = normed(hf, block.post_attention_layernorm, heads.sum(0), heads)
        parts |= {f"head_out.{i}.{h}": x for h, x in enumerate(heads)} | {f"mlp_out.{i}": at["mlp_out", i]}
    toward = (hf.lm_head.weight[answer] - hf.lm_head.weight[foil]).double()
    total = at["resid_post", n - 1]
    return {name: float(normed(hf, hf.model.norm, total, x) @ toward) for name, x in parts.items()}


def normed(hf: Any, norm: Any, whole: Tensor, part: Tensor) -> Tensor:
    """What a norm makes of a part of its input, with the scale of the whole."""
    scale = (whole.pow(2).mean() + hf.config.rms_norm_eps).sqrt()
    weight = norm.weight.double() + (1 if "Gemma" in type(norm).__name__ else 0)
    return part / scale * weight


def continued(
    hf: Any, ids: Sequence[int], new: int, changes: Mapping[Place, Change] | None = None, cuts: Cuts | None = None
) -> list[int]:
    """Greedy continuation by whole forwards, until an end token."""
    ends, out = hf.generation_config.eos_token_id, list(ids)
    ends = ends if isinstance(ends, list) else [ends]
    for _ in range(new):
        out.append(int(last(hf, out, changes, cuts).argmax()))
        if out[-1] in ends:
            break
    return out[len(ids) :]
