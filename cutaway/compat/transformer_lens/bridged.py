"""The bridge: TransformerLens' tree of components over a house model, whose taps call the hook points.

Every hook point knows its port: the place in the forward where its tensor is read and written. Where the house has a
site for it, the port is the site's. A hook point without hooks costs nothing: only those with hooks, or with
another module put in their place, are tapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from cutaway.compat.transformer_lens import native
from cutaway.compat.transformer_lens.config import HookedTransformerConfig as Config
from cutaway.compat.transformer_lens.factored_matrix import Circuits
from cutaway.compat.transformer_lens.hook_points import HookPoint
from cutaway.compat.transformer_lens.utils import repeat_along_head_dimension
from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.models.access import forward, taps
from cutaway.models.access.ports import Port, port
from cutaway.models.access.positions import FRAME, ForwardFrame
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.anatomy.families import find
from cutaway.models.anatomy.norms import Norm, measure, wide
from cutaway.models.anatomy.projections import projection
from cutaway.models.model import Model
from cutaway.models.sweep.partial_forward import entered
from cutaway.models.tokens import Tokens

_SITES = {  # hook points of a block, in the order of the forward, and the house's sites
    "hook_resid_pre": "resid_pre", "attn.hook_rot_q": "q", "attn.hook_rot_k": "k",
    "attn.hook_attn_scores": "scores", "attn.hook_pattern": "pattern", "attn.hook_z": "z",
    "attn.hook_result": "head_out", "hook_attn_out": "attn_out", "hook_resid_mid": "resid_mid",
    "mlp.hook_post": "mlp_post", "hook_mlp_out": "mlp_out",
    "hook_resid_post": "resid_post",
}  # fmt: skip
_ATTENTION = {
    "W_Q": "q", "W_O": "o", "b_Q": "q_bias", "b_O": "o_bias", "W_K": "k", "W_V": "v", "b_K": "k_bias", "b_V": "v_bias",
}  # fmt: skip
_SHARED = ("W_K", "W_V", "b_K", "b_V")
_AS_IT_IS = (lambda x, y: x, lambda new, x, y: new)  # what a module reads
_FOLDED = ("ln1", "ln2")
_NORM_POINTS = ["scale", "normalized"]
_WHOLE = {"hook_embed": "embed", "hook_pos_embed": "pos_embed"}


_METHODS = ("apply_causal_mask", "_mlp")  # of native components, which those of a bridged model borrow


class Part(Circuits, nn.Module):
    """A component: hook points, and the weights that its model has under TransformerLens' names.

    Weights are read off the live model at each access; they are views of its memory where it stores them so. Called by
    itself, it computes what the native component of its kind computes with them.
    """

    def __init__(
        self,
        cfg: Config,
        points: list[str],
        weights: Mapping[str, Callable[[], Tensor]],
        kind: Any = None,
        **facts: Any,
    ):
        super().__init__()
        self.cfg = cfg
        self.__dict__.update(facts, weights=dict(weights), kind=kind)
        for name in points:
            setattr(self, f"hook_{name}", HookPoint())

    def forward(self, *args: Any, **named: Any) -> Any:
        """Compute what the component makes of its input, by itself.

        Raises:
            Refused: attention or a block, which only the model's own forward computes.
        """
        if self.kind is None:
            instead = "run the model, with start_at_layer= and stop_at_layer="
            raise Refused(f"a call of {self.name}", "a bridged model computes it only within its forward", instead)
        return self.kind.forward(self, *args, **named)

    def __getattr__(self, name: str) -> Any:
        if (read := self.__dict__.get("weights", {}).get(name)) is not None:
            return read()
        if name in _METHODS and self.kind is not None:
            return MethodType(getattr(self.kind, name), self)
        return super().__getattr__(name)

    def state_dict(self, *_: Any, prefix: str = "", **__: Any) -> dict[str, Tensor]:
        """Return the weights under TransformerLens' names, those of its own parts included."""
        return {f"{prefix}{name}": read().detach() for name, read in reads(self).items()}


def reads(root: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Return how the weights of all parts below are read, by name; keys and values that heads share stand once."""
    parts = {f"{n}." * bool(n): m.weights for n, m in root.named_modules() if isinstance(m, Part)}
    return {f"{n}{w}": read for n, own in parts.items() for w, read in own.items() if f"_{w}" not in own}


def components(house: Model, cfg: Config) -> dict[str, nn.Module]:
    """Make the tree: embed, pos_embed, blocks, ln_final and unembed, with the hook points of the whole model."""
    w, a = house.weights, house.anatomy
    pos: Any = a.top("pos")
    tree: dict[str, nn.Module] = {"hook_embed": HookPoint()}
    tree["embed"] = Part(cfg, [], {"W_E": lambda: embedding(house)}, native.Embed)
    if pos is not None:
        start = max(pos.weight.shape[0] - cfg.n_ctx, 0)  # OPT's rows begin behind its padding
        tree |= {
            "pos_embed": Part(cfg, [], {"W_pos": lambda: pos.weight[start:]}, native.PosEmbed),
            "hook_pos_embed": HookPoint(),
        }
    tree["blocks"] = nn.ModuleList(_block(house, cfg, i) for i in range(cfg.n_layers))
    if (final := a.top("final")) is not None:
        tree["ln_final"] = _norm(a, final, cfg)
    tree["unembed"] = Part(
        cfg, ["in", "out"], {"W_U": lambda: w.unembed, "b_U": lambda: w.unembed_bias}, native.Unembed
    )
    return tree


def embedding(house: Model) -> Tensor:
    """Return W_E as the stream gets it: the rows times the factor of the family's own scaling (Gemma)."""
    rows = house.weights.embed
    if house.anatomy.top("pos") is not None:
        return rows
    seen = house.capture(torch.zeros(1, 1, dtype=torch.long), "embed", logits=False)["embed"][0, 0]
    own = rows[0].detach().to(seen)
    factor = float((seen @ own) / (own @ own))
    return rows if abs(factor - 1) < 1e-3 else rows * factor


def _norm(a: Anatomy, module: Any, cfg: Config) -> Part:
    rms, folded = "RMS" in str(cfg.normalization_type), _is_folded(cfg) or module is None
    there: Any = module
    own: dict[str, Callable[[], Tensor]] = {} if folded else {"w": lambda: a.norm(there).weight}
    own |= {} if folded or rms else {"b": lambda: a.norm(there).bias}
    return Part(cfg, _NORM_POINTS, own, native.Norm, rms=rms, pre=folded, eps=cfg.eps)


def _block(house: Model, cfg: Config, i: int) -> Part:
    w, a = house.weights, house.anatomy
    plain = cfg.positional_embedding_type == "standard"  # then the native components compute the same
    block = Part(cfg, native.block_points(cfg), {}, native.TransformerBlock if plain else None)
    own = cfg.n_key_value_heads is not None
    group = cfg.n_heads // (cfg.n_key_value_heads or cfg.n_heads)
    heads: dict[str, Any] = {name: lambda of=of: getattr(w, of)[i] for name, of in _ATTENTION.items()}
    if own:  # queries share keys and values: W_K repeats _W_K
        heads |= {f"_{n}": heads[n] for n in _SHARED}
        heads |= {n: lambda read=heads[f"_{n}"]: read().repeat_interleave(group, 0) for n in _SHARED}
    rotary = ["rot_k", "rot_q"] if cfg.positional_embedding_type == "rotary" else []
    block.ln1 = _norm(a, a.part(i, "ln1"), cfg)
    if not cfg.attn_only:
        block.ln2 = _norm(a, a.part(i, "ln2") or a.part(i, "ln1"), cfg)
    block.attn = Part(
        cfg,
        ["k", "q", "v", "z", "attn_scores", "pattern", "result", *rotary],
        heads,
        native.Attention if plain else None,
    )
    causal = {"IGNORE": torch.tensor(-torch.inf), "attn_type": "global"}
    block.attn.__dict__.update(causal if plain else {}, attn_scale=cfg.attn_scale, group=group)
    for name in ("q_norm", "k_norm") if _head_norm(a, i, "q_norm") is not None else ():
        setattr(block.attn, name, Part(cfg, _NORM_POINTS, {}))
    for name in ("ln1_post", "ln2_post") if cfg.use_normalization_before_and_after else ():
        post: Any = a.part(i, name)
        setattr(block, name, Part(cfg, _NORM_POINTS, {"w": lambda post=post: a.norm(post).weight}))
    if not cfg.attn_only:
        mlp: dict[str, Callable[[], Tensor]] = {"W_in": lambda: w.mlp_in[i]}
        mlp |= {"W_gate": lambda: w.mlp_gate[i]} if cfg.gated_mlp else {}
        mlp["b_in"] = lambda: w.mlp_in_bias[i] * (0 if cfg.gated_mlp else 1)  # a gated one's is added elsewhere
        mlp |= {"W_out": lambda: w.mlp_out[i], "b_out": lambda: w.mlp_out_bias[i]}
        points = ["pre", "post", *(["pre_linear"] if cfg.gated_mlp else [])]
        block.mlp = Part(cfg, points, mlp, native.MLP, act_fn=native.activation(str(cfg.act_fn)))
    return block


Place = Address | Port


def places(house: Model, cfg: Config) -> dict[str, Place]:
    """Return where every hook point of this model lies, in the order of the forward: at a site, or at a port."""
    a, found = house.anatomy, dict[str, Place | None]()
    for name in ("hook_embed", "hook_pos_embed"):
        found[name] = Address(_WHOLE[name])
    for i in range(cfg.n_layers):
        own: dict[str, Place | None] = {name: Address(site, i) for name, site in _SITES.items()}
        own |= {f"attn.hook_{letter}": _projected(a, i, letter) for letter in "qkv"}
        for name in ("ln1", "ln2", "ln1_post", "ln2_post"):
            own |= _norm_places(name, a.part(i, name), a, name in _FOLDED and _is_folded(cfg))
        for name in ("q_norm", "k_norm"):
            own |= _norm_places(f"attn.{name}", _head_norm(a, i, name), a, False)
        own["mlp.hook_pre"] = Address("mlp_gate" if cfg.gated_mlp else "mlp_pre", i)
        own["mlp.hook_pre_linear"] = Address("mlp_pre", i) if cfg.gated_mlp else None
        if (ln2 := a.part(i, "ln2")) is not None:
            own["hook_mlp_in"] = Port(ln2, "in", *_AS_IT_IS)
        found |= {f"blocks.{i}.{name}": place for name, place in own.items()}
    found |= _norm_places("ln_final", a.top("final"), a, _is_folded(cfg))
    if a.unembed is not None:
        found["unembed.hook_in"] = Port(a.unembed, "in", *_AS_IT_IS)
        found["unembed.hook_out"] = Port(a.unembed, "out", lambda x, y: y, lambda new, x, y: new)
    there = {n: p for n, p in found.items() if isinstance(p, Port) or (p is not None and port(a, p) is not None)}
    return {n: p for n, p in there.items() if str(getattr(p, "site", "")) not in house.disabled}


def _projected(a: Anatomy, layer: int, letter: Any) -> Place:
    """Return the port of queries, keys or values as the projection gives them, before norms and rotation."""
    found = projection(a, layer, letter)
    if found is None:
        return Address(letter, layer)
    module, columns = found
    flat = columns.flatten()
    first, n = int(flat[0]), len(flat)
    together = torch.equal(flat, torch.arange(first, first + n))
    at: Any = slice(first, first + n) if together else flat

    def write(new: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if together and y.shape[-1] == n:
            return new.flatten(-2)
        out = y.clone()
        out[..., at] = new.flatten(-2)
        return out

    return Port(module, "out", lambda x, y: y[..., at].unflatten(-1, columns.shape), write, derived=not together)


def _norm_places(name: str, module: nn.Module | None, a: Anatomy, folded: bool) -> dict[str, Place]:
    """Return the ports of a norm's divisor [… 1] and of the normed vectors, before the norm's weights.

    Norms of single heads run on [batch, position, head, d_head] or [batch, head, position, d_head]; as in
    TransformerLens their axes are one here.
    """
    if module is None:
        return {}
    heads = name.startswith("attn.")

    def affine(y: Tensor) -> tuple[Tensor, Tensor, Norm]:
        norm = measure(module, y.shape[-1])
        return norm.weight, norm.bias, norm

    def shown(x: Tensor, t: Tensor) -> Tensor:
        if not heads:
            return t
        return (t if x.is_contiguous() else t.transpose(1, 2)).reshape(-1, t.shape[-1])

    def given(x: Tensor, t: Tensor) -> Tensor:
        if not heads:
            return t
        b, one, two = x.shape[:3]
        return t.reshape(b, one, two, -1) if x.is_contiguous() else t.reshape(b, two, one, -1).transpose(1, 2)

    def read_scale(x: Tensor, y: Tensor) -> Tensor:
        return shown(x, affine(y)[2].scale(x).unsqueeze(-1))

    def write_scale(new: Tensor, x: Tensor, y: Tensor) -> Tensor:
        _, bias, norm = affine(y)
        return (bias + (wide(y) - bias) * norm.scale(x).unsqueeze(-1) / given(x, new)).to(y.dtype)

    def read(x: Tensor, y: Tensor) -> Tensor:
        weight, bias, _ = affine(y)
        return shown(x, ((wide(y) - bias) / weight).to(y.dtype))

    def write(new: Tensor, x: Tensor, y: Tensor) -> Tensor:
        weight, bias, _ = affine(y)
        return (wide(given(x, new)) * weight + bias).to(y.dtype)

    normed = (
        Port(module, "out", lambda x, y: y, lambda new, x, y: new) if folded else Port(module, "out", read, write, True)
    )
    return {f"{name}.hook_scale": Port(module, "out", read_scale, write_scale, True), f"{name}.hook_normalized": normed}


def _head_norm(a: Anatomy, layer: int, name: str) -> nn.Module | None:
    """Return the norm of single queries or keys, if the family has one that sees d_head numbers."""
    paths = [p.replace("q_norm", name) for p in a.family.qk_norm if p.endswith("q_norm")]
    module = find(a.blocks[layer], paths[0]) if paths else None
    weight = getattr(module, "weight", None)
    return module if weight is not None and len(weight) == a.shape.d_head else None


def _is_folded(cfg: Config) -> bool:
    return str(cfg.normalization_type).endswith("Pre")


class Stopped(forward.Enough):
    """Raised where a forward stops early; holds the stream there, and what did it: a hook, or nothing."""

    def __init__(self, stream: Tensor, by: Address | None = None):
        self.stream, self.by = stream, by


@contextmanager
def listening(
    root: Any, start: int, stop: int | None, want: bool = True, called: Address | None = None
) -> Iterator[None]:
    """Within the block, a forward of the house's model calls every hook point that somebody listens to.

    Only those of blocks `start` to `stop` are called, without what was `called` before; with `stop` the forward ends
    there.
    """
    house, n = root.house, root.cfg.n_layers
    last = n if stop is None else stop
    sees = dict[Address, taps.See]()
    others = dict[str, tuple[Port, taps.See]]()
    for name, place in root.places.items():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else -1 if name.startswith("hook") else n
        point = root.mod_dict[name]
        if not (start <= layer < last or (layer == -1 and start == 0) or (layer == n and stop is None)):
            continue
        if not _is_heard(point) or _switched_off(name, root.cfg) or (name.startswith("unembed") and not want):
            continue
        see = _see(point, scores=name.endswith("attn_scores"))
        if isinstance(place, Address) and place != called:
            between = place.site == "resid_pre" or (place.site == "resid_post" and layer < n - 1)
            sees[place] = _resizing(see, place) if between else see
        elif isinstance(place, Port):
            others[name] = place, see
    for i in range(start, last):
        _three_norms(root, i, sees, others)
        _split(root, i, sees, others)
    if stop is not None:
        at = Address("resid_post", stop - 1) if stop else Address("resid_pre", 0)
        sees[at] = _then(sees.get(at), _end)
    with taps.attached(house.anatomy, sees, others=others):
        yield


def _is_heard(point: nn.Module) -> bool:
    """Return True if a hook point has hooks, or another module stands in its place."""
    return not isinstance(point, HookPoint) or bool(point.fwd_hooks or point.bwd_hooks)


def _switched_off(name: str, cfg: Config) -> bool:
    return (name.endswith("hook_result") and not cfg.use_attn_result) or (
        name.endswith("hook_mlp_in") and not cfg.use_hook_mlp_in
    )


def _see(point: nn.Module, scores: bool = False) -> taps.See:
    """Call the hook point; a change in place counts as a change. Masked scores are −∞ to it, as in TransformerLens."""

    def see(x: Tensor) -> Tensor:
        least = torch.finfo(x.dtype).min if scores else 0.0
        given = x.masked_fill(x == least, -torch.inf) if scores else x.clone() if 0 in x.stride() else x
        version = None if given.is_inference() else given._version  # inference tensors count no versions
        new = point(given)
        if new is given and version is not None and given._version == version:
            return x
        new = new.view_as(new) if new is x else new
        return new.clamp_min(least) if scores else new

    return see


def _then(first: taps.See | None, second: taps.See) -> taps.See:
    return second if first is None else lambda x: second(first(x))


def _end(x: Tensor) -> Tensor:
    raise Stopped(x)


def _resizing(see: taps.See, place: Address) -> taps.See:
    """Stop where a hook returns another number of positions, with which a forward of the house cannot go on."""

    def seen(x: Tensor) -> Tensor:
        new = see(x)
        if new.shape[1] != x.shape[1]:
            raise Stopped(new, place)
        return new

    return seen


def _heads(cfg: Config) -> dict[str, int]:
    """Return how many heads have queries, keys and values of their own."""
    kv = cfg.n_key_value_heads or cfg.n_heads
    return {"q": cfg.n_heads, "k": kv, "v": kv}


def _three_norms(root: Any, layer: int, sees: dict[Address, taps.See], others: dict[str, Any]) -> None:
    """Call the hook points of the norm before attention three times, as TransformerLens does: for q, k and v."""
    a, part = root.house.anatomy, root.blocks[layer].ln1
    module, points = a.part(layer, "ln1"), (part.hook_scale, part.hook_normalized)
    backward = any(not isinstance(p, HookPoint) or p.bwd_hooks for p in points)
    outs = dict[str, Tensor]()

    def see(x: Tensor) -> Tensor:
        outs.update({letter: part(x) for letter in "qkv"})
        # The model's own norm goes on where no hook changed anything, bit for bit.
        return outs["v"] if backward or not torch.equal(outs["v"], _norm(a, module, root.cfg)(x)) else x

    heard = [others.pop(f"blocks.{layer}.ln1.hook_{name}", None) for name in _NORM_POINTS]
    if not any(heard) or module is None:
        return
    port = Port(module, "out", lambda x, y: x, lambda new, x, y: new.to(y.dtype), derived=True)
    others[f"blocks.{layer}.ln1"] = port, see
    for letter, n in _heads(root.cfg).items() if backward else ():  # so that each call has its own part of the gradient
        sees[Address(f"{letter}_in", layer)] = partial(_each_head, outs, letter, n)


def _each_head(outs: Mapping[str, Tensor], letter: str, n: int, x: Tensor) -> Tensor:
    return repeat_along_head_dimension(outs[letter].to(x.dtype), n)


def _split(root: Any, layer: int, sees: dict[Address, taps.See], others: dict[str, Any]) -> None:
    """Put in the taps of the inputs that each head has for itself, where they are switched on and heard."""
    cfg, block, a = root.cfg, root.blocks[layer], root.house.anatomy
    heads = _heads(cfg)
    points = {letter: getattr(block, f"hook_{letter}_input") for letter in "qkv" if cfg.use_split_qkv_input}
    if not any(_is_heard(p) for p in points.values()) and not (cfg.use_attn_in and _is_heard(block.hook_attn_in)):
        return
    inputs = dict[str, Any]()

    ln1: Any = a.part(layer, "ln1")

    def stash(x: Tensor) -> Tensor:
        norm = a.norm(ln1)
        if cfg.use_attn_in:
            inputs.update(dict.fromkeys("qkv", block.hook_attn_in(repeat_along_head_dimension(x, cfg.n_heads))))
        inputs.update(
            {letter: point(repeat_along_head_dimension(x, heads[letter])) for letter, point in points.items()}
        )
        for letter, value in inputs.items():
            scale = block.ln1.hook_scale(norm.scale(value).unsqueeze(-1))
            normed = block.ln1.hook_normalized(norm.centre(value) / scale)
            inputs[letter] = (normed * norm.weight + norm.bias).to(value.dtype)
        return x

    before = Address("resid_pre", layer)
    sees[before] = _then(sees.get(before), stash)
    for letter in "qkv":
        sees[Address(f"{letter}_in", layer)] = lambda x, letter=letter: inputs[letter]
    others.pop(f"blocks.{layer}.ln1", None)


def run(root: Any, tokens: Tokens, want: bool, start: int, stop: int | None, stream: Any, called: Any = None) -> Any:
    """Run the house's model under the hooks: returns the logits if wanted, or the stream where it stops.

    Where a hook gives the stream another number of positions, another forward goes on from there.
    """
    a = root.house.anatomy
    begins = nullcontext() if stream is None else entered(root.house, start, stream)
    try:
        with forward.alone(a.hf), forward.evaluating(a), begins, listening(root, start, stop, want, called):
            if want or stop is not None:
                return forward.all_logits(a, tokens)
            forward.streams(a, tokens, 1.0)
            return None
    except Stopped as end:
        if end.by is None:
            return end.stream
        new, by = end.stream, end.by
    layer = (by.layer or 0) + (by.site == "resid_post")
    if layer == stop:
        return new
    return run(root, root.house.tokens(torch.zeros(new.shape[:2], dtype=torch.long)), want, layer, stop, new, by)


def run_cached(
    root: Any, ids: Tensor, mask: Tensor, cache: Any, start: int = 0, stream: Tensor | None = None
) -> Tensor:
    """Run new columns behind a cache of keys and values, under the hooks; `mask` covers old and new columns."""
    a, past = root.house.anatomy, cache.length
    kw: dict[str, Any] = {"attention_mask": mask.long(), "past_key_values": cache.opened(), "use_cache": True}
    if "position_ids" in forward.parameters(type(a.hf)):
        kw["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, past:]
    frame = FRAME.set(ForwardFrame(None, len(ids), ids.shape[1], past))
    begins = nullcontext() if stream is None else entered(root.house, start, stream)
    try:
        with forward.alone(a.hf), forward.evaluating(a), begins, listening(root, start, None):
            out = a.hf(ids, **kw)
    finally:
        FRAME.reset(frame)
    cache.close(kw["past_key_values"])
    return out.logits
