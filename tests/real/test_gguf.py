"""A real GGUF file, as llama.cpp's tools made it: its numbers are those of the folder, and the main job runs on it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import cutaway as ca
from cutaway.cli import main
from tests.real.conftest import REAL
from tools.real_models import FILE


@pytest.fixture
def file(name: str) -> Path:
    """The file of the model that has one."""
    there = REAL / f"{FILE}.gguf"
    assert there.is_file(), f"there is no {there}: make it with `python -m tools.real_models {FILE}`"
    return there


@pytest.mark.parametrize("name", [FILE], indirect=True)
def test_a_real_file_is_read_to_the_bit(name, file, model):
    import gguf

    m = ca.load(file, check=False)
    prompts = ["The capital of France is", "When Mary and John went to the store, John gave a drink to"]
    assert torch.equal(m.run(prompts), model.run(prompts))
    assert m.text.predict(prompts[0], 1)[0][0].strip() == "Paris"
    assert m.identity()["origin"] == {"format": "GGUF", "stored": "Q4_1"}
    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}  # by another reader, and turned by hand
    down, q = (stored[f"blk.7.{n}.weight"] for n in ("ffn_down", "attn_q"))
    layer = m.hf.model.layers[7]
    assert np.array_equal(gguf.dequantize(down.data, down.tensor_type), layer.mlp.down_proj.weight.numpy())
    halves = gguf.dequantize(q.data, q.tensor_type).reshape(9, 32, 2, 576).swapaxes(1, 2).reshape(576, 576)
    assert np.array_equal(halves, layer.self_attn.q_proj.weight.numpy())


@pytest.mark.parametrize("name", [FILE], indirect=True)
def test_the_main_job_runs_on_it(name, file, capsys):
    assert main(["explain", "The capital of France is", "--model", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["answer"].strip(), found["model"]) == ("Paris", FILE)
    assert any("23.4" in text for text in found["summary"])
