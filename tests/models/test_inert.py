"""Inertness: after any call and any exception, the user's model and everything around it are what they were."""

import copy
import threading

import pytest
import torch
from transformers import AttentionInterface

from cutaway.core.refuse import Refused
from cutaway.models.access import attention, taps
from cutaway.models.anatomy.residual import decompose
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Ablate, Add, Knockout, Scale
from cutaway.models.model import Model
from cutaway.models.self_check import self_check
from tests.models.common import IDS, PADDED, bare, gap, metric, model, noise, sites
from tests.models.tiny import build

NAMES = ["gpt2", "gptj", "bloom", "llama_gqa", "falcon_7b", "gemma2", "mixtral", "bert"]


def state(hf):
    """Everything that a call could leave changed."""
    parts = list(hf.modules())
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks)) for m in parts]
    return (
        Model(hf).fingerprint(), hooks, [m.__dict__.get("forward") for m in parts], [m.training for m in parts],
        [p.requires_grad for p in hf.parameters()], [p.grad for p in hf.parameters()],
        dict(AttentionInterface._global_mapping), torch.get_rng_state().tolist(), dict(taps._POINTS),
        dict(attention._WATCHED), hf.config._attn_implementation, torch.is_grad_enabled(),
    )  # fmt: skip


class Fails(Edit):
    """An edit that raises while the forward runs."""

    def __init__(self, address, error):
        self.address, self.positions, self.error = address, None, error

    def apply(self, x, frame):
        raise self.error


STOP = KeyboardInterrupt()


def broken_metric(logits):
    raise ZeroDivisionError


CALLS = {
    "run": lambda m: m.run(PADDED["left"]),
    "run edited": lambda m: m.run(IDS, [Scale("z.1", 0.5), Add("attn_out.1", noise(32)), Ablate("pattern.0.1")]),
    "edit every site": lambda m: m.run(IDS, [Scale(a, 0.9) for a in m.places(sites(m, "router"))]),
    "capture every site": lambda m: m.capture(PADDED["right"], sites(m)),
    "gradients": lambda m: m.gradients(IDS, ["z", "q", "pattern"], metric),
    "self-check": self_check,
    "weights": lambda m: m.weights.ov(1, 0).svd(),
    "nested": lambda m: nested(m),
}
CAUSAL_CALLS = {"generate": lambda m: m.generate(IDS, 3, Scale("k.1", 2.0)), "decompose": lambda m: decompose(m, IDS)}
FAULTS = {
    "edit raises": (lambda m: m.run(IDS, Fails("z.1", ValueError("own"))), ValueError),
    "attention edit raises": (lambda m: m.run(IDS, Fails("pattern.1", ValueError("own"))), ValueError),
    "interrupted": (lambda m: m.run(IDS, Fails("v.1", STOP)), KeyboardInterrupt),
    "interrupted capture": (lambda m: m.capture(IDS, sites(m), Fails("mlp_in.1", STOP)), KeyboardInterrupt),
    "wrong shape": (lambda m: m.run(IDS, Add("z.1", noise(31))), Refused),
    "wrong shape in scores": (lambda m: m.run(IDS, Add("scores.1", noise(5, 5))), Refused),
    "no such site": (lambda m: m.run(IDS, [Scale("z.1", 1.0), Scale("z.9", 1.0)]), Refused),
    "no key left": (lambda m: m.run(IDS, Knockout("pattern.1", (1,), tuple(range(7)))), Refused),
    "metric raises": (lambda m: m.gradients(IDS, "q.1", broken_metric), ZeroDivisionError),
    "gradient interrupted": (lambda m: m.gradients(IDS, "q.1", metric, Fails("z.2", STOP)), KeyboardInterrupt),
    "context raises": (lambda m: nested(m, error=ValueError("inside")), ValueError),
}  # fmt: skip


def nested(m, error=None):
    with m.edited(Scale("q.1", 0.5)), m.edited(Scale("pattern.1.0", 0.5), Scale("head_out.1", 2.0)):
        m.capture(IDS, ["pattern.1", "head_out.1"])
        if error:
            raise error


@pytest.mark.parametrize("name", NAMES)
def test_every_call_leaves_everything_as_it_was(name):
    m = model(name)
    before, plain = state(m.hf), m.run(IDS)
    for what, call in (CALLS | (CAUSAL_CALLS if m.family.causal else {})).items():
        call(m)
        assert state(m.hf) == before, what
    assert torch.equal(bare(m.hf), plain)


@pytest.mark.parametrize("name", NAMES)
def test_every_exception_leaves_everything_as_it_was(name):
    m = model(name)
    before, plain = state(m.hf), m.run(IDS)
    for what, (call, error) in FAULTS.items():
        with pytest.raises(error):
            call(m)
        assert state(m.hf) == before, what
    assert torch.equal(bare(m.hf), plain)


def test_an_interrupted_generation_leaves_no_frame():
    m = model("llama")
    before = state(m.hf)
    with pytest.raises(KeyboardInterrupt):
        m.generate(IDS, 3, Fails("z.1", KeyboardInterrupt()))
    assert state(m.hf) == before
    assert m.run(IDS, Scale("z.1@-1", 2.0)).shape == (2, 7, 101)


@pytest.mark.parametrize("name", NAMES)
def test_another_model_of_the_same_class_sees_nothing(name):
    m, other = model(name), build(name, seed=5)
    plain = bare(other)
    changes = [Scale(f"{s}.1", 0.5) for s in ("q", "k", "v", "scores", "pattern", "z", "attn_out")]
    with m.edited(*changes):
        assert torch.equal(bare(other), plain)
        assert gap(bare(m.hf), model(name).run(IDS)) < 1e-6  # inside the context the model itself is edited
    assert gap(m.run(IDS, changes), bare(m.hf)) > 1e-4


def test_two_models_at_once():
    one, two = model("llama"), Model(build("llama_gqa", seed=3))
    expected = one.run(IDS, Scale("pattern.1", 0.5)), two.run(IDS, Scale("q.0", 2.0))
    with one.edited(Scale("pattern.1", 0.5)), two.edited(Scale("q.0", 2.0)):
        assert torch.equal(one.run(IDS), expected[0])
        assert torch.equal(two.run(IDS), expected[1])


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_threads_do_not_see_each_others_edits(name):
    m, wrong = model(name), []
    factors = [0.25, 0.5, 2.0, 3.0]
    expected = {f: m.run(IDS, [Scale("q.1", f), Scale("z.2", f)]) for f in factors}

    def work(factor):
        for _ in range(4):
            if not torch.equal(m.run(IDS, [Scale("q.1", factor), Scale("z.2", factor)]), expected[factor]):
                wrong.append(factor)

    threads = [threading.Thread(target=work, args=(f,)) for f in factors]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert not taps._POINTS


def test_contexts_that_are_left_in_another_order_leave_nothing():
    m = model("gptj")
    before = state(m.hf)
    one, two = m.edited(Scale("q.1", 0.5)), m.edited(Scale("q.1", 2.0), Scale("z.1", 2.0))
    one.__enter__(), two.__enter__()
    one.__exit__(None, None, None)
    assert torch.equal(bare(m.hf), m.run(IDS))
    two.__exit__(None, None, None)
    assert state(m.hf) == before


def test_a_users_own_hooks_and_wrappers_stay():
    hf, seen = build("gptj"), []
    attn = hf.transformer.h[1].attn
    plain = attn.forward
    attn.forward = lambda *args, **kw: plain(*args, **kw)
    handle = attn.register_forward_hook(lambda *_: seen.append(1))
    wrapper, m = attn.forward, Model(hf)
    m.capture(IDS, sites(m))
    m.run(IDS, Scale("q.1", 0.5))
    assert attn.__dict__["forward"] is wrapper
    assert list(attn._forward_hooks) == [handle.id]
    assert len(seen) == 2


def test_an_attention_registered_meanwhile_stays():
    def own(*args, **kw):
        return AttentionInterface._global_mapping["sdpa"](*args, **kw)

    m, registry = model("llama"), AttentionInterface._global_mapping
    before = dict(registry)
    try:
        with m.edited(Scale("q.1", 0.5)):
            AttentionInterface.register("cutaway_test", own)
        assert dict(registry) == {**before, "cutaway_test": own}
    finally:
        registry.pop("cutaway_test", None)
    assert dict(registry) == before


@pytest.mark.parametrize("whole", [True, False])
def test_dropout_is_off_inside_and_every_mode_is_restored(whole):
    hf = build("gpt2")
    for module in hf.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    plain = bare(hf)
    hf.train() if whole else hf.transformer.h[1].train()
    assert not torch.equal(bare(hf), plain)
    modes, m = [x.training for x in hf.modules()], Model(hf)
    rng = torch.get_rng_state()
    assert torch.equal(m.run(IDS), plain)
    assert torch.equal(m.capture(IDS, ["z", "logits"])["logits"], plain)
    assert gap(m.gradients(IDS, "z", metric)[0], metric(plain[:, -1])) < 1e-5
    with pytest.raises(Refused):
        m.run(IDS, Add("z.1", noise(31)))
    assert [x.training for x in hf.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_deep_copy_of_a_watched_model_is_not_watched():
    m = model("llama")
    with m.edited(Ablate("pattern.1")):
        clone = copy.deepcopy(m.hf.model.layers[1].self_attn)
        assert clone not in attention._WATCHED
