"""Multimodal checkpoints: the text part alone is loaded, and computes what the whole model computes of text."""

import sys

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from cutaway.core.refuse import Refused
from cutaway.models.loading.load import load
from tests.models.common import IDS, PADDED, bare, model
from tests.models.words import byte_level

_TEXT = {
    "vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EYE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14}  # fmt: skip
_SEES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
_IDS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [1, 1, 2]}}

# name → (configuration, class, class of the text part alone)
SHAPES = {
    "gemma3": (lambda: tf.Gemma3Config(text_config={**_TEXT, "head_dim": 12, "sliding_window": 4}, vision_config=_EYE,
                                       mm_tokens_per_image=4, image_token_index=90, boi_token_index=91,
                                       eoi_token_index=92), "Gemma3ForCausalLM"),
    "llava": (lambda: tf.LlavaConfig(text_config=tf.LlamaConfig(**_TEXT), vision_config=tf.CLIPVisionConfig(**_EYE),
                                     image_token_index=90), "LlamaForCausalLM"),
    "qwen2_5_vl": (lambda: tf.Qwen2_5_VLConfig(text_config={**_TEXT, **_AXES}, vision_config=_SEES, **_IDS),
                   "Qwen2ForCausalLM"),
    "qwen2_5_vl_tied": (lambda: tf.Qwen2_5_VLConfig(text_config={**_TEXT, **_AXES}, vision_config=_SEES, **_IDS,
                                                    tie_word_embeddings=True), "Qwen2ForCausalLM"),
    "qwen3_vl": (lambda: tf.Qwen3VLConfig(text_config={**_TEXT, **_AXES, "head_dim": 8}, **_IDS,
                                          vision_config={**_SEES, "deepstack_visual_indexes": [0],
                                                         "num_position_embeddings": 16}), "Qwen3ForCausalLM"),
    "idefics3": (lambda: tf.Idefics3Config(text_config=tf.LlamaConfig(**_TEXT), vision_config=_EYE,
                                           image_token_id=90), "LlamaForCausalLM"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written to the home of whoever runs the tests."""
    monkeypatch.setattr(sys.modules[load.__module__], "CACHE", tmp_path / "checks")


def whole(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = tf.AutoModelForImageTextToText.from_config(SHAPES[name][0]())
        with torch.no_grad():
            for p in hf.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return hf.eval()


def renamed(file):
    """The names that later versions write: the parts of the model inside `model`."""
    weights = load_file(file)
    first = next(n for n in weights if "lm_head" not in n)
    if not first.startswith("model."):
        weights = {
            n.removeprefix("language_model.") if "lm_head" in n else
            n.replace("language_model.model.", "model.language_model."): t for n, t in weights.items()
        }  # fmt: skip
    else:
        weights = {n.replace("model.language_model.", "language_model.model."): t for n, t in weights.items()}
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("name", SHAPES)
def test_the_text_part_computes_what_the_whole_computes(name, tmp_path, capfd):
    hf = whole(name)
    hf.save_pretrained(tmp_path / name)
    byte_level().save_pretrained(tmp_path / name)
    capfd.readouterr()
    m = load(tmp_path / name, device="cpu", check=name == "qwen3_vl")
    assert capfd.readouterr() == ("", "")
    assert (type(m.hf).__name__, m.disabled) == (SHAPES[name][1], {})
    assert torch.equal(m.run(IDS), bare(hf))
    left = PADDED["right"]
    with torch.no_grad():
        want = hf(left.ids, attention_mask=left.mask).logits
    assert torch.equal(m.run(left)[left.mask], want[left.mask])
    assert m.tokenizer("the cat")["input_ids"] == byte_level()("the cat")["input_ids"]
    assert m.identity()["origin"] == {"format": "multimodal", "of": hf.config.model_type, "part": "text"}
    if name in ("gemma3", "llava"):
        renamed(tmp_path / name / "model.safetensors")
        assert torch.equal(load(tmp_path / name, device="cpu", check=False).run(IDS), bare(hf))


def test_a_live_one_is_refused_with_the_way_to_its_text_part():
    with pytest.raises(Refused, match="a live LlavaForConditionalGeneration") as refusal:
        load(whole("llava"))
    assert "save_pretrained" in refusal.value.instead


def test_weights_that_would_be_random_are_refused(tmp_path):
    model("llama").hf.model.save_pretrained(tmp_path / "headless")
    with pytest.raises(Refused, match=r"no weights for 1 places of a LlamaForCausalLM \(lm_head.weight\)"):
        load(tmp_path / "headless", device="cpu")
    hf = whole("llava")
    hf.save_pretrained(tmp_path / "llava")
    file = tmp_path / "llava" / "model.safetensors"
    save_file(
        {n.replace("language_model", "speech_model"): t for n, t in load_file(file).items()}, file, {"format": "pt"}
    )
    with pytest.raises(Refused, match="which would be random"):
        load(tmp_path / "llava", device="cpu")
