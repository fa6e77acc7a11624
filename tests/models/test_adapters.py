"""Adapters of PEFT by folder and hub name: merged into the model they name, or refused with the way out."""

import json
import sys

import peft
import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.models.loading import adapters
from cutaway.models.loading.load import load
from tests.models.common import IDS, bare, gap
from tests.models.tiny import build
from tests.models.words import byte_level

pytestmark = pytest.mark.filterwarnings(
    "ignore:::peft", "ignore::peft.utils.warning.PeftWarning", "ignore::FutureWarning"
)
COMMIT = "0123456789" * 4


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written to the home of whoever runs the tests."""
    monkeypatch.setattr(sys.modules[load.__module__], "CACHE", tmp_path / "checks")


def lora(**more):
    return peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **more)


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    build("llama_gqa").save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


def adapter(base, folder, config=None, rows=None):
    """A folder as PEFT saves it, and the logits of the adapted model."""
    hf = load(base, device="cpu", check=False).hf
    if rows is not None:
        hf.resize_token_embeddings(rows, mean_resizing=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(hf, config or lora()).eval()
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    return bare(wrapped)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "whole embedding"])
def test_an_adapter_is_in_the_weights_of_what_is_read(kind, base, tmp_path):
    config, rows = lora(use_dora=kind == "dora"), None
    if kind == "ia3":
        targets = ["q_proj", "down_proj"]
        config = peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"], init_ia3_weights=False)
    if kind == "whole embedding":
        config, rows = lora(modules_to_save=["embed_tokens", "lm_head"]), 120
    want = adapter(base, tmp_path / "tuned", config, rows)
    m, plain = load(tmp_path / "tuned", device="cpu"), load(base, device="cpu", check=False)
    assert m.disabled == {}
    assert gap(m.run(IDS), want) < 1e-5
    assert rows is not None or gap(want, plain.run(IDS)) > 1e-2
    assert m.fingerprint() != plain.fingerprint()
    assert m.name == "tuned"
    assert m.tokenizer("the cat")["input_ids"] == byte_level()("the cat")["input_ids"]
    origin = {"format": "PEFT", "adapter": config.peft_type.value, "base": str(base), "merged": True}
    assert m.identity()["origin"] == origin
    assert "adapters" not in m.identity()
    assert m.weights.q[1].untyped_storage().data_ptr() == m.hf.model.layers[1].self_attn.q_proj.weight.data_ptr()
    m.hf.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged", device="cpu", check=False)
    assert torch.equal(again.run(IDS), m.run(IDS))
    assert rows is not None or again.fingerprint() == m.fingerprint()


def test_a_live_adapter_and_its_state_are_in_the_record(base):
    hf = load(base, check=False).hf
    hf.add_adapter(lora(), "one")
    hf.add_adapter(lora(), "other")
    m = load(hf.eval(), check=False)
    kinds = {n: (a["kind"], a["state"]) for n, a in m.identity()["adapters"].items()}
    assert kinds == {"one": ("lora", "off"), "other": ("lora", "active")}
    hf.disable_adapters()
    assert {a["state"] for a in m.identity()["adapters"].values()} == {"off"}
    wrapped = peft.get_peft_model(load(base, check=False).hf, lora()).eval()
    wrapped.merge_adapter()
    assert load(wrapped, check=False).identity()["adapters"] == {"default": {"kind": "lora", "state": "merged"}}


def test_an_adapter_and_a_revision_of_the_hub(base, tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    want = adapter(base, tmp_path / "tuned")
    for name, folder in (("tuned", tmp_path / "tuned"), ("base", base)):
        place = hub / f"models--org--{name}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "v1").write_text(COMMIT)
        (place / "snapshots").mkdir()
        folder.rename(place / "snapshots" / COMMIT)
    plain = load("org/base@v1", device="cpu", check=False)
    assert plain.made.flags[""] == f"org/base@{COMMIT}"
    config = hub / "models--org--tuned" / "snapshots" / COMMIT / "adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "org/base", "revision": "v1"})
    )
    m = load("org/tuned@v1", device="cpu", check=False)
    assert gap(m.run(IDS), want) < 1e-5
    assert m.made.flags[""] == f"org/tuned@{COMMIT}"
    with pytest.raises(Refused, match="could not be fetched"):
        load("org/tuned@v2")


def changed(folder, **fields):
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))


REFUSED = {
    "no base": (lambda f: changed(f, base_model_name_or_path=None), "does not name the model"),
    "itself": (lambda f: changed(f, base_model_name_or_path=str(f)), "made for itself"),
    "another base": (lambda f: changed(f, base_model_name_or_path="org/away"), "org/away.*\n.*could not be fetched"),
    "prompts": (lambda f: changed(f, peft_type="PROMPT_TUNING"), "not in the weights"),
    "pickled": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "only pickled weights"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "without its adapter_model"),
    "other modules": (lambda f: changed(f, target_modules=["nowhere"]), "does not fit"),
    "more modules": (lambda f: changed(f, target_modules=["q_proj", "v_proj", "down_proj"]), "missing adapter keys"),
    "both": (lambda f: [(f / n).write_text("{}") for n in ("config.json", "model.safetensors")], "only one of them"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_whole_adapter_is_refused(what, base, tmp_path):
    adapter(base, tmp_path / "tuned")
    spoils, word = REFUSED[what]
    spoils(tmp_path / "tuned")
    with pytest.raises(Refused, match=word):
        load(tmp_path / "tuned", device="cpu")


def test_the_package_is_asked_for(base, tmp_path, monkeypatch):
    adapter(base, tmp_path / "tuned")
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="package peft is not here") as refusal:
        load(tmp_path / "tuned")
    assert refusal.value.instead == "pip install 'cutaway[peft]'"
