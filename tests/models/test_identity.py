"""Identity: what a model is, to the byte; two models of one configuration are told apart by all that differs."""

import threading
from functools import partial

import pytest
import torch

from cutaway.core import record
from cutaway.core.refuse import Refused
from cutaway.models.edits.library import Ablate, Add
from cutaway.models.loading.identity import described, structure
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from tests.models.common import IDS, model
from tests.models.tiny import build


@pytest.fixture
def kept(monkeypatch):
    """Hashes are kept of tensors of any size, and every hashing of bytes is counted."""
    hashed = []
    plain = record.tensor_bytes
    monkeypatch.setattr(record, "_SMALL", 0)
    monkeypatch.setattr(record, "tensor_bytes", lambda t: hashed.append(t.numel()) or plain(t))
    return hashed


def test_weights_are_hashed_once_and_again_where_they_have_changed(kept):
    m, same = Model(build("llama_gqa")), model("llama_gqa").fingerprint()
    kept.clear()
    first = m.fingerprint()
    assert sorted(kept) == sorted(t.numel() for t in [*m.hf.parameters(), *m.hf.buffers()])
    kept.clear()
    assert m.fingerprint() == m.identity()["weights"] == first == same
    assert not kept
    with torch.no_grad():
        m.hf.lm_head.weight[3, 3] += 1
    assert m.fingerprint() != first
    assert kept == [m.hf.lm_head.weight.numel()]


@pytest.mark.parametrize("change", [
    lambda w: w.add_(1),
    lambda w: w[5].neg_(),
    lambda w: w[0, 0].mul_(2),
    lambda w: w.copy_(w.flip(0)),
    lambda w: w.data[5].neg_(),
    lambda w: w.data[:, 7].mul_(2),
    lambda w: w.data.copy_(w.flip(1)),
    lambda w: setattr(w, "data", w.detach() * 2),
    lambda w: setattr(w, "data", w.detach().double()),
])  # fmt: skip
def test_every_way_of_changing_weights_is_noticed(change, kept):
    m = Model(build("llama"))
    before = m.fingerprint()
    with torch.no_grad():
        change(m.hf.model.layers[1].mlp.up_proj.weight)
    assert m.fingerprint() != before


def test_a_single_number_written_through_data_is_noticed_by_hashing_anew(kept):
    m = Model(build("llama"))
    before, weight = m.fingerprint(), m.hf.model.layers[1].mlp.up_proj.weight
    weight.data[7, 6] += 1
    assert m.fingerprint(fresh=True) != before
    assert m.fingerprint() == m.fingerprint(fresh=True)


def test_steps_of_an_optimizer_exchanged_modules_and_loaded_states_are_noticed(kept):
    m = Model(build("gpt2"))
    seen = {m.fingerprint()}
    optimizer = torch.optim.SGD(m.hf.parameters(), lr=0.1)
    m.hf(IDS.ids, labels=IDS.ids).loss.backward()
    optimizer.step()
    seen.add(m.fingerprint())
    m.hf.load_state_dict(build("gpt2", seed=3).state_dict())
    seen.add(m.fingerprint())
    m.hf.transformer.h[0].mlp.c_fc = build("gpt2", seed=4).transformer.h[0].mlp.c_fc
    seen.add(m.fingerprint())
    assert len(seen) == 4


def test_large_tensors_count_to_the_last_byte():
    """Tensors of more than 64 MiB used to be hashed by an even sample of their rows."""
    t = torch.zeros(1 << 15, 576)
    before = record.hash_tensors({"t": t})
    t[12345] += 1
    after = record.hash_tensors({"t": t})
    t.data[2, 3] = 7
    assert len({before, after, record.hash_tensors({"t": t}, fresh=True)}) == 3


def doubled(factor, module, args, out):
    return out * factor


def changed(what, hf):
    layer = hf.model.layers[1]
    if what == "hook":
        layer.mlp.register_forward_hook(partial(doubled, 2.0))
    elif what == "other hook":
        layer.mlp.register_forward_hook(partial(doubled, 3.0))
    elif what == "forward":
        plain = layer.mlp.forward
        layer.mlp.forward = lambda x: plain(x) * 2
    elif what == "unread":
        plain, lock = layer.mlp.forward, threading.Lock()  # nothing tells one lock from another

        def guarded(x):
            with lock:
                return plain(x)

        layer.mlp.forward = guarded
    elif what == "setting":
        layer.self_attn.scaling *= 2
    elif what == "epsilon":
        hf.config.rms_norm_eps = 0.5
    elif what == "kernel":
        hf.set_attn_implementation("eager")
    return hf


def test_models_of_one_configuration_are_told_apart():
    what = ["nothing", "hook", "other hook", "forward", "unread", "setting", "epsilon", "kernel"]
    found = [changed(w, build("llama")) for w in what]
    assert len({structure(hf)[0] for hf in found}) == len({Model(hf).fingerprint() for hf in found}) == len(what)
    assert [described(hf)[1] for hf in found] == [["model.layers.1.mlp"] * (w == "unread") for w in what]
    assert structure(changed("hook", build("llama", seed=1)))[0] == structure(changed("hook", build("llama")))[0]
    assert structure(build("llama", dtype=torch.float64))[0] != structure(build("llama"))[0]


def test_asking_a_model_for_its_hidden_states_leaves_what_it_is():
    m = Model(build("gpt2"))
    before = m.fingerprint(), described(m.hf)
    m.hf(IDS.ids, output_hidden_states=True)  # transformers' hooks stay
    assert (m.fingerprint(), described(m.hf)) == before


def test_values_do_not_make_another_anatomy_but_zeros_do():
    one, other, zeros = build("gpt2"), build("gpt2", seed=5), build("gpt2")
    torch.nn.init.zeros_(zeros.transformer.h[1].attn.c_proj.bias)
    assert structure(one)[0] == structure(other)[0] != structure(zeros)[0]


def test_a_kept_sweep_is_not_taken_for_that_of_a_patched_model_or_one_under_edits(tmp_path):
    def run(m, path, **kw):
        return sweep(m, IDS, [[Ablate("z.1.2")]], lambda logits, prompt: logits[:, 3], resume=tmp_path / path, **kw)

    m = Model(build("llama"))
    plain = run(m, "a")
    assert torch.equal(run(Model(build("llama")), "a"), plain)
    with m.edited(Add("resid_pre.1", torch.ones(32))), pytest.raises(Refused, match="another sweep"):
        run(m, "a")
    for hf in (changed("hook", build("llama")), changed("forward", build("llama"))):
        with pytest.raises(Refused, match="another sweep"):
            run(Model(hf), "a")
    with pytest.raises(Refused, match=r"attached at model\.layers\.1\.mlp"):
        run(Model(changed("unread", build("llama"))), "b")
    m.hf.lm_head.weight.data[3, 5] += 1
    with pytest.raises(Refused, match="another sweep"):
        run(m, "a")
