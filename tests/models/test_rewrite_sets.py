"""Sets of rewrites: kept on a model and taken back, measured, compared, and exported to other tools."""

import copy

import peft
import pytest
import torch
import transformers as tf

from cutaway.core.refuse import Refused
from cutaway.models import (
    Rewrite,
    Rewrites,
    RewriteStack,
    changes,
    difference,
    export_adapter,
    export_model,
    rewritten,
)
from cutaway.models.model import Model
from tests.models.common import bare, gap, model, noise
from tests.models.test_rewrites import bits, same

FAMILIES = ["gpt2", "gptj", "gpt_neox_parallel", "llama_gqa", "phi3", "bloom"]


def low_rank(m: Model) -> list[Rewrite]:
    """Rewrites by factors of an MLP's output, twice, of a slice of it, and of heads where there are some."""
    rows, columns = m.weights.mlp_out[1].shape
    out = [Rewrite("mlp_out.1", factors=(noise(rows, r, seed=r), noise(r, columns))) for r in (1, 3)]
    out.append(Rewrite("mlp_out.0", factors=(noise(2, 1), noise(1, 3)), rows=(7, 2), columns=(1, 30, 4)))
    for name in ("q", "o"):
        heads, rows, columns = getattr(m.weights, name)[2].shape
        out.append(Rewrite(f"{name}.2", factors=(noise(heads, rows, 1), noise(heads, 1, columns))))
        out.append(Rewrite(f"{name}.2.1", factors=(noise(rows, 1), noise(1, columns, seed=5))))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_stack_keeps_rewrites_on_the_users_model_and_takes_each_back_bit_for_bit(dtype):
    m = Model(copy.deepcopy(model("gpt2", dtype).hf))
    stack, before = RewriteStack(m), [bits(m.hf)]
    for r in low_rank(m):
        stack.push(r)
        assert not same(bits(m.hf), before[-1])
        before.append(bits(m.hf))
    assert [r["weight"] for r in m.identity()["rewrites"]] == [made[0].weight for made in stack.rewrites]
    with pytest.raises(Refused, match="shape"):
        stack.push(low_rank(m)[0], Rewrite("mlp_out.1", delta=noise(3)))
    while stack:
        assert same(bits(m.hf), before.pop())
        stack.pop()
    assert same(bits(m.hf), before.pop())
    assert "rewrites" not in m.identity()
    with pytest.raises(Refused, match="none stands"):
        stack.pop()


def test_sizes_and_rounding_are_those_of_the_stored_weight():
    delta = 0.003 * noise(*model("llama_gqa").weights.mlp_out[1].shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        m = model("llama_gqa", dtype)
        old = m.weights.mlp_out[1].double()
        twice, shared = changes(m, Rewrite("mlp_out.1", delta=delta), Rewrite("k.1.1", delta=noise(32, 8)))
        with rewritten(m, Rewrite("mlp_out.1", delta=delta)):
            stored = m.weights.mlp_out[1].double() - old
        assert twice.size == pytest.approx(float(delta.double().norm() / old.norm()), rel=1e-6)
        assert twice.rounding == pytest.approx(float((stored - delta.double()).norm() / delta.double().norm()))
        assert twice.lost == pytest.approx(float((stored == 0).double().mean()))
        assert (twice.rounding > 1e-3) == (dtype is not torch.float32)
        assert (twice.heads, shared.heads) == ((), (2, 3))


def test_the_difference_of_two_checkpoints_makes_one_of_the_other():
    one, other = model("llama_mqa_bias_tied"), Model(copy.deepcopy(model("llama_mqa_bias_tied").hf), name="tuned")
    edit = low_rank(other)[0], Rewrite("embed", delta=noise(2, 32), rows=(3, 9), tied=True)
    RewriteStack(other).push(*edit)
    found = difference(one, other)
    assert {r.weight for r in found} == {"model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"}
    assert found.record["from"]["weights"] != found.record["to"]["weights"]
    with found.on(one):
        assert same(bits(one.hf), bits(other.hf))
    assert not len(difference(one, one))
    with pytest.raises(Refused, match="absent"):
        difference(one, model("gpt2"))


def test_a_set_travels_in_one_file_with_its_record(tmp_path):
    m = model("gpt2")
    made = Rewrites(tuple(low_rank(m)), {"method": "rome", "requests": [{"subject": "é"}]})
    again = Rewrites.open(made.save(tmp_path / "edit.safetensors"))
    assert again.record == made.record
    assert [r.describe() for r in again] == [r.describe() for r in made]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_exports_give_plain_transformers_and_peft_the_logits_of_the_rewritten_model(name, tmp_path):
    m = model(name)
    before, edit = bits(m.hf), low_rank(m)
    with rewritten(m, *edit):
        want = bare(m.hf)
    assert gap(want, bare(m.hf)) > 0.05
    export_model(m, tmp_path / "whole", *edit)
    export_adapter(m, tmp_path / "adapter", *edit)
    assert same(bits(m.hf), before)
    whole = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    assert torch.equal(bare(whole), want)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(m.hf), tmp_path / "adapter").eval()
    assert gap(bare(adapted), want) < 1e-5
    assert gap(bare(adapted.merge_and_unload()), want) < 1e-5
    with pytest.raises(Refused, match="not empty"):
        export_model(m, tmp_path / "adapter", *edit)


@pytest.mark.parametrize(
    ("rewrite", "word"),
    [
        (lambda: (Rewrite("mlp_out.1", delta=noise(48, 32)),), "no factors"),
        (lambda: (Rewrite("embed", factors=(noise(101, 1), noise(1, 32))),), "no linear module"),
        (lambda: (Rewrite("mlp_out.1", factors=(noise(4, 1), noise(1, 32))),), "shape"),
        (tuple, "change nothing"),
    ],
)
def test_what_no_adapter_can_be_is_refused_and_nothing_is_written(rewrite, word, tmp_path):
    with pytest.raises(Refused, match=word):
        export_adapter(model("llama"), tmp_path / "adapter", *rewrite())
    assert not (tmp_path / "adapter").exists()
