"""Patching between checkpoints: by its definition, on a change planted in one head, and what is refused."""

from functools import cache

import pytest
import torch
import transformers as tf

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.models.edits.library import Replace
from cutaway.models.loading.shuffle import shuffled
from cutaway.patching import cross_model
from tests.conformance.subjects import config, family, llama_task, miniworld, random_llama, tokenizer, uneven_task


@cache
def llama():
    return random_llama()


def saved(hf, folder, tok=None):
    """A checkpoint in a folder."""
    hf.save_pretrained(folder)
    (tok or tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another random checkpoint of the same architecture."""
    return saved(random_llama(seed=1).hf, tmp_path_factory.mktemp("other"))


@pytest.mark.parametrize("task", [llama_task(), uneven_task()], ids=["even", "uneven"])
def test_heads_equal_the_definition(other, task):
    model, giver = llama(), random_llama(seed=1)
    bound = task.bind(model)
    given, clean = giver.capture(bound.clean, "z"), bound.metric(model.run_last(bound.clean))
    gap = (bound.metric(giver.run_last(bound.clean)) - clean).mean()
    result = cross_model(model, ca.load(other), task, samples=1)
    for layer in range(2):
        for head in range(4):
            name = f"z.{layer}.{head}"
            effect = (bound.metric(model.run_last(bound.clean, Replace(name, given[name]))) - clean).mean()
            assert torch.allclose(result.effect[layer, head], effect, atol=5e-5)
            assert torch.allclose(result.recovered[layer, head], effect / gap, atol=1e-4)
    assert result.record["other"]["weights"] == giver.fingerprint()


def test_the_last_stream_is_read_by_this_models_head(other):
    model, giver, task = llama(), random_llama(seed=1), llama_task()
    bound = task.bind(model)
    result = cross_model(model, ca.load(other), task, site="resid_post", samples=1)
    assert result.grid == ("layer", "position")
    stream = giver.capture(bound.clean, "resid_post.1")["resid_post.1"][:, -1]
    with torch.no_grad():
        logits = model.hf.lm_head(model.hf.model.norm(stream))
    effect = (bound.metric(logits) - bound.metric(model.run_last(bound.clean))).mean()
    assert torch.allclose(result.effect[1, -1], effect, atol=5e-5)
    assert result.effect[1, :-1].abs().max() < 1e-5


def test_a_change_planted_in_one_head_is_found_there(tmp_path):
    model = miniworld()
    task = ca.tasks.load("ioi", model, 12)
    hf = type(model.hf).from_pretrained(ca.zoo.entry("miniworld").folder)
    width, head = model.shape.d_head, 1
    with torch.no_grad():  # head 3.1 of the other checkpoint sees no values any more
        hf.model.layers[3].self_attn.v_proj.weight[head * width : (head + 1) * width] = 0
    folder = saved(hf, tmp_path / "fine-tuned", model.tokenizer)
    result = cross_model(model, ca.load(folder), task, samples=2)
    assert float((result.other - result.clean).mean()) < 0
    assert result.recovered[3, 1] == pytest.approx(1.0, abs=1e-3)  # this head alone makes all of the difference
    elsewhere = result.effect.clone()
    elsewhere[3, 1] = 0
    assert elsewhere[:4].abs().max() < 1e-4  # nothing differs before it, nor beside it
    assert result.effect[3, 1] < 5 * result.null[3, 1].min()
    assert result.interval[3, 1, 1] < 0


def test_the_shuffled_copy_keeps_every_entry_and_the_model():
    model = llama()
    before = model.fingerprint()
    model.disabled["z"] = "why"
    copy = shuffled(model)
    assert copy.disabled["z"] == "why"
    assert model.fingerprint() == before == random_llama().fingerprint()
    for a, b in zip(model.hf.parameters(), copy.hf.parameters(), strict=True):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
        assert (a.ndim == 1) == torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
    assert copy.fingerprint() == shuffled(model).fingerprint() != before != shuffled(model, 1).fingerprint()
    hf = shuffled(family("llama_mqa_bias_tied")).hf
    assert hf.get_input_embeddings().weight is hf.get_output_embeddings().weight


def test_what_cannot_be_compared_is_refused(tmp_path, other):
    model, task = llama(), llama_task()
    with pytest.raises(Refused, match="weights are the same"):
        cross_model(model, ca.load(saved(model.hf, tmp_path / "same")), task)
    deeper = tf.LlamaForCausalLM(config(num_hidden_layers=3)).eval()
    with pytest.raises(Refused, match="same architecture"):
        cross_model(model, ca.load(saved(deeper, tmp_path / "deeper")), task)
    changed = tf.AutoTokenizer.from_pretrained(other)
    changed.add_tokens(["Nora"])
    with pytest.raises(Refused, match="tokenizers differ"):
        cross_model(model, ca.load(saved(random_llama(seed=1).hf, tmp_path / "renamed", changed)), task)
    with pytest.raises(Refused, match="float64 on cpu"):
        cross_model(model, ca.load(other, dtype="float64"), task)
    with pytest.raises(Refused, match="site"):
        cross_model(model, ca.load(other), task, site="mlp_post")
    idle = random_llama().hf
    with torch.no_grad():
        idle.model.embed_tokens.weight[1] += 1  # a token that no prompt has
    with pytest.raises(Refused, match="metric differs by"):
        cross_model(model, ca.load(saved(idle, tmp_path / "idle")), task)
