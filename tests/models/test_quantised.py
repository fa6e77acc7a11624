"""Weights of other libraries: read by what they do, or refused; hashing leaves them as they are.

The classes stand in for those of torchao and bitsandbytes, with the traits that matter: a tensor that is float by name
and refuses every operation but the linear map, and a module that packs its weight anew, with loss, when it is saved.
"""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cutaway.core.refuse import Refused
from cutaway.models.anatomy.residual import decompose
from cutaway.models.edits.library import Ablate
from cutaway.models.loading.load import load
from cutaway.models.sweep.executor import sweep
from tests.models.common import IDS, bare, gap, model
from tests.models.tiny import build


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Self-checks are kept, as they are for users, in a folder of this test."""
    monkeypatch.setattr(sys.modules[load.__module__], "CACHE", tmp_path / "checks")


class Int8Tensor(torch.Tensor):
    """Whole numbers and their scale; with `rounds`, activations are rounded too, so that the map is not linear."""

    @staticmethod
    def __new__(cls, whole, scale, rounds=False):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype, device=whole.device)

    def __init__(self, whole, scale, rounds=False):
        self.whole, self.scale, self.rounds = whole, scale, rounds

    def __tensor_flatten__(self):
        return ["whole", "scale"], {"rounds": self.rounds}

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, w, *b = args
            x = (x * 16).round() / 16 if w.rounds else x
            return F.linear(x, w.whole * w.scale, *b)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Int8Tensor(args[0].whole, args[0].scale, args[0].rounds)
        raise ValueError(f"Int8Tensor dispatch: {func} is not implemented")


Int8Tensor.__module__ = "torchao.quantization"


def rounded(rounds=False, more=0):
    hf = build("llama_gqa").requires_grad_(False)
    for module in hf.model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.abs().amax() / 127
            whole = (module.weight / scale).round().to(torch.int8)
            whole[0, 0] += more
            module.weight = nn.Parameter(Int8Tensor(whole, scale, rounds), requires_grad=False)
    return hf


def test_weights_that_are_rounded_alone_are_seen_as_they_are_applied():
    hf = rounded()
    m = load(hf)
    assert m.disabled == {}
    assert torch.equal(m.run(IDS), bare(hf))
    w = hf.model.layers[1].self_attn.o_proj.weight
    assert gap(m.weights.o[1].flatten(0, 1), (w.whole * w.scale).T) < 1e-6
    assert 1e-4 < gap(m.weights.q[1], model("llama_gqa").weights.q[1]) < 1e-2
    assert gap(decompose(m, IDS).contribution.sum(1), decompose(m, IDS).total) < 1e-5
    edits = [[Ablate("head_out.1.2")], [Ablate("mlp_post.2.5")]]
    runs = [m.run_last(IDS, e) for e in edits]
    assert gap(sweep(m, IDS, edits, lambda logits, prompt: logits), torch.stack(runs)) < 1e-5


@pytest.mark.parametrize("first", [False, True])
def test_activations_that_are_rounded_too_refuse_what_is_not_linear(first):
    order = [load(rounded(r)) for r in ((False, True) if first else (True, False))]
    m, other = sorted(order, key=lambda m: not m.disabled)
    assert other.disabled == {}
    assert "no linear map" in m.disabled["head_out"]
    acts = m.capture(IDS, ["resid_pre", "z", "mlp_post", "logits"])
    assert torch.equal(acts["logits"], bare(m.hf))
    for read in (lambda: m.weights.o[1], lambda: decompose(m, IDS), lambda: m.capture(IDS, "head_out.1")):
        with pytest.raises(Refused, match="no linear map"):
            read()


def test_every_whole_number_is_in_the_hash():
    same, other, rounds = (
        load(rounded(), check=False),
        load(rounded(more=1), check=False),
        load(rounded(True), check=False),
    )
    assert load(rounded(), check=False).fingerprint() == same.fingerprint()
    assert len({m.fingerprint() for m in (same, other, rounds, model("llama_gqa"))}) == 4


def test_embeddings_in_another_form_are_refused():
    hf = build("llama_gqa").requires_grad_(False)
    e = hf.model.embed_tokens
    hf.model.embed_tokens.weight = nn.Parameter(
        Int8Tensor(e.weight.to(torch.int8), torch.tensor(1.0)), requires_grad=False
    )
    with pytest.raises(Refused, match="stored in another form"):
        _ = load(hf, check=False).weights.embed


class Linear4bit(nn.Linear):
    """A map that loses something of its weight whenever it is saved."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.weight.data = self.weight.data * 0.5
        super()._save_to_state_dict(destination, prefix, keep_vars)


class State:
    """What is needed to read a packed weight."""

    def __init__(self, scale):
        self.scale = scale

    def as_dict(self, packed):
        return {"absmax": torch.tensor([self.scale]), "quant_type": "nf4"}


Linear4bit.__module__ = "bitsandbytes.nn.modules"


def test_hashing_leaves_weights_as_they_are_that_saving_would_change():
    hf = build("llama_gqa").requires_grad_(False)
    for layer in hf.model.layers:
        layer.mlp.up_proj.__class__ = Linear4bit
    want = bare(hf)
    m = load(hf)
    hashes = [m.fingerprint()]
    for scale in (1.0, 2.0, 2.0):
        hf.model.layers[1].mlp.up_proj.weight.quant_state = State(scale)
        hashes.append(m.fingerprint(fresh=True))
    assert torch.equal(m.run(IDS), want)
    assert [hashes.index(h) for h in hashes] == [0, 1, 2, 2]


class Params4bit(nn.Parameter):
    """A packed weight."""


class WithoutGradient(nn.Linear):
    """A map through which no gradient flows back."""

    def forward(self, x):
        return super().forward(x.detach())


Params4bit.__module__ = "bitsandbytes.nn.modules"


def test_a_gradient_that_quantised_weights_do_not_pass_on_is_refused_for_that_reason():
    hf = build("llama_gqa").requires_grad_(False)
    for layer in hf.model.layers:
        projection = layer.self_attn.o_proj
        projection.__class__ = WithoutGradient
        projection.weight = Params4bit(projection.weight.data, requires_grad=False)
    with pytest.raises(Refused, match="quantised weights may pass none on"):
        load(hf, check=False).gradients(IDS, ["z.0"], lambda logits: logits[:, 3])
