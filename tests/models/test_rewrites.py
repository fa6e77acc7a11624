"""Rewrites of weights: they change what they name, say so in records, and are undone bit for bit."""

import copy

import peft
import pytest
import torch
from torch import nn

from cutaway.core.refuse import Refused
from cutaway.models import Rewrite, open_rewrites, rewritten, save_rewrites
from cutaway.models.edits.library import Ablate
from cutaway.models.model import Model
from cutaway.models.self_check import checked
from tests.models.common import IDS, bare, gap, model, noise

FAMILIES = ["gpt2", "gpt_neox_parallel", "bloom", "falcon_40b", "phi3", "llama_mqa_bias_tied", "gemma2", "mixtral"]


def bits(hf: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone().view(torch.uint8) for n, t in hf.state_dict().items() if t.ndim}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def everywhere(m: Model) -> list[Rewrite]:
    """A rewrite of every weight that the family stores, whole and by head."""
    w, out = m.weights, []
    for name in ("q", "k", "v", "o"):
        whole = getattr(w, name)[1]
        out.append(Rewrite(f"{name}.1", delta=0.1 * noise(*whole.shape)))
        out.append(Rewrite(f"{name}.1.0", factors=(noise(whole.shape[1], 2), noise(2, whole.shape[2]))))
    if m.family.name != "mixtral":
        out += [Rewrite("mlp_in.0", delta=noise(*w.mlp_in[0].shape)), Rewrite("mlp_out.2", value=w.mlp_out[1].clone())]
    out.append(Rewrite("embed", delta=noise(2, 3), rows=(5, 8), columns=(0, 4, 7), tied=True))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_rewrite_changes_its_weight_alone_and_is_undone_bit_for_bit(name, dtype):
    m = model(name, dtype)
    before, logits, who = bits(m.hf), bare(m.hf), m.identity()
    for r in everywhere(m):
        part, _, rest = r.weight.partition(".")
        layer, _, head = rest.partition(".")

        def view(part=part, layer=layer, head=head):
            w = getattr(m.weights, part)
            w = w[int(layer)] if layer else w
            return (w[int(head)] if head else w).clone()

        old = view()
        with rewritten(m, r):
            index = (torch.tensor(r.rows)[:, None], torch.tensor(r.columns)) if r.rows else (...,)
            want = old.clone()
            want[index] = r.apply(old[index])
            assert torch.equal(view(), want), r
            assert not torch.equal(want, old), r
            changed = {n for n, t in bits(m.hf).items() if not torch.equal(t, before[n])}
            assert len({m.hf.get_parameter(n).data_ptr() for n in changed}) == 1, (r, changed)
            assert not torch.equal(bare(m.hf), logits), r
            assert m.identity()["weights"] != who["weights"]
            assert m.identity()["rewrites"] == [r.describe()]
        assert same(bits(m.hf), before), r
    assert m.identity() == who
    assert torch.equal(bare(m.hf), logits)


@pytest.mark.parametrize("name", ["gpt2", "falcon_40b", "llama_gqa"])
def test_heads_of_a_layer_are_rewritten_like_the_layer(name):
    m = model(name)
    delta = noise(*m.weights.q[1].shape)
    whole, heads = Rewrite("q.1", delta=delta), [Rewrite(f"q.1.{h}", delta=d) for h, d in enumerate(delta)]
    with rewritten(m, whole):
        one = m.run(IDS)
    with rewritten(m, *heads):
        assert torch.equal(m.run(IDS), one)
    with rewritten(m, Rewrite("o.1.2", value=torch.zeros_like(m.weights.o[1][2]))):
        got = m.run(IDS)
    assert gap(got, m.run(IDS, Ablate("z.1.2"))) < 1e-5


def test_rewrites_stack_and_an_exception_undoes_them():
    m = model("gpt2")
    before, d = bits(m.hf), noise(*m.weights.mlp_out[1].shape)
    one, two = Rewrite("mlp_out.1", delta=1e4 * d), Rewrite("mlp_out.1", delta=d, record={"by": "test"})

    def inner():
        with rewritten(m, two, Rewrite("q.0.1", delta=noise(32, 8))):
            active = m.identity()["rewrites"]
            assert [r["weight"] for r in active] == ["mlp_out.1", "mlp_out.1", "q.0.1"]
            assert active[1]["record"] == {"by": "test"}
            raise ZeroDivisionError

    def outer():
        with rewritten(m, one):
            middle = bits(m.hf)
            with pytest.raises(ZeroDivisionError):
                inner()
            assert same(bits(m.hf), middle)
            with pytest.raises(Refused, match="shape"), rewritten(m, two, Rewrite("q.0.1", delta=noise(3, 8))):
                pytest.fail("a rewrite that does not fit was made")
            assert same(bits(m.hf), middle)
            assert len(m.identity()["rewrites"]) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outer()
    assert same(bits(m.hf), before)
    assert "rewrites" not in m.identity()


def test_paths_name_modules_and_parameters():
    m = model("gpt2")
    d = noise(*m.weights.mlp_out[1].shape)
    with rewritten(m, Rewrite("mlp_out.1", delta=d)):
        want = m.run(IDS)
    for path in ("transformer.h.1.mlp.c_proj", "transformer.h.1.mlp.c_proj.weight"):  # Conv1D stores inputs first
        with rewritten(m, Rewrite(path, delta=d)):
            assert torch.equal(m.run(IDS), want)
    m = model("llama")
    d = noise(*m.weights.mlp_out[1].shape)
    with rewritten(m, Rewrite("model.layers.1.mlp.down_proj", delta=d)):
        want = m.run(IDS)
    with rewritten(m, Rewrite("model.layers.1.mlp.down_proj.weight", delta=d.T)):
        assert torch.equal(m.run(IDS), want)
    with rewritten(m, Rewrite("model.layers.1.input_layernorm.weight", value=noise(3), rows=(0, 5, 9))):
        assert not torch.equal(m.run(IDS), want)


def test_files_hold_them_whole(tmp_path):
    made = [
        Rewrite("q.1.2", factors=(noise(32, 1), noise(1, 8)), record={"method": "rome", "prompt": "é"}),
        Rewrite("embed", delta=noise(2, 32), rows=(4, 9), tied=True),
        Rewrite("mlp_out.0", value=noise(128, 3).bfloat16(), columns=(1, 2, 3)),
    ]
    path = save_rewrites(tmp_path / "edit.safetensors", *made)
    again = open_rewrites(path)
    assert [r.describe() for r in again] == [r.describe() for r in made]
    assert [(r.tied, r.record) for r in again] == [(r.tied, r.record) for r in made]
    with rewritten(model("gpt2"), *made):
        want = model("gpt2").run(IDS)
    with rewritten(model("gpt2"), *again):
        assert torch.equal(model("gpt2").run(IDS), want)
    other = tmp_path / "other.safetensors"
    other.write_bytes(path.read_bytes().replace(b'"weight', b'"height', 1).replace(b'\\"weight', b'\\"height', 1))
    with pytest.raises(Refused, match="damaged"):
        open_rewrites(other)


def test_the_self_checks_cache_learns_nothing_of_rewritten_weights(tmp_path):
    m = Model(copy.deepcopy(model("gpt2").hf))
    with rewritten(m, Rewrite("mlp_out.1", value=torch.zeros_like(m.weights.mlp_out[1]))):
        checked(m, tmp_path)
        assert not list(tmp_path.iterdir())
    checked(m, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


REFUSED = [
    ("gpt2", lambda: Rewrite("mlp_out.1"), "does not say how"),
    ("gpt2", lambda: Rewrite("q.1", delta=noise(1), value=noise(1)), "delta and value"),
    ("gpt2", lambda: Rewrite("q.1", delta=noise(1) / 0), "finite"),
    ("gpt2", lambda: Rewrite("q.1", delta=noise(1), rows=(1, 1)), "twice"),
    ("gpt2", lambda: Rewrite("q.1.2", factors=(noise(32, 2), noise(3, 8))), "do not multiply"),
    ("gpt2", lambda: Rewrite("q.1.2", delta=noise(8, 32)), "shape"),
    ("gpt2", lambda: Rewrite("q.1.4", delta=noise(32, 8)), "heads go to 3"),
    ("gpt2", lambda: Rewrite("q.3", delta=noise(4, 32, 8)), "layers go to 2"),
    ("gpt2", lambda: Rewrite("mlp_in.1.0", delta=noise(32)), "no heads"),
    ("gpt2", lambda: Rewrite("mlp_out.1", delta=noise(1, 32), rows=(128,)), "not there"),
    ("gpt2", lambda: Rewrite("mlp_up.1", delta=noise(1)), "no such weight"),
    ("gpt2", lambda: Rewrite("transformer.h.0", delta=noise(1)), "no such weight"),
    ("gpt2", lambda: Rewrite("embed", delta=noise(101, 32)), "lm_head.weight share its memory"),
    ("llama", lambda: Rewrite("mlp_out_bias.0", delta=noise(32)), "not stored"),
    ("granite", lambda: Rewrite("unembed", delta=noise(32, 101), tied=True), "not stored"),
]


@pytest.mark.parametrize(("name", "rewrite", "word"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_is_refused(name, rewrite, word):
    m = model(name)
    before = bits(m.hf)
    with pytest.raises(Refused, match=word), rewritten(m, rewrite()):
        pytest.fail("the block ran")
    assert same(bits(m.hf), before)


def test_weights_that_are_elsewhere_or_packed_are_refused():
    hf = copy.deepcopy(model("llama").hf)
    hf.model.layers[1].mlp.down_proj.to("meta")
    with pytest.raises(Refused, match="offloaded"), rewritten(Model(hf), Rewrite("mlp_out.1", delta=noise(48, 32))):
        pytest.fail("the block ran")
    hf = copy.deepcopy(model("llama").hf)
    nn.utils.parametrizations.weight_norm(hf.model.layers[1].mlp.down_proj)
    with pytest.raises(Refused, match="not stored"), rewritten(Model(hf), Rewrite("mlp_out.1", delta=noise(48, 32))):
        pytest.fail("the block ran")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_matrix_under_an_adapter_is_refused_and_its_parts_are_named_by_path():
    hf = peft.get_peft_model(
        copy.deepcopy(model("llama").hf), peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    )
    m = Model(hf.base_model.model)
    with (
        pytest.raises(Refused, match=r"merge_and_unload|not stored"),
        rewritten(m, Rewrite("mlp_out.1", delta=noise(48, 32))),
    ):
        pytest.fail("the block ran")
    path = "model.layers.1.mlp.down_proj.base_layer.weight"
    before, logits = bits(m.hf), m.run(IDS)
    with rewritten(m, Rewrite(path, delta=noise(32, 48))):
        assert not torch.equal(m.run(IDS), logits)
    assert same(bits(m.hf), before)
