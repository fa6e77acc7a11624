"""GGUF files: every number of the original comes back, and what is no whole model is refused with the way out."""

import json
import sys
from importlib import import_module

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.models.loading import gguf
from cutaway.models.loading.load import load
from tests.models.common import IDS, gap
from tests.models.gguf_files import SHAPES, tiny, written
from tests.models.words import byte_level

PROMPTS = ["the cat sat on a mat and gave it to her when they went home", "Paris again"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written to the home of whoever runs the tests."""
    monkeypatch.setattr(sys.modules[load.__module__], "CACHE", tmp_path / "checks")


@pytest.fixture
def file(tmp_path):
    return written(tiny("llama"), tmp_path / "tiny.Q8_0.gguf", "llama", "Q8_0")


@pytest.mark.parametrize("name", SHAPES)
def test_every_logit_is_that_of_the_original(name, tmp_path, capfd):
    hf = tiny(name)
    m = load(written(hf, tmp_path / "m.gguf", SHAPES[name][0]), device="cpu", check=False)
    assert m.tokenizer is not None
    tokens = m.tokens(PROMPTS)
    assert m.tokenizer(PROMPTS)["input_ids"] == byte_level()(PROMPTS)["input_ids"]
    with torch.no_grad():
        want = hf(tokens.ids, attention_mask=tokens.mask).logits
    assert gap(m.run(tokens)[tokens.mask], want[tokens.mask]) < 1e-6
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_nothing_of_it_is_disabled_and_it_is_read_like_any_model(name, tmp_path):
    m = load(written(tiny(name), tmp_path / "m.gguf", SHAPES[name][0]), device="cpu")
    assert m.disabled == {}
    assert m.sites()["head_out"] == "read and write"
    m.hf.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", device="cpu", check=False)
    assert torch.equal(again.run(IDS), m.run(IDS))


def test_what_was_rounded_is_said_in_the_record(file):
    m = load(file, device="cpu", check=False)
    assert m.identity()["origin"] == {"format": "GGUF", "stored": "Q8_0"}
    assert m.name == "tiny.Q8_0"
    assert m.made is not None
    assert m.made.flags[""] == str(file)
    assert (m.dtype, load(file, device="cpu", dtype="bfloat16", check=False).dtype) == (torch.float32, torch.bfloat16)
    original = tiny("llama")
    weight = m.hf.model.layers[1].mlp.up_proj.weight
    assert 0 < gap(weight, original.model.layers[1].mlp.up_proj.weight) < 1e-2
    assert m.fingerprint() not in {load(original, check=False).fingerprint(), ""}


@pytest.mark.parametrize("rule", ["gpt-2", "llama-bpe", "deepseek-coder"])
def test_a_rule_of_splitting_that_is_not_known_is_said_in_the_record(rule, tmp_path):
    file = written(tiny("llama"), tmp_path / "m.gguf", "llama", **{"tokenizer.ggml.pre": rule})
    said = load(file, device="cpu", check=False).identity()["origin"].get("text", "")
    assert ("'deepseek-coder' is not known" in said) == (rule == "deepseek-coder")


def test_a_file_is_read_after_transformers_made_itself_anew(file, monkeypatch):
    """Its `processing_utils` puts a fresh module in place, of which loaded submodules are no attributes."""
    import_module("transformers.modeling_gguf_pytorch_utils")
    monkeypatch.delattr(sys.modules["transformers"], "modeling_gguf_pytorch_utils", raising=False)
    assert load(file, device="cpu", check=False).name == "tiny.Q8_0"


def test_models_of_ollama_by_name_manifest_and_blob(file, tmp_path, monkeypatch):
    store = tmp_path / "store"
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "1b"
    manifest.parent.mkdir(parents=True)
    (store / "blobs").mkdir()
    blob = file.rename(store / "blobs" / "sha256-0a1b2c")
    layers = [{"mediaType": f"application/vnd.ollama.image.{k}", "digest": d} for k, d in MADE.items()]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    monkeypatch.setattr(gguf, "OLLAMA", (tmp_path / "none", store))
    read = [load(source, device="cpu", check=False) for source in ("ollama:tiny:1b", manifest, blob)]
    assert [m.name for m in read] == ["ollama:tiny:1b", "1b", "a tiny model"]
    assert len({m.fingerprint() for m in read}) == 1
    blob.unlink()
    for source, word in (
        ("ollama:tiny:1b", "its blob sha256:0a1b2c is not beside it"),
        ("ollama:other", "ollama pull"),
    ):
        with pytest.raises(Refused, match=word):
            load(source)


def test_a_store_that_may_not_be_read_is_said(file, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(file), "is_file", closed)
    with pytest.raises(Refused, match="may not be read by you"):
        load("ollama:tiny")


MADE = {"template": "sha256:ff", "model": "sha256:0a1b2c"}


def test_a_file_of_the_hub_is_found_in_its_cache_or_refused(file, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    file.rename(snapshot / "tiny.gguf")
    assert load(f"org/name/tiny.gguf@{snapshot.name}", device="cpu", check=False).name == "tiny"
    with pytest.raises(Refused, match="could not be fetched"):
        load("org/name/other.gguf")


def edited(file, **fields):
    written(tiny("llama"), file, "llama", **fields)


REFUSED = {
    "cut off": (lambda f: f.write_bytes(f.read_bytes()[:-5000]), "it is cut off: 0.* MB are there"),
    "a header cut off": (lambda f: f.write_bytes(f.read_bytes()[:300]), "header is damaged or cut off"),
    "another format": (lambda f: f.write_bytes(b"PK" + f.read_bytes()), "does not begin as GGUF"),
    "the first version": (lambda f: f.write_bytes(b"GGUF\1" + f.read_bytes()[5:]), "version of GGUF that is not read"),
    "several files": (lambda f: (f.parent / "a.gguf").write_bytes(b"GGUF"), "several GGUF files: a.gguf, tiny"),
    "a part": (lambda f: edited(f, **{"split.count": 3}), "one of 3 parts\n.*llama-gguf-split --merge"),
    "a projector": (lambda f: edited(f, **{"general.architecture": "clip"}), "reads images"),
    "an unknown architecture": (lambda f: edited(f, **{"general.architecture": "rwkv7"}), "no 'rwkv7' models"),
    "an unknown scaling": (lambda f: edited(f, **{"llama.rope.scaling.type": "longrope",
                                                  "llama.rope.scaling.factor": 4.0}), "scaled by 'longrope'"),
    "half a rotary width": (lambda f: written(tiny("phi3"), f, "phi3", **{"phi3.rope.dimension_count": 8}),
                            "another width than 8"),
    "a missing block": (lambda f: edited(f, **{"llama.block_count": 3}), "no weights for 9 places"),
    "weights beside": (lambda f: edited(f, **{"llama.block_count": 1}), "would be left out"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_files_that_are_no_whole_model_are_refused(what, file):
    spoils, word = REFUSED[what]
    spoils(file)
    with pytest.raises(Refused, match=word):
        load(file.parent if what == "several files" else file, device="cpu")


def test_memory_and_packages_are_asked_for_before_the_weights_are_read(file, monkeypatch):
    assert load(file.parent, device="cpu", check=False).name == "tiny.Q8_0"
    monkeypatch.setattr(sys.modules[load.__module__], "_free_memory", lambda: 1000)
    with pytest.raises(Refused, match="GiB are free"):
        load(file, device="cpu")
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="read with gguf and accelerate") as refusal:
        load(file, device="cpu")
    assert refusal.value.instead == "pip install 'cutaway[gguf]'"
