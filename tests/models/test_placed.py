"""Models that are spread: over devices by accelerate (here partly on disk), over processes by tensor parallelism."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as tf

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Ablate, Replace, Scale
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from tests.models.tiny import build

IDS = torch.arange(5, 12)[None]
ON_DISK = ("model.layers.1", "model.layers.2", "model.norm")


def metric(logits: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """A difference of two logits."""
    return logits[:, 3] - logits[:, 7]


def variants(m: Model) -> list[list[Edit]]:
    """Patches of the stream everywhere, and edits of what sublayers write."""
    other = m.capture(IDS + 9, "resid_pre")
    cells = [f"resid_pre.{i}@{p}" for i in range(m.shape.n_layers) for p in range(IDS.shape[1])]
    return [*([Replace(c, other[c])] for c in cells), [Scale("mlp_out.1", 0.5)], [Ablate("attn_out.2")]]


@pytest.fixture
def spread(tmp_path) -> Model:
    """A model two of whose layers are fetched from disk when they run."""
    hf = build("llama_gqa")
    names = [
        "model.embed_tokens",
        "model.rotary_emb",
        *(f"model.layers.{i}" for i in range(3)),
        "model.norm",
        "lm_head",
    ]
    where = {n: "disk" if n in ON_DISK else "cpu" for n in names}
    dispatch: Any = accelerate.dispatch_model
    hf = dispatch(hf, where, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    return ca.load(hf, check=False)


def test_layers_on_disk_are_read_and_edited_like_others(spread):
    whole = Model(build("llama_gqa"))
    assert next(spread.hf.model.layers[1].parameters()).is_meta
    sites = [s for s, can in whole.sites().items() if can.startswith("read")]
    got, want = spread.capture(IDS, sites), whole.capture(IDS, sites)
    assert list(got) == list(want)
    for place in want:
        torch.testing.assert_close(got[place], want[place], msg=place)
    plan = [*variants(whole), [Ablate("z.2.1")], [Scale("head_out.1.2", 2.0)]]
    torch.testing.assert_close(
        sweep(spread, spread.tokens(IDS), plan, metric), sweep(whole, whole.tokens(IDS), plan, metric)
    )
    assert next(spread.hf.model.layers[1].parameters()).is_meta
    assert spread.fingerprint().startswith("partial-")


def test_a_folder_is_spread_over_devices(tmp_path, monkeypatch):
    build("llama_gqa").save_pretrained(tmp_path)
    given, plain_load = [], tf.AutoModelForCausalLM.from_pretrained

    def watched(*args: Any, **options: Any) -> Any:
        given.append(options.get("device_map"))
        return plain_load(*args, **options)

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", watched)
    where = {"model": "cpu", "lm_head": "cpu"}
    placed = ca.load(str(tmp_path), device=where, check=False)
    assert given == [where]
    plain = ca.load(str(tmp_path), check=False)
    torch.testing.assert_close(placed.run(IDS), plain.run(IDS))
    monkeypatch.setattr(importlib.import_module("cutaway.models.loading.load"), "find_spec", lambda name: None)
    with pytest.raises(Refused, match="pip install accelerate"):
        ca.load(str(tmp_path), device="auto")
    with pytest.raises(Refused, match="there is one process"):
        ca.load(str(tmp_path), device="tensor_parallel")


@pytest.mark.wide
def test_weights_split_over_two_processes(tmp_path):
    """Sites that every process holds whole are read and swept exactly; the others are refused."""
    build("llama_gqa").save_pretrained(tmp_path)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
              "--rdzv-endpoint", "localhost:0", "-m", "tests.models.test_placed", str(tmp_path)]  # fmt: skip
    root = Path(__file__).parents[2]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, *launch], cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    branches = ["q_in", "k_in", "v_in", "q", "k", "v", "scores", "pattern", "z", "head_out"]
    assert told["refused"] == [*branches, "mlp_pre", "mlp_gate", "mlp_post"]
    assert {"resid_pre", "attn_out", "mlp_out", "resid_post", "ln1.scale", "logits"} <= set(told["gaps"])
    assert max(told["gaps"].values()) < 1e-5
    assert told["sweep"] < 1e-5


def compared(folder: str) -> dict[str, object]:
    """One process's comparison of the split model with the whole one."""
    split, whole = ca.load(folder, device="tensor_parallel"), ca.load(folder)
    can = [s for s, c in whole.sites().items() if c.startswith("read")]
    kept = [s for s in can if s not in split.disabled]
    got, want = split.capture(IDS, kept), whole.capture(IDS, kept)
    gaps = {s: max(float((got[a] - want[a]).abs().max()) for a in want if a.startswith(s)) for s in kept}
    values = [sweep(m, m.tokens(IDS), variants(whole), metric) for m in (split, whole)]
    return {
        "refused": [s for s in can if s in split.disabled],
        "gaps": gaps,
        "sweep": float((values[0] - values[1]).abs().max()),
    }


if __name__ == "__main__":
    tf.logging.set_verbosity_error()
    torch.distributed.init_process_group("gloo")
    found = json.dumps(compared(sys.argv[1]))
    if torch.distributed.get_rank() == 0:
        sys.stdout.write(found + "\n")
    torch.distributed.destroy_process_group()
