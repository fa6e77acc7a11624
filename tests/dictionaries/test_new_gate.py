"""A gate is one file: a toy one is trained, saved, opened, judged and named on the command line."""

import json
import subprocess
import sys

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.dictionaries import gates
from cutaway.dictionaries import open as open_dictionary
from cutaway.dictionaries import training as tr
from cutaway.dictionaries.evaluation.evaluate import evaluate
from cutaway.dictionaries.evaluation.evidence import Evidence
from cutaway.dictionaries.objectives import L0
from cutaway.dictionaries.store import save

FILE = '''
"""The largest pre-activation of each token, doubled."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.gates.shared.gate import EncoderGate, Gate
from cutaway.dictionaries.gates.shared.train_gate import Chosen, Own, TrainGate, fixed_pairs, pairs_of
from cutaway.dictionaries.kernels import topk as select
from cutaway.dictionaries.objectives.active import Active


@dataclass(frozen=True, eq=False)
class Doubled(EncoderGate):
    k: int = 1

    def apply(self, pre):
        value, index = pre.topk(self.k, dim=1)
        return SparseCode(index, 2 * value.relu(), pre.shape[1])


@dataclass(frozen=True)
class TrainDoubled(TrainGate):
    fixed = True
    k: int = 1

    def choose(self, x, encoder, own):
        index, value = select.top_k(x, encoder, self.k)
        return fixed_pairs(index, value, len(encoder.w))

    def active(self, pre, chosen, tokens, own):
        return Active(pre, 2 * pre.relu(), pairs_of(chosen), tokens)

    def gate(self, own):
        return Doubled(self.k)

    @classmethod
    def like(cls, gate, k):
        return cls(gate.k)
'''
SITE = "resid_post.0"


@pytest.fixture
def doubled(tmp_path, monkeypatch):
    (tmp_path / "doubled.py").write_text(FILE, "utf-8")
    monkeypatch.setattr(gates, "__path__", [*gates.__path__, str(tmp_path)])
    yield gates.forms_of("Doubled")
    sys.modules.pop("cutaway.dictionaries.gates.doubled", None)


def test_a_gate_of_one_file_is_trained_saved_opened_and_judged(doubled, tmp_path):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 8, generator=g)
    recipe = tr.autoencoder(SITE, 24, doubled.train(2), rate=1e-2)
    assert [type(t).__name__ for t in recipe.terms] == ["AuxK"]
    assert tr.recipe_of(json.loads(json.dumps(recipe.as_dict()))) == recipe
    done = tr.train(tr.Held({SITE: x}, batch=512), recipe, tr.Plan(tokens=40 * 512))
    d = open_dictionary(save(done.dictionary, tmp_path / "d.safetensors"))
    assert isinstance(d.gate, doubled.frozen)
    assert torch.equal(d.forward(x), done.dictionary.forward(x))
    assert bool(((d.encode(x).dense() != 0).sum(1) <= 2).all())
    scores = evaluate(d, Evidence({SITE: x}), nulls=1)
    assert scores["FVU"].value < 1
    with pytest.raises(Refused, match="L0 with the gate Doubled"):
        tr.autoencoder(SITE, 24, doubled.train(2), (L0(1.0),))


def test_the_command_line_knows_a_new_file(doubled, tmp_path):
    code = (
        f"from cutaway.dictionaries import gates; gates.__path__.append({str(tmp_path)!r})\n"
        "from cutaway.cli.dict.recipes import Asked, recipes\n"
        "import typing, cutaway.cli.dict.recipes as r\n"
        "assert 'doubled' in typing.get_args(r.Gate)\n"
        "(made,) = recipes(Asked(site=['resid_post.0'], gate='doubled', k=[3]), list)\n"
        "print(made.gating.name, made.gating.k)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Doubled", "3"]
