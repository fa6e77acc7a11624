"""Planted faults: each is a way in which reads, edits, sweeps or weights of a model go wrong; the self-check sees all.

How many of them were caught is printed at the end of the run (`tests/conftest.py`).
"""

import dataclasses
import sys

import pytest
import torch

from cutaway.models.access import attention, forward, ports
from cutaway.models.anatomy import norms, unembedding, weights
from cutaway.models.checks.identities import CHECKS
from cutaway.models.model import Model
from cutaway.models.self_check import disabled_sites, self_check
from cutaway.models.sweep import partial_forward as resume
from cutaway.models.sweep import plan
from tests.models.tiny import build


def of_port(site, change):
    """A fault of one site's port; `change` makes the wrong port of the right one."""

    def plant(patch):
        plain = ports._port
        patch.setattr(
            ports,
            "_port",
            lambda anatomy, a: change(anatomy, a, p) if (p := plain(anatomy, a)) and a.site == site else p,
        )

    return plant


def reads(f):
    return lambda anatomy, a, p: ports.Port(p.module, p.side, lambda x, y: f(p.read(x, y)), p.write, p.derived)


def writes(f):
    return lambda anatomy, a, p: ports.Port(
        p.module, p.side, p.read, lambda new, x, y: p.write(f(new), x, y), p.derived
    )


def deaf(anatomy, a, p):
    return ports.Port(p.module, p.side, p.read, lambda new, x, y: y if p.side == "out" else x, p.derived)


def one_branch(anatomy, a, p):
    return ports.Port(p.module, "in", p.read, p.write)


def other(name):
    return lambda anatomy, a, p: ports.Port(anatomy.part(a.layer, name), p.side, p.read, p.write, p.derived)


def of(module, name, change):
    """A fault of one function; `change` makes the wrong one of the right one."""
    return lambda patch: patch.setattr(module, name, change(getattr(module, name)))


def scaled(f):
    return lambda way, x, capped=True: f(way, x, capped) * 1.3


def uncapped(f):
    return lambda way, x, capped=True: f(way, x, False)


def no_bias(f):
    return lambda module: (f(module)[0], None)


def of_epsilon(f):
    return lambda module, width: dataclasses.replace(f(module, width), eps=0.3)


def of_offset(f):
    return lambda module, width: dataclasses.replace(f(module, width), weight=f(module, width).weight - 1)


def uncentred(f):
    return lambda module, width: dataclasses.replace(f(module, width), centred=False)


def unadapted(f):
    return lambda module: ports.stored(module) or f(module)


def later(call):
    """Positions of a part of a prompt as if it stood one further to the right."""

    def wrong(model, ids, frame, **kw):
        return call(model, ids, dataclasses.replace(frame, offset=frame.offset + (frame.offset > 0)), **kw)

    return wrong


def mask_shifted(f):
    def wrong(module, q, k, mask, causal):
        made = f(module, q, k, mask, causal)
        return made if made is None else made.roll(1, -1)

    return wrong


def heads_swapped(f):
    return lambda module, site, x: f(module, site, x.flip(1) if site == "pattern" else x)


def half(f):
    return lambda *args: f(*args) * 0.5


FAULTS = {
    # what a site reads, and what a write of it does
    "resid_mid reaches one branch only": ("llama_gqa", of_port("resid_mid", one_branch), "resid_mid"),
    "attn_out at the wrong position": ("llama_gqa", of_port("attn_out", reads(lambda x: x.roll(1, 1))), "attn_out"),
    "mlp_out ignores writes": ("llama_gqa", of_port("mlp_out", deaf), "mlp_out"),
    "mlp_out without the residual multiplier": ("granite", of_port("mlp_out", reads(lambda x: x / 0.4)), "mlp_out"),
    "attn_out written without the multiplier": ("granite", of_port("attn_out", writes(lambda x: x * 0.4)), "attn_out"),
    "resid_post at the wrong position": ("gpt2", of_port("resid_post", reads(lambda x: x.roll(1, 1))), "resid_post"),
    "resid_pre a thousandth too small": ("gpt2", of_port("resid_pre", reads(lambda x: x * 0.999)), "resid_pre"),
    "embed without its scale": ("gemma", of_port("embed", writes(lambda x: x / 32**0.5)), "embed"),
    "embed ignores writes": ("llama_gqa", of_port("embed", deaf), "embed"),
    "pos_embed forgotten in the sum": ("gpt2", of_port("pos_embed", reads(torch.zeros_like)), "pos_embed"),
    "z with permuted heads": ("llama_gqa", of_port("z", reads(lambda x: x.flip(2))), "head_out"),
    "z written to the wrong heads": ("llama_gqa", of_port("z", writes(lambda x: x.flip(2))), "z"),
    "v of the wrong group": ("llama_gqa", of_port("v", reads(lambda x: x.flip(2))), "v"),
    "v at the wrong position": ("gpt2", of_port("v", reads(lambda x: x.roll(1, 1))), "v"),
    "k ignores writes": ("llama_gqa", of_port("k", deaf), "k"),
    "q at the wrong position": ("qwen3", of_port("q", writes(lambda x: x.roll(1, 1))), "q"),
    "head_out with permuted heads": ("gpt2", of_port("head_out", reads(lambda x: x.flip(2))), "head_out"),
    "head_out written without the bias": ("gpt2", of(ports, "affine", no_bias), "head_out"),
    "mlp_post ignores writes": ("phi3", of_port("mlp_post", deaf), "mlp_post"),
    "gate and up swapped": ("llama_gqa", of_port("mlp_pre", other("gate")), "mlp_pre"),
    "halves of a fused gate swapped": ("phi3", of_port("mlp_pre", reads(lambda x: x.roll(1, -1))), "weights.mlp_in"),
    "ln1.scale written the wrong way round": ("llama_gqa", of_port("ln1.scale", writes(lambda x: 1 / x)), "ln1.scale"),
    "final.scale ignores writes": ("gpt2", of_port("final.scale", deaf), "final.scale"),
    "pattern with permuted heads": ("llama", of(attention, "seen", heads_swapped), "pattern"),
    # masks and positions
    "a causal mask shifted by one": ("llama", of(attention, "_additive", mask_shifted), "pattern"),
    "positions after a prefix shifted by one": ("llama_gqa", of(resume, "_call", later), plan.PREFIX),
    # norms
    "the norm's epsilon": ("llama_gqa", of(norms, "_measured", of_epsilon), "ln1.scale"),
    "the norm's offset 1 + w": ("gemma2", of(norms, "_measured", of_offset), "ln2.scale"),
    "the norm's centring": ("gpt2", of(norms, "_measured", uncentred), "final.scale"),
    # weights, adapters and the unembedding
    "W_V without its bias": (
        "gpt2",
        of(weights.Weights, "_qkv_bias", lambda f: lambda w, i: tuple(0 * b for b in f(w, i))),
        "weights.v",
    ),
    "W_in without its bias": ("gpt2", of(weights, "bias", half), "weights.mlp_in"),
    "W_O at half size": ("llama_gqa", of(ports, "output_rows", half), "head_out"),
    "heads of the decomposition": ("llama_gqa", of(weights.Weights, "_o", half), "decomposition"),
    "a logit scale forgotten": ("cohere", of(unembedding.Unembedding, "logits", scaled), unembedding.UNEMBEDDED),
    "a soft cap forgotten": ("gemma2", of(unembedding.Unembedding, "logits", uncapped), unembedding.UNEMBEDDED),
    "rows of the unembedding at half size": ("gpt2", of(weights, "matrix", half), "weights.unembed"),
    "the one forward runs another function": (
        "gpt2",
        of(forward, "all_logits", lambda f: lambda *a: f(*a) * 1.5),
        "logits",
    ),
    "an adapter ignored": ("adapter", of(ports, "matrix", lambda f: lambda m: m.weight.T), "head_out"),
}


def made(name, dtype=torch.float32):
    if name == "adapter":
        from tests.models.test_wrapped import adapted

        return Model(adapted("lora").to(dtype))
    return Model(build(name, dtype=dtype))


def caught(fault, dtype, patch):
    """Whether the self-check disables the site; of its identities those run that vouch for it, as no other could."""
    name, plant, site = FAULTS[fault]
    m = made(name, dtype)
    with patch.context() as p:
        p.setattr(sys.modules[self_check.__module__], "CHECKS", [c for c in CHECKS if site in c.sites])
        plant(p)
        return site in disabled_sites(self_check(m))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_disables_what_it_spoils(fault, monkeypatch):
    assert caught(fault, torch.float32, monkeypatch)


#: faults whose sizes rounding to eight bits could hide
HALF = [
    "resid_mid reaches one branch only",
    "attn_out at the wrong position",
    "head_out written without the bias",
    "v of the wrong group",
    "gate and up swapped",
    "the norm's centring",
    "a logit scale forgotten",
    "W_V without its bias",
    "an adapter ignored",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", HALF)
def test_a_planted_fault_is_seen_in_half_precision(fault, monkeypatch):
    assert caught(fault, torch.bfloat16, monkeypatch)
