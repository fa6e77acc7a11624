"""A family is one row: a toy one is loaded, checked, named on the command line and in the docs."""

from dataclasses import replace

import pytest
import torch
import transformers as tf
from transformers.models.llama.modeling_llama import LlamaAttention

import cutaway as ca
from cutaway.cli import app
from cutaway.models.anatomy.families import FAMILIES
from tests.conformance import subjects
from tools import families


class ToyConfig(tf.LlamaConfig):
    model_type = "toy_llama"


class ToyAttention(LlamaAttention):
    """Attention whose output projection is called `out`."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self._modules["out"] = self._modules.pop("o_proj")

    @property
    def o_proj(self):
        return self.out


class ToyForCausalLM(tf.LlamaForCausalLM):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        for i, block in enumerate(self.model.layers):
            block.self_attn = ToyAttention(config, i)
        self.post_init()


@pytest.fixture
def folder(tmp_path):
    """A saved model of an architecture that transformers knows and the table of families does not."""
    tf.AutoConfig.register("toy_llama", ToyConfig, exist_ok=True)
    tf.AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)
    torch.manual_seed(0)
    tokenizer = subjects.tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ToyForCausalLM(ToyConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "toy")
    tokenizer.save_pretrained(tmp_path / "toy")
    yield tmp_path / "toy"
    tf.models.auto.configuration_auto.CONFIG_MAPPING._extra_content.pop("toy_llama", None)
    tf.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(ToyConfig, None)


def test_a_row_makes_an_architecture_readable_from_python_the_command_line_and_docs(folder, monkeypatch, capsys):
    with pytest.raises(ca.Refused, match="no family row, and no output projection was found"):
        ca.load(folder)
    monkeypatch.setitem(FAMILIES, "toy_llama", replace(FAMILIES["llama"], name="toy_llama", o="self_attn.out"))
    model = ca.load(folder)
    assert (model.family.name, model.family.probed) == ("toy_llama", False)
    assert all(outcome.passed for outcome in ca.self_check(model))
    words = "To be or not to be"
    acts = model.capture(words, ["z.1", "attn_out.1"])
    own = torch.nn.functional.linear(acts["z.1"].flatten(-2), model.hf.model.layers[1].self_attn.out.weight)
    assert torch.allclose(acts["attn_out.1"], own, atol=1e-6)

    assert app.main(["check", "--model", str(folder)]) == 0
    assert "identities hold" in capsys.readouterr().out
    page = families.page([families.row("toy_llama", model)], "")
    assert "toy_llama" in page
    assert "ToyConfig" in page
