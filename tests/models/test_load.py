"""Loading: safe folders come back as they were saved; everything else is refused, quickly and with its reason."""

import json
import os
import sys
import time

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.models.loading.load import load
from tests.models.common import IDS, bare, model
from tests.models.words import byte_level

loading = sys.modules[load.__module__]  # the package's own attribute of that name is the function


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written to the home of whoever runs the tests."""
    monkeypatch.setattr(loading, "CACHE", tmp_path / "checks")


@pytest.fixture
def folder(tmp_path):
    """A small GPT-2 as save_pretrained writes it."""
    model("gpt2").hf.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2", "falcon_40b", "mixtral", "gptj", "olmo2", "bert"])
def test_a_saved_folder_comes_back(name, tmp_path):
    hf = model(name).hf
    hf.save_pretrained(tmp_path / name)
    m = load(str(tmp_path / name), device="cpu", check=name == "gpt2")
    assert torch.equal(m.run(IDS), bare(hf))
    assert m.name == name
    assert m.disabled == {}
    assert m.fingerprint() == model(name).fingerprint()
    assert not any(p.requires_grad for p in m.hf.parameters())
    assert not m.hf.training


def test_shards_tokenizer_dtype_and_attention(tmp_path):
    hf = model("llama").hf
    hf.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    byte_level().save_pretrained(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    m = load(tmp_path / "m", device="cpu", attention="eager", check=False)
    assert m.hf.config._attn_implementation == "eager"
    assert m.tokenizer("the cat")["input_ids"] == byte_level()("the cat")["input_ids"]
    assert torch.equal(m.run(IDS), bare(model("llama", attention="eager").hf))
    half = load(tmp_path / "m", device="cpu", dtype="bfloat16", name="half", check=False)
    assert (half.dtype, half.name) == (torch.bfloat16, "half")


def test_half_precision_checkpoints_become_float32_on_the_cpu(tmp_path):
    model("llama", torch.bfloat16).hf.save_pretrained(tmp_path / "m")
    assert load(tmp_path / "m", device="cpu", check=False).dtype == torch.float32
    assert load(tmp_path / "m", device="cpu", dtype="auto", check=False).dtype == torch.bfloat16


def test_a_live_model_is_taken_as_it_is():
    hf = model("llama").hf
    m = load(hf, name="mine")
    assert m.hf is hf
    assert m.name == "mine"
    with pytest.raises(Refused, match="stays as it is"):
        load(hf, dtype="bfloat16")


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def rewrite(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights"),
    "weights cut off": (lambda f: truncate(f / "model.safetensors"), "cannot be loaded"),
    "own code": (lambda f: rewrite(f, auto_map={"AutoModelForCausalLM": "m.M"}), "own Python code"),
    "unknown type": (lambda f: rewrite(f, model_type="martian"), "cannot be loaded"),
    "no language model": (lambda f: rewrite(f, model_type="vit"), "cannot be loaded"),
    "other sizes": (lambda f: rewrite(f, n_embd=64), "cannot be loaded"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folders_are_refused(what, folder):
    breaks, word = BROKEN[what]
    breaks(folder)
    with pytest.raises(Refused, match=word):
        load(folder, device="cpu")


def test_weights_that_do_not_fit_are_refused_before_they_are_read(folder, monkeypatch):
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(loading, "_free_memory", lambda: size // 2)
    with pytest.raises(Refused, match="GiB are free"):
        load(folder, device="cpu")
    monkeypatch.setattr(loading, "_free_memory", lambda: int(size * 1.5))
    assert load(folder, device="cpu", check=False).shape.n_layers == 3
    with pytest.raises(Refused, match="GiB are free"):
        load(folder, device="cpu", dtype="float64")
    monkeypatch.setattr(loading, "_free_memory", lambda: None)
    assert load(folder, device="cpu", dtype="float64", check=False).dtype == torch.float64


def test_memory_that_runs_out_while_loading_is_refused(folder, monkeypatch):
    def full(*args, **kw):
        raise MemoryError

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(Refused, match="memory is not enough"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("no-such-model", "no such zoo model"),
        ("nobody/nothing", "could not be fetched"),
        ("nobody/nothing-GGUF@v1", r"nobody/nothing-GGUF/FILE\.gguf"),
    ],
)
def test_unknown_names_are_refused_at_once_without_a_network(source, word):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    start = time.perf_counter()
    with pytest.raises(Refused, match=word):
        load(source)
    assert time.perf_counter() - start < 10


def test_what_is_no_transformers_model_is_refused(tmp_path):
    with pytest.raises(Refused, match="not a transformers model"):
        load(torch.nn.Linear(2, 2))
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refused, match=r"no config\.json"):
        load(tmp_path / "file")


def test_free_memory_is_known_here():
    free = loading._free_memory()
    assert free is None or free > 2**20


def test_a_home_that_cannot_be_written_costs_only_the_check(folder, monkeypatch, tmp_path):
    (tmp_path / "blocked").write_text("a file, where a folder should be")
    monkeypatch.setattr(loading, "CACHE", tmp_path / "blocked" / "checks")
    assert load(folder, device="cpu").disabled == {}


@pytest.mark.parametrize(
    ("files", "asked", "words"),
    [
        ({"adapter_config.json": '{"base_model_name_or_path": "org/base"}'}, {}, ["adapter of PEFT", "again"]),
        ({"adapter_config.json": "[]"}, {}, ["does not name the model", "base_model_name_or_path"]),
        ({"w.gguf": "GGUF"}, {}, ["header is damaged or cut off"]),
        ({}, {"dtype": "int8"}, ["dtype='int8'", "quantised", "bfloat16"]),
        ({}, {"dtype": "bf16"}, ["did you mean bfloat16?"]),
        ({}, {"dtype": torch.int32}, ["dtype='int32'"]),
        ({}, {"device": "cuda:7"}, ["device='cuda:7'", "this machine has"]),
        ({}, {"device": "gpu"}, ["device='gpu'", "it is no device"]),
    ],
)  # fmt: skip
def test_what_is_no_model_no_dtype_or_no_device_is_told_apart(folder, tmp_path, files, asked, words):
    place = tmp_path / "other" if files else folder
    place.mkdir(exist_ok=True)
    for name, text in files.items():
        (place / name).write_text(text)
    for path in [place, *(place / n for n in files if n.endswith(".gguf"))]:
        with pytest.raises(Refused) as error:
            load(path, **asked)
        assert all(w in str(error.value) for w in words), error.value


def test_loading_draws_no_bar_and_is_told_as_progress(folder, capfd):
    from cutaway.core.progress import listening

    told = []
    with listening(lambda done, total: told.append(done / total)):
        load(folder, device="cpu", check=False)
    assert told[-1] == 1.0
    assert capfd.readouterr() == ("", "")
