"""The identities that reads and edits of a model must satisfy, each with the sites that it vouches for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.core.sites import BY_NAME, SITES
from cutaway.core.stats import generator
from cutaway.models.access.forward import evaluating
from cutaway.models.anatomy.families import need
from cutaway.models.anatomy.residual import decompose
from cutaway.models.anatomy.unembedding import UNEMBEDDED, unembedding
from cutaway.models.anatomy.weights import OV, unembed_rows
from cutaway.models.checks import batches, maps
from cutaway.models.checks.trial import FAULTS, FORMED, Trial
from cutaway.models.edits.library import Ablate, Add, Freeze, Scale
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens

Kind = Literal["same", "sum", "run"]


@dataclass(frozen=True)
class Check:
    """An identity that reads and edits must satisfy.

    Attributes:
        name: name of the identity.
        sites: the sites that a failure disables.
        error: measures the error relative to the compared numbers; None if the identity does not apply.
        kind: rounding allowed: none where the same kernels get the same numbers; one or two units of the last place,
            number by number, in a sum; and what it has grown to at the end of runs with other kernels or batches.
    """

    name: str
    sites: tuple[str, ...]
    error: Callable[[Trial], float | None]
    kind: Kind = "same"


def _own_value(site: str) -> Callable[[Trial], float | None]:
    def error(t: Trial) -> float | None:
        if not t.has(site) or not BY_NAME[site].writable or site == "logits":
            return None
        formed = site in FORMED
        acts = t.formed if formed else t.plain
        return t.gap(t.end(*(Freeze(a, acts) for a in t.there([site])), formed=formed), t.end(formed=formed))

    return error


def _has_effect(site: str) -> Callable[[Trial], float | None]:
    def error(t: Trial) -> float | None:
        if not t.has(site) or not BY_NAME[site].writable:
            return None
        place = Address("logits") if site == "logits" else t.there([site])[0]
        old = t.logits if site == "logits" else t.formed[str(place)].float()
        # As large as the numbers there, so that rounding keeps it; masked scores are no measure of size.
        most = float(old[old.abs() < 1e4].abs().mean()) or 1.0
        change = torch.randn(old.shape[1:], generator=generator(2)).abs().to(old.device) * most
        formed = site in FORMED
        still = t.logits if site == "logits" else t.end(formed=formed)
        # A model made of steps may not notice a small move, or one up.
        moved = any(t.gap(t.end(Add(place, size * change), formed=formed), still) > 1e-6 for size in (1, -1, 100))
        return 0.0 if moved else 1.0

    return error


def _has_shape(site: str) -> Callable[[Trial], float | None]:
    def error(t: Trial) -> float | None:
        if not t.has(site) or site == "logits":
            return None
        shape, (batch_, position) = t.model.shape, t.tokens.ids.shape
        sizes = {
            "batch": batch_,
            **dict.fromkeys(("position", "q_pos", "k_pos"), position),
            "d_model": shape.d_model,
            "head": shape.n_heads,
            "kv_head": shape.n_kv_heads,
            "d_head": shape.d_head,
            "neuron": shape.d_mlp,
            "expert": shape.n_experts,
            "channel": shape.d_inner,
            "state": shape.d_state,
            "ssm_head": shape.n_ssm_heads,
            "group": shape.n_groups,
        }
        expected = tuple(sizes[axis] for axis in BY_NAME[site].axes.split())
        acts = t.formed if site in FORMED else t.acts
        return 0.0 if all(tuple(acts[str(a)].shape) == expected for a in t.model.places(site) if a in acts) else 1.0

    return error


def _block_sum(t: Trial) -> float | None:
    if t.model.family.post_norm or not t.has("resid_pre", "attn_out", "mlp_out", "resid_post"):
        return None
    a = t.acts
    return t.sum_gap([a.stack("resid_pre"), a.stack("attn_out"), a.stack("mlp_out")], a.stack("resid_post"))


def _layer_sum(t: Trial) -> float | None:
    if not t.has("ssm.out"):
        return None
    return t.sum_gap([t.acts.stack("resid_pre"), t.acts.stack("ssm.out")], t.acts.stack("resid_post"))


def _layer_ends(t: Trial) -> float | None:
    """Check that the output projection maps ssm.post to ssm.out, which is zero without the recurrence's output or the
    gate's.
    """
    if not t.has("ssm.y", "ssm.gate", "ssm.post", "ssm.out"):
        return None
    i = t.model.shape.n_layers // 2
    gone = [
        t.model.capture(t.tokens, f"ssm.post.{i}", edits=[Ablate(f"{s}.{i}")])[f"ssm.post.{i}"]
        for s in ("ssm.y", "ssm.gate")
    ]
    with torch.no_grad():
        written = need(t.model.anatomy.blocks[i], t.model.family.ssm_out, "projection")(t.acts[f"ssm.post.{i}"])
    return max(*(float(x.abs().max()) for x in gone), t.gap(written, t.acts[f"ssm.out.{i}"]))


def _states_read(t: Trial) -> float | None:
    """Compare the states, which are computed here, with the model's own scan on the same prompt."""
    if not t.has("ssm.state", "ssm.C", "ssm.conv", "ssm.y"):
        return None
    i = t.model.shape.n_layers // 2
    layer: Any = need(t.model.anatomy.blocks[i], t.model.family.ssm, "state-space layer")
    state, read, taken = (t.acts[f"ssm.{n}.{i}"].float() for n in ("state", "C", "conv"))
    read = read.repeat_interleave(state.shape[2] // read.shape[2], dim=2)
    skip = taken * layer.D.detach().float().repeat_interleave(taken.shape[2] // len(layer.D))
    return t.gap((state * read).sum(-1) + skip, t.acts[f"ssm.y.{i}"])


def _states_follow(t: Trial) -> float | None:
    """Check that a state moved at one position decays on: twice the step moves every later state twice as far."""
    if not t.has("ssm.state"):
        return None
    i = t.model.shape.n_layers // 2
    state = t.acts[f"ssm.state.{i}"].float()
    d = torch.randn(state.shape[2:], generator=generator(3)) * state.abs().max().cpu()
    one, two = (
        t.model.capture(t.tokens, f"ssm.state.{i}", edits=[Add(f"ssm.state.{i}@2", d, c)])[f"ssm.state.{i}"].float()
        - state
        for c in (1.0, 2.0)
    )
    if float(one[:, :2].abs().max()) > 0 or not bool(one[:, 3].any()):
        return 1.0
    return t.gap(two, 2 * one)


def _middle_sum(t: Trial) -> float | None:
    if t.model.family.post_norm or not t.has("resid_mid"):
        return None
    return t.sum_gap([t.acts.stack("resid_pre"), t.acts.stack("attn_out")], t.acts.stack("resid_mid"))


def _middle_is_read_twice(t: Trial) -> float | None:
    """Check that an addition to the middle stream reaches the MLP's norm and the sum after it."""
    if t.model.family.post_norm or not t.has("resid_mid", "attn_out", "mlp_in", "mlp_out"):
        return None
    d, worst = torch.randn(t.model.shape.d_model, generator=generator(1)).to(t.model.device), 0.0
    for i in t.near("resid_mid", "mlp_in"):
        stream = t.plain[f"resid_mid.{i}"].float().abs()
        size = float(stream.median()) or float(stream.mean()) or 1.0  # most of a compiled model's stream is 0
        middle, read, out, after = (f"{s}.{i}" for s in ("resid_mid", "mlp_in", "mlp_out", "resid_post"))
        new, old = t.capture([middle, read, out, after], Add(middle, d * size)), t.plain[middle].float()
        if torch.equal(new[read], t.plain[read]):
            return 1.0
        worst = max(worst, t.sum_gap([old, (d * size).expand_as(old)], new[middle]))
        worst = max(worst, t.sum_gap([new[middle], new[out]], new[after]))
    return worst


def _heads_sum(t: Trial) -> float | None:
    if not t.has("head_out", "attn_out") or t.model.family.ln1_post or t.model.anatomy.multiplier != 1.0:
        return None
    worst = 0.0
    for i in t.acts.layers("head_out"):
        heads, b = t.acts[f"head_out.{i}"], t.model.weights.o_bias[i]
        parts = [*heads.unbind(2), b.expand_as(heads[:, :, 0])]
        worst = max(worst, t.sum_gap(parts, t.acts[f"attn_out.{i}"]))
    return worst


def _zero_head(t: Trial) -> float | None:
    if not t.has("z", "head_out", "attn_out"):
        return None
    worst, layers = 0.0, t.near("z", "head_out", "attn_out")
    for i in layers:
        one, other = (t.capture_one(f"attn_out.{i}", Ablate(f"{s}.{i}.1")) for s in ("z", "head_out"))
        # A norm behind the projection spreads the rounding of one number over all.
        worst = max(worst, t.gap(one, other) if t.model.family.ln1_post else t.sum_gap([one], other))
    return worst if layers else None


def _zero_pattern(t: Trial) -> float | None:
    """Head 1 without its pattern writes nothing, and the others write the same."""
    worst, layers = 0.0, t.near("z", "pattern")
    for i in layers:
        want = t.formed[f"z.{i}"].clone()
        want[:, :, 1] = 0
        got = t.capture([f"z.{i}", f"pattern.{i}"], Ablate(f"pattern.{i}.1"))[f"z.{i}"]
        worst = max(worst, t.gap(got, want))
    return worst if layers else None


def _branches(t: Trial) -> float | None:
    """Check that an addition to attn_in reaches all branches, and one to a head's input moves that head alone."""
    if not t.has("q_in", "k_in", "v_in", "q", "k", "v"):
        return None
    d, worst = torch.randn(t.model.shape.d_model, generator=generator(4)).to(t.model.device), 0.0
    for i in t.near("attn_in", "q_in", "k_in", "v_in", "q", "k", "v"):
        d = d * t.plain[f"attn_in.{i}"].float().abs().mean() / d.abs().mean()
        outs = [f"{s}.{i}" for s in "qkv"]
        whole, apart = t.capture(outs, Add(f"attn_in.{i}", d)), t.capture(outs, *(Add(f"{s}_in.{i}", d) for s in "qkv"))
        worst = max(worst, *(t.gap(apart[o], whole[o]) for o in outs))
        for s, own in zip("qkv", outs, strict=True):
            one = t.capture(outs, Add(f"{s}_in.{i}.0", d))
            # A norm of all heads together (OLMo 2) scales the other heads, and leaves their directions.
            made, first, old = (normalize(acts[own].float(), dim=-1) for acts in (one, whole, t.plain))
            worst = max(worst, t.gap(made, torch.cat([first[:, :, :1], old[:, :, 1:]], dim=2)))
            if not all(torch.equal(one[o], t.plain[o]) for o in outs if o != own):
                return 1.0
    return worst


def _zero_values(t: Trial) -> float | None:
    layers = t.near("z", "v")
    gone = [t.capture_one(f"z.{i}", Ablate(f"v.{i}")).abs().max() / t.plain[f"z.{i}"].abs().max() for i in layers]
    return max(map(float, gone), default=None)


def _probabilities_times_values(t: Trial) -> float | None:
    worst, layers = 0.0, t.near("z", "v", "pattern")
    for i in layers:
        v = t.formed[f"v.{i}"].float().repeat_interleave(t.model.shape.n_heads // t.model.shape.n_kv_heads, dim=2)
        z = torch.einsum("bhqk,bkhd->bqhd", t.formed[f"pattern.{i}"].float(), v)
        worst = max(worst, t.gap(z, t.formed[f"z.{i}"]))
    return worst if layers else None


def _softmax(t: Trial) -> float | None:
    layers = t.near("scores", "pattern")
    pairs = []
    for i in layers:
        pattern = t.formed[f"pattern.{i}"].float()  # a sink takes its part, which is none of the keys'
        own = pattern / pattern.sum(-1, keepdim=True).clamp_min(1e-9)
        pairs.append((t.formed[f"scores.{i}"].float().softmax(-1), own))
    return max((t.gap(a, b) for a, b in pairs), default=None)


def _formed(t: Trial) -> float | None:
    """Attention formed step by step, where scores and patterns are read, against the model's own kernel."""
    return t.gap(t.end(formed=True), t.end()) if t.has("scores", "pattern") else None


def _queries_meet_keys(t: Trial) -> float | None:
    """Zero queries and zero keys leave the same pattern: what the mask and positions make alone."""
    layers = t.near("q", "k", "pattern")
    pairs = [[t.capture_one(f"pattern.{i}", Ablate(f"{s}.{i}")) for s in "qk"] for i in layers]
    return max((t.gap(*p) for p in pairs), default=None)


def _linear_branch(t: Trial) -> float | None:
    """In a gated MLP the neurons are linear in mlp_pre, and not in mlp_gate."""
    layers = t.near("mlp_pre", "mlp_gate", "mlp_post")
    pairs = [
        (t.capture_one(f"mlp_post.{i}", Scale(f"mlp_pre.{i}", 0.5)), 0.5 * t.plain[f"mlp_post.{i}"]) for i in layers
    ]
    return max((t.gap(*p) for p in pairs), default=None)


def _norms(name: str) -> Callable[[Trial], float | None]:
    """Compare a norm's output with its measured form, from which the scales and every folded weight are taken."""

    def error(t: Trial) -> float | None:
        anatomy, kept = t.model.anatomy, dict[nn.Module, tuple[Tensor, Tensor]]()
        found = [anatomy.top(name)] if name == "final" else [anatomy.part(i, name) for i in t.layers]
        norms = [m for m in found if m is not None]
        if not norms or anatomy.family.post_norm or not t.has(f"{name.removesuffix('_post')}.scale"):
            return None

        def keep(module: nn.Module, args: Any, out: Tensor) -> None:
            kept[module] = args[0], out

        hooks = [m.register_forward_hook(keep) for m in norms]
        try:
            with t.short():
                t.run()
        finally:
            for hook in hooks:
                hook.remove()
        worst = 0.0
        for module, (x, y) in kept.items():
            norm = anatomy.norm(module)
            made = norm.linear(x.to(norm.weight.dtype), norm.scale(x)) + norm.bias
            worst = max(worst, t.sum_gap([made], y))
        return worst if kept else None

    return error


def _view(name: str, reads: str, writes: str) -> Callable[[Trial], float | None]:
    """Check that a weight view with its bias maps the module's input to its output."""

    def error(t: Trial) -> float | None:
        layers, w, worst = t.near(reads, writes), t.model.weights, 0.0
        for i in layers:
            x, y = t.plain[f"{reads}.{i}"].float(), t.plain[f"{writes}.{i}"].float()
            try:
                if name == "v":
                    made = torch.einsum("bpd,hde->bphe", x, w.v[i].float()) + w.v_bias[i].float()
                else:
                    made = x @ getattr(w, name)[i].float() + getattr(w, f"{name}_bias")[i].float()
            except Refused:
                return None  # the view says so itself
            worst = max(worst, t.sum_gap([made], y))
        return worst if layers else None

    return error


def _unembedded(t: Trial) -> float | None:
    """Compare the way from the last stream to the logits, as lenses and sweeps go it, with the model's own logits:
    all.
    """
    anatomy, last = t.model.anatomy, f"resid_post.{t.model.shape.n_layers - 1}"
    if anatomy.unembed is None or not anatomy.family.causal or not t.has("resid_post") or unembedding(anatomy).why:
        return None
    way = unembedding(anatomy)
    with torch.no_grad(), evaluating(anatomy):
        made = way.logits(way.read(t.acts[last]).to(t.model.dtype))
    return t.gap(made, t.logits)


def _shares(t: Trial) -> float | None:
    """Compare the written-out rows of the unembedding on the normed stream with the model's own logits."""
    anatomy, last = t.model.anatomy, f"resid_post.{t.model.shape.n_layers - 1}"
    if (
        anatomy.unembed is None
        or not anatomy.family.causal
        or not t.has("resid_post")
        or not unembedding(anatomy).linear
    ):
        return None
    way, x = unembedding(anatomy), t.acts[last].float()
    try:
        rows, b = unembed_rows(anatomy, None, torch.float32)
    except Refused:
        return None
    norm = anatomy.norm(way.final) if way.final is not None else None
    y = norm.linear(x, norm.scale(x)) + norm.bias if norm is not None else x
    made = y.float() @ rows.T + b
    return t.gap(way.cap * torch.tanh(made / way.cap) if way.cap else made, t.logits)


def _decomposed(t: Trial) -> float | None:
    """Embedding, heads, biases and MLPs sum to the last stream."""
    if t.model.family.post_norm or not t.has("head_out", "mlp_out", "z"):
        return None
    try:
        parts = decompose(t.model, t.tokens)
    except Refused:
        return None
    return t.sum_gap(list(parts.contribution.unbind(1)), parts.total)


def _embedding_sum(t: Trial) -> float | None:
    if not t.has("embed") or t.model.family.post_norm or not t.has("pos_embed"):
        return None
    return t.sum_gap([t.acts["embed"], t.acts["pos_embed"].expand_as(t.acts["embed"])], t.acts["resid_pre.0"])


def _neighbours(t: Trial) -> float | None:
    if t.model.shape.n_layers < 2:
        return None
    return t.gap(t.acts.stack("resid_post")[:-1], t.acts.stack("resid_pre")[1:])


def _of_maps(error: Callable[..., float], sites: tuple[str, ...]) -> Callable[[Trial], float | None]:
    return lambda t: maps.worst(error, sites, t.model, t.acts)


def _of_runs(error: Callable[[Model, Tokens], float | None]) -> Callable[[Trial], float | None]:
    def either(t: Trial) -> float | None:
        try:
            with t.short():
                found = error(t.model, t.tokens)
        except FAULTS:
            found = None
        return error(t.model, t.tokens) if found is None else found

    return either


def _read_only(t: Trial) -> float | None:
    """Bare transformers, nothing attached, against a run that reads every site that keeps the model's own kernel."""
    bare = t.bare()
    return max(t.gap(t.logits, bare), t.gap(t.acts["logits"], bare) if "logits" in t.acts else 0.0)


# Written by arithmetic of their own, which rounds; the others hand back the very numbers.
_WRITTEN: dict[str, Kind] = dict.fromkeys(
    ("head_out", "attn_out", "mlp_out", "pos_embed", "q_in", "k_in", "v_in", *(s.name for s in SITES if "." in s.name)),
    "run",
)

CHECKS: tuple[Check, ...] = (
    Check("nothing edited ≡ bare transformers", ("logits",), _read_only),
    Check("resid_pre + attn_out + mlp_out = resid_post", ("attn_out", "mlp_out"), _block_sum, "sum"),
    Check("resid_pre + ssm.out = resid_post", ("ssm.out",), _layer_sum, "sum"),
    Check("W_out ssm.post = ssm.out, 0 if ssm.y or ssm.gate is", ("ssm.y", "ssm.gate", "ssm.post"), _layer_ends, "run"),
    Check("ssm.state · ssm.C + D ssm.conv = ssm.y", ("ssm.state", "ssm.C"), _states_read, "run"),
    Check("ssm.state moved decays on", ("ssm.state",), _states_follow, "run"),
    Check("resid_pre + attn_out = resid_mid", ("resid_mid",), _middle_sum, "sum"),
    Check("resid_mid + d reaches mlp_in and resid_post", ("resid_mid",), _middle_is_read_twice, "sum"),
    Check("Σ head_out + b_O = attn_out", ("head_out",), _heads_sum, "sum"),
    Check("z = 0 ≡ head_out = 0", ("head_out",), _zero_head, "sum"),
    Check("z = 0 ≡ pattern = 0", ("pattern",), _zero_pattern),
    Check("attn_in + d ≡ q_in + d, k_in + d, v_in + d; one head alone", ("q_in", "k_in", "v_in"), _branches, "run"),
    Check("v = 0 ≡ z = 0", ("v",), _zero_values),
    Check("pattern @ v = z", ("pattern", "v", OV), _probabilities_times_values, "sum"),
    Check("softmax(scores) = pattern", ("scores", "pattern"), _softmax, "sum"),
    Check("attention step by step ≡ the model's own", ("scores", "pattern"), _formed, "run"),
    Check("q = 0 ≡ k = 0", ("q", "k"), _queries_meet_keys),
    Check("embed + pos_embed = resid_pre.0", ("embed", "pos_embed"), _embedding_sum, "sum"),
    Check("resid_post.i = resid_pre.i+1", ("resid_post", "resid_pre"), _neighbours),
    Check("mlp_pre doubled doubles mlp_post", ("mlp_pre", "mlp_gate"), _linear_branch),
    *(
        Check(f"{n} = its measured form", (f"{n.removesuffix('_post')}.scale",), _norms(n), "sum")
        for n in ("ln1", "ln2", "ln1_post", "ln2_post", "final")
    ),
    Check("attn_in W_V + b_V = v", ("weights.q", "weights.k", "weights.v"), _view("v", "attn_in", "v"), "sum"),
    Check("mlp_in W_in + b_in = mlp_pre", ("weights.mlp_in",), _view("mlp_in", "mlp_in", "mlp_pre"), "sum"),
    Check("mlp_in W_gate + b_gate = mlp_gate", ("weights.mlp_gate",), _view("mlp_gate", "mlp_in", "mlp_gate"), "sum"),
    Check("the parts of the stream sum to it", ("decomposition",), _decomposed, "sum"),
    Check("a stream unembedded out of turn ≡ the model's logits", (UNEMBEDDED,), _unembedded, "run"),
    Check("W_U and b_U on the normed stream = the model's logits", ("weights.unembed",), _shares, "run"),
    *(Check(name, (what,), _of_maps(error, read), "run") for name, what, error, read in maps.IDENTITIES),
    *(Check(name, (what,), _of_runs(error), "run") for name, what, error in batches.IDENTITIES),
    *(Check(f"{s.name} has the shape of its axes", (s.name,), _has_shape(s.name)) for s in SITES),
    *(
        Check(
            f"{s.name} written with its own value changes nothing",
            (s.name,),
            _own_value(s.name),
            _WRITTEN.get(s.name, "same"),
        )
        for s in SITES
    ),
    *(Check(f"{s.name} moved changes the output", (s.name,), _has_effect(s.name)) for s in SITES),
)
