"""Self-check: the identities that reads and edits of a model must satisfy, run on the model itself.

Each row of the table is one identity with the sites it vouches for. A site whose identity fails on this model is
disabled with its reason, never left wrong. The outcome is kept by what the model is, never by its configuration alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.files import read_json, write_json
from cutaway.core.record import hash_text, versions
from cutaway.core.refuse import Refused
from cutaway.core.sites import BY_NAME, SITES
from cutaway.core.stats import generator
from cutaway.models import batches, maps
from cutaway.models.capture import Activations
from cutaway.models.edits import Ablate, Add, Edit, Freeze, Scale
from cutaway.models.families import need
from cutaway.models.forward import alone, evaluating
from cutaway.models.identity import anatomy
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens, batch
from cutaway.models.weights import OV

FAULTS = (Refused, RuntimeError, ValueError, TypeError, AttributeError, LookupError)
# Most families norm in float32 even where everything else is float64.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Check:
    """One identity: `error` is a size relative to the compared tensors, `sites` what a failure disables."""

    name: str
    sites: tuple[str, ...]
    error: Callable[[Trial], float | None]  # None: the identity does not apply to this model


@dataclass(frozen=True)
class Outcome:
    """What one check found."""

    name: str
    sites: tuple[str, ...]
    error: float | None
    passed: bool
    why: str = ""


class Trial:
    """A tiny batch through the model, with everything captured once."""

    def __init__(self, model: Model, seed: int = 0):
        self.model = model
        low = min(3, model.shape.d_vocab - 2)
        ids = torch.randint(low, model.shape.d_vocab, (2, 7), generator=generator(seed))
        self.tokens: Tokens = model.tokens(batch(ids.tolist()))
        offered = model.sites()
        self.here = [s.name for s in SITES if offered[s.name].startswith("read")]
        try:
            self.logits = self.run()
        except FAULTS as fault:
            raise Refused(
                f"model {model.name}", f"it does not run: {_said(fault)}", "check its configuration"
            ) from fault
        self.broken: dict[str, str] = {}
        _check_stream(model, self.tokens)
        self.acts = self._captured()

    def _captured(self) -> Activations:
        """Every site at once; if that fails, those that can be captured alone, and why the others cannot."""
        wanted = [s for s in self.here if s != "logits"]
        try:
            return self.model.capture(self.tokens, wanted)
        except FAULTS:
            for site in wanted:
                try:
                    self.model.capture(self.tokens, site)
                except FAULTS as fault:
                    self.broken[site] = _said(fault)
        self.here = [s for s in self.here if s not in self.broken]
        return self.model.capture(self.tokens, [s for s in wanted if s not in self.broken])

    def run(self, *edits: Edit) -> Tensor:
        """Logits, or the last residual stream of a model without unembedding."""
        return self.model.run(self.tokens, edits).float()

    def has(self, *sites: str) -> bool:
        """Whether the model offers all these sites."""
        return set(sites) <= set(self.here)

    def places(self, site: str) -> list[Address]:
        """The captured addresses of a site."""
        return [a for a in self.model.places(site) if str(a) in self.acts]

    def layers(self, site: str) -> list[int]:
        """The layers at which a site exists."""
        return self.acts.layers(site)

    def gap(self, a: Tensor, b: Tensor) -> float:
        """Largest difference, relative to the spread of the second."""
        a, b = a.detach().float(), b.detach().float()
        return float((a - b).abs().max() / b.abs().max().clamp_min(1e-9))


def _check_stream(model: Model, tokens: Tokens) -> None:
    """Refuse a model whose blocks do not hand on one residual stream."""
    x = model.capture(tokens, "resid_pre.0", logits=False)["resid_pre.0"]
    wanted = (*tokens.ids.shape, model.shape.d_model)
    if tuple(x.shape) != wanted:
        why = f"its blocks hand on {list(x.shape)}, not one residual stream of {list(wanted)}"
        raise Refused(f"model {model.name}", why, "read its modules through model.hf with plain torch hooks")


def _own_value(site: str) -> Callable[[Trial], float | None]:
    def error(t: Trial) -> float | None:
        if not t.has(site) or not BY_NAME[site].writable or site == "logits":
            return None
        return t.gap(t.run(*(Freeze(a, t.acts) for a in t.places(site))), t.logits)

    return error


def _has_effect(site: str) -> Callable[[Trial], float | None]:
    def error(t: Trial) -> float | None:
        if not t.has(site) or not BY_NAME[site].writable:
            return None
        place = next(a for a in t.model.places(site) if site == "logits" or str(a) in t.acts)
        shape = (t.logits if site == "logits" else t.acts[str(place)]).shape[1:]
        change = torch.randn(shape, generator=generator(2)).abs()
        return 0.0 if t.gap(t.run(Add(place, change)), t.logits) > 1e-6 else 1.0

    return error


def _has_shape(site: str) -> Callable[[Trial], float | None]:
    def error(t: Trial) -> float | None:
        if not t.has(site) or site == "logits":
            return None
        shape, (batch_, position) = t.model.shape, t.tokens.ids.shape
        sizes = {"batch": batch_, **dict.fromkeys(("position", "q_pos", "k_pos"), position), "d_model": shape.d_model,
                 "head": shape.n_heads, "kv_head": shape.n_kv_heads, "d_head": shape.d_head, "neuron": shape.d_mlp,
                 "expert": shape.n_experts, "channel": shape.d_inner, "state": shape.d_state,
                 "ssm_head": shape.n_ssm_heads, "group": shape.n_groups}  # fmt: skip
        expected = tuple(sizes[axis] for axis in BY_NAME[site].axes.split())
        return 0.0 if all(tuple(t.acts[str(a)].shape) == expected for a in t.places(site)) else 1.0

    return error


def _block_sum(t: Trial) -> float | None:
    if t.model.family.post_norm or not t.has("resid_pre", "attn_out", "mlp_out", "resid_post"):
        return None
    a = t.acts
    total = a.stack("resid_pre").float() + a.stack("attn_out").float() + a.stack("mlp_out").float()
    return t.gap(total, a.stack("resid_post"))


def _layer_sum(t: Trial) -> float | None:
    if not t.has("ssm.out"):
        return None
    return t.gap(t.acts.stack("resid_pre").float() + t.acts.stack("ssm.out").float(), t.acts.stack("resid_post"))


def _layer_ends(t: Trial) -> float | None:
    """The output projection makes ssm.out of ssm.post, which is zero without the recurrence's output or the gate's."""
    if not t.has("ssm.y", "ssm.gate", "ssm.post", "ssm.out"):
        return None
    i = t.model.shape.n_layers // 2
    gone = [
        t.model.capture(t.tokens, f"ssm.post.{i}", edits=[Ablate(f"{s}.{i}")])[f"ssm.post.{i}"]
        for s in ("ssm.y", "ssm.gate")
    ]
    with torch.no_grad():
        written = need(t.model.body.blocks[i], t.model.family.ssm_out, "projection")(t.acts[f"ssm.post.{i}"])
    return max(*(float(x.abs().max()) for x in gone), t.gap(written, t.acts[f"ssm.out.{i}"]))


def _states_read(t: Trial) -> float | None:
    """The states, which are computed here, against what the model's own scan makes of the same prompt."""
    if not t.has("ssm.state", "ssm.C", "ssm.conv", "ssm.y"):
        return None
    i = t.model.shape.n_layers // 2
    layer: Any = need(t.model.body.blocks[i], t.model.family.ssm, "state-space layer")
    state, read, taken = (t.acts[f"ssm.{n}.{i}"].float() for n in ("state", "C", "conv"))
    read = read.repeat_interleave(state.shape[2] // read.shape[2], dim=2)
    skip = taken * layer.D.detach().float().repeat_interleave(taken.shape[2] // len(layer.D))
    return t.gap((state * read).sum(-1) + skip, t.acts[f"ssm.y.{i}"])


def _states_follow(t: Trial) -> float | None:
    """A state moved at one position decays on: twice the step moves every later state twice as far."""
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
    return t.gap(t.acts.stack("resid_pre").float() + t.acts.stack("attn_out").float(), t.acts.stack("resid_mid"))


def _middle_is_attention(t: Trial) -> float | None:
    if t.model.family.post_norm or not t.has("resid_mid", "attn_out"):
        return None
    d = torch.randn(t.model.shape.d_model, generator=generator(1))
    i = t.layers("resid_mid")[0]
    return t.gap(t.run(Add(f"resid_mid.{i}", d)), t.run(Add(f"attn_out.{i}", d)))


def _heads_sum(t: Trial) -> float | None:
    if not t.has("head_out", "attn_out") or t.model.family.ln1_post or t.model.body.multiplier != 1.0:
        return None
    bias = torch.stack([t.model.weights.o_bias(i) for i in t.layers("head_out")])[:, None, None]
    return t.gap(t.acts.stack("head_out").float().sum(3) + bias, t.acts.stack("attn_out"))


def _zero_head(t: Trial) -> float | None:
    if not t.has("z", "head_out"):
        return None
    i = t.model.shape.n_layers // 2
    return t.gap(t.run(Ablate(f"z.{i}.1")), t.run(Ablate(f"head_out.{i}.1")))


def _zero_pattern(t: Trial) -> float | None:
    if not t.has("z", "pattern"):
        return None
    i = t.model.shape.n_layers // 2
    return t.gap(t.run(Ablate(f"z.{i}.1")), t.run(Ablate(f"pattern.{i}.1")))


def _zero_values(t: Trial) -> float | None:
    if not t.has("z", "v"):
        return None
    i = t.model.shape.n_layers // 2
    return t.gap(t.run(Ablate(f"z.{i}")), t.run(Ablate(f"v.{i}")))


def _probabilities_times_values(t: Trial) -> float | None:
    if not t.has("z", "v", "pattern"):
        return None
    worst = 0.0
    for i in t.layers("z"):
        v = t.acts[f"v.{i}"].float().repeat_interleave(t.model.shape.n_heads // t.model.shape.n_kv_heads, dim=2)
        z = torch.einsum("bhqk,bkhd->bqhd", t.acts[f"pattern.{i}"].float(), v)
        worst = max(worst, t.gap(z, t.acts[f"z.{i}"]))
    return worst


def _softmax(t: Trial) -> float | None:
    if not t.has("scores", "pattern"):
        return None
    pattern = t.acts.stack("pattern").float()  # a sink takes its part, which is none of the keys'
    return t.gap(t.acts.stack("scores").float().softmax(-1), pattern / pattern.sum(-1, keepdim=True).clamp_min(1e-9))


def _queries_meet_keys(t: Trial) -> float | None:
    """Zero queries and zero keys leave the same pattern: what the mask and positions make alone."""
    if not t.has("q", "k", "pattern"):
        return None
    i = t.model.shape.n_layers // 2
    without_q, without_k = (
        t.model.capture(t.tokens, f"pattern.{i}", edits=[Ablate(f"{s}.{i}")])[f"pattern.{i}"] for s in "qk"
    )
    return t.gap(without_q, without_k)


def _linear_branch(t: Trial) -> float | None:
    """In a gated MLP the neurons are linear in mlp_pre, and not in mlp_gate."""
    if not t.has("mlp_pre", "mlp_gate", "mlp_post"):
        return None
    i = t.layers("mlp_gate")[-1]
    doubled = t.model.capture(t.tokens, f"mlp_post.{i}", edits=[Scale(f"mlp_pre.{i}", 2.0)])[f"mlp_post.{i}"]
    return t.gap(doubled, 2 * t.acts[f"mlp_post.{i}"])


def _embedding_sum(t: Trial) -> float | None:
    if not t.has("embed") or t.model.family.post_norm or not t.has("pos_embed"):
        return None
    return t.gap(t.acts["embed"].float() + t.acts["pos_embed"].float(), t.acts["resid_pre.0"])


def _neighbours(t: Trial) -> float | None:
    if t.model.shape.n_layers < 2:
        return None
    return t.gap(t.acts.stack("resid_post")[:-1], t.acts.stack("resid_pre")[1:])


def _of_maps(error: Callable[..., float], sites: tuple[str, ...]) -> Callable[[Trial], float | None]:
    return lambda t: maps.worst(error, sites, t.model, t.acts)


def _of_runs(error: Callable[[Model, Tokens], float | None]) -> Callable[[Trial], float | None]:
    return lambda t: error(t.model, t.tokens)


def _read_only(t: Trial) -> float | None:
    """Bare transformers, nothing attached, against a run that reads every site that keeps the model's own kernel."""
    with torch.no_grad(), evaluating(t.model.body):
        out = t.model.hf(t.tokens.ids)
    bare = out.logits if getattr(out, "logits", None) is not None else out[0]
    return t.gap(t.logits, bare)


CHECKS: tuple[Check, ...] = (
    Check("nothing edited ≡ bare transformers", ("logits",), _read_only),
    Check("resid_pre + attn_out + mlp_out = resid_post", ("attn_out", "mlp_out"), _block_sum),
    Check("resid_pre + ssm.out = resid_post", ("ssm.out",), _layer_sum),
    Check("W_out ssm.post = ssm.out, 0 if ssm.y or ssm.gate is", ("ssm.y", "ssm.gate", "ssm.post"), _layer_ends),
    Check("ssm.state · ssm.C + D ssm.conv = ssm.y", ("ssm.state", "ssm.C"), _states_read),
    Check("ssm.state moved decays on", ("ssm.state",), _states_follow),
    Check("resid_pre + attn_out = resid_mid", ("resid_mid",), _middle_sum),
    Check("resid_mid + d ≡ attn_out + d", ("resid_mid",), _middle_is_attention),
    Check("Σ head_out + b_O = attn_out", ("head_out",), _heads_sum),
    Check("z = 0 ≡ head_out = 0", ("head_out", "z"), _zero_head),
    Check("z = 0 ≡ pattern = 0", ("pattern",), _zero_pattern),
    Check("v = 0 ≡ z = 0", ("v",), _zero_values),
    Check("pattern @ v = z", ("pattern", "v", OV), _probabilities_times_values),
    Check("softmax(scores) = pattern", ("scores", "pattern"), _softmax),
    Check("q = 0 ≡ k = 0", ("q", "k"), _queries_meet_keys),
    Check("embed + pos_embed = resid_pre.0", ("embed", "pos_embed"), _embedding_sum),
    Check("resid_post.i = resid_pre.i+1", ("resid_post", "resid_pre"), _neighbours),
    Check("mlp_pre doubled doubles mlp_post", ("mlp_pre", "mlp_gate"), _linear_branch),
    *(Check(name, (what,), _of_maps(error, read)) for name, what, error, read in maps.IDENTITIES),
    *(Check(name, (what,), _of_runs(error)) for name, what, error in batches.IDENTITIES),
    *(Check(f"{s.name} has the shape of its axes", (s.name,), _has_shape(s.name)) for s in SITES),
    *(Check(f"{s.name} written with its own value changes nothing", (s.name,), _own_value(s.name)) for s in SITES),
    *(Check(f"{s.name} moved changes the output", (s.name,), _has_effect(s.name)) for s in SITES),
)


def self_check(model: Model) -> list[Outcome]:
    """Run every identity that applies; the model is left as it was.

    Raises:
        Refused: the model does not even run.
    """
    with alone(model.hf), _short_chunks(model):
        return _outcomes(model)


def _outcomes(model: Model) -> list[Outcome]:
    trial = Trial(model)
    tolerance = _TOLERANCE.get(model.dtype, 1e-4)
    outcomes = [Outcome(f"{s} can be captured", (s,), None, False, why) for s, why in trial.broken.items()]
    for check in CHECKS:
        try:
            error = check.error(trial)
        except FAULTS as fault:
            outcomes.append(Outcome(check.name, check.sites, None, False, _said(fault)))
            continue
        if error is not None:
            passed = error <= tolerance
            why = "" if passed else f"relative error {error:.2g} exceeds {tolerance:.0e}"
            outcomes.append(Outcome(check.name, check.sites, error, passed, why))
    return outcomes


@contextmanager
def _short_chunks(model: Model) -> Iterator[None]:
    """While open, a scan in chunks takes short ones.

    It costs the square of a chunk however short the prompt, minutes where everything else takes seconds; no identity
    depends on the length, and with four positions there are several.
    """
    layers = [model.body.part(i, "ssm") for i in range(model.shape.n_layers)]
    kept = [(m, m.__dict__["chunk_size"]) for m in layers if m is not None and "chunk_size" in m.__dict__]
    try:
        for m, _ in kept:
            m.__dict__["chunk_size"] = 4
        yield
    finally:
        for m, size in kept:
            m.__dict__["chunk_size"] = size


def _said(fault: Exception) -> str:
    return fault.why if isinstance(fault, Refused) else f"{type(fault).__name__}: {fault}".splitlines()[0]


def disabled_sites(outcomes: list[Outcome]) -> dict[str, str]:
    """Site → reason, for every failed identity."""
    return {s: f"self-check failed: {o.name} ({o.why})" for o in outcomes if not o.passed for s in o.sites}


def checked(model: Model, cache: Path | None) -> dict[str, str]:
    """The sites to disable on this model; the outcome is kept in `cache`, so that it is found out once.

    That all is well is kept by what the model is (`identity.anatomy`) and by the versions of what ran it. A failure is
    kept for these very weights alone. Nothing is kept of a model with something attached that cannot be read.
    """
    text, unread = anatomy(model.hf)
    if cache is None or unread:
        return disabled_sites(self_check(model))
    sort = hash_text(text, *sorted(f"{k} {v}" for k, v in _versions(model).items()), _source())
    own = hash_text(sort, model.fingerprint())
    for key in (sort, own):
        if (cache / f"{key}.json").exists():
            with suppress(Refused):  # a file that cannot be read is written anew
                return read_json(cache / f"{key}.json")
    disabled = disabled_sites(self_check(model))
    with suppress(OSError, Refused):  # a read-only home only costs the next load its seconds of checking
        write_json(cache / f"{own if disabled else sort}.json", disabled)
    return disabled


def _versions(model: Model) -> dict[str, str]:
    """Versions of the packages that the model's modules are from, and of what else ran it."""
    known = versions()
    out = {name: known[name] for name in ("cutaway", "torch", "transformers")}
    for package in {type(m).__module__.partition(".")[0] for m in model.hf.modules()} - {*out}:
        with suppress(PackageNotFoundError):
            out[package] = version(package)
    return out


def _source() -> str:
    """The checks' and taps' own text: a changed tap must be checked again."""
    return hash_text(*(p.read_text(encoding="utf-8") for p in sorted(Path(__file__).parent.glob("*.py"))))
