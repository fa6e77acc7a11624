"""Ledgers go on where they stopped although the classes in their keys have moved or were renamed since.

`old_ledgers/edits.safetensors` holds the sweep below as version b86827c wrote it, before its classes moved.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cutaway
from cutaway.core.content import content
from cutaway.core.files import read_tensors
from cutaway.core.key_names import KEY_FIELDS, KEY_NAMES, LATER_FIELDS, UNKEYED_FIELDS
from cutaway.core.record import counting
from cutaway.core.refuse import Refused
from cutaway.interventions.ablation_values import RandomStep
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Ablate, Add, Freeze, Knockout, Project, Replace, Scale
from cutaway.models.model import Model
from cutaway.models.sweep import cache
from cutaway.models.sweep.executor import sweep
from tests.conformance import subjects

OLD = Path(__file__).parent / "old_ledgers" / "edits.safetensors"
#: what the key says of the machine that wrote the file
VERSIONS = {"python": "3.11.7", "cutaway": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0",
            "tokenizers": "0.23.3", "numpy": "2.4.6", "scipy": "1.17.1"}  # fmt: skip
MODEL = {"family": "llama", "config": "6aa5b800480c44f0", "weights": "e6af56d321f8b91d", "dtype": "float32"}
#: the names of edits in keys: a class that moves keeps its name by a row of KEY_NAMES, a new one is added here
EDITS = {
    *(f"cutaway.models.edits.{n}" for n in ("Ablate", "Add", "Freeze", "Knockout", "Project", "Replace", "Scale")),
    *(f"cutaway.dictionaries.splice.{n}" for n in ("Splice", "SpliceRead", "SpliceWrite")),
    "cutaway.patching.baseline.RandomStep",
    "cutaway.models.edits.apply.Apply",
    "cutaway.dictionaries.evaluation.loss.Only",
    "cutaway.models.sweep.merge_edits.Deferred",
    "cutaway.lenses.directions.RankOne",
    "cutaway.neurons.frequency.AlongMix",
    "cutaway.graphs.complement.AblateComplement",
    "cutaway.models.edits.library.Cap",
    "cutaway.models.edits.edit.Wrapped",
    "cutaway.models.edits.conditional.Conditional",
    "cutaway.interventions.tangent.Tangent",
    "cutaway.compat.circuit_tracer.interventions.SetFeatures",
    "cutaway.circuits.edge_effects.Rewired",
}


def ramp(*shape: int) -> Tensor:
    return torch.arange(float(torch.tensor(shape).prod())).reshape(shape).remainder(7) / 7


def variants(model: Model, prompts: int, positions: int) -> list[list[Edit]]:
    """One variant of each edit."""
    s = model.shape
    z = ramp(prompts, positions, s.n_heads, s.d_head)
    return [
        [Replace("z.0.1", ramp(s.d_head))], [Ablate("attn_out.1")], [Add("resid_post.0@-1", ramp(s.d_model), 0.5)],
        [Scale("z.1.0", 0.5)], [Freeze("z.1", {"z.1": z})], [Knockout("scores.1.0", (-1,), (0,))],
        [Project("resid_pre.1", torch.eye(s.d_model)[:2])], [RandomStep("z.0.0", z[:, :, 0], z[:, :, 1], 5)],
    ]  # fmt: skip


def test_a_ledger_from_before_the_moves_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "versions", lambda: VERSIONS)
    monkeypatch.setattr(Model, "identity", lambda self: MODEL)
    monkeypatch.setattr(Model, "fingerprint", lambda self, fresh=False: MODEL["weights"])
    model, path = subjects.random_llama(), Path(shutil.copy(OLD, tmp_path / "l.safetensors"))
    bound = subjects.llama_task().bind(model)
    asked: list[list[Edit]] = variants(model, *bound.clean.ids.shape)
    with counting() as spent:
        values = sweep(model, bound.clean, asked, bound.measure, resume=path)
    assert spent.forwards == 0
    assert torch.equal(values, read_tensors(OLD)[0]["values"])
    assert torch.allclose(values, sweep(model, bound.clean, asked, bound.measure), atol=1e-4)
    asked[3] = [Scale("z.1.0", 0.25)]
    with pytest.raises(Refused, match="another sweep"):
        sweep(model, bound.clean, asked, bound.measure, resume=path)


def modules() -> dict[str, Any]:
    """Every module of the package by its name."""
    names = [m.name for m in pkgutil.walk_packages(cutaway.__path__, "cutaway.") if not m.name.endswith("__main__")]
    return {name: importlib.import_module(name) for name in names}


def test_names_in_keys_are_of_things_that_exist_and_no_two_are_one():
    every = modules()
    own = {f"{x.__module__}.{x.__qualname__}": x for m in every.values() for x in vars(m).values()
           if hasattr(x, "__qualname__") and str(x.__module__).startswith("cutaway.")}  # fmt: skip
    for path in KEY_NAMES:
        module = max((name for name in every if path.startswith(f"{name}.")), key=len)
        text = inspect.getsource(every[module])
        parts = path.removeprefix(f"{module}.").split(".")
        assert all(re.search(rf"\b(class|def) {n}\b", text) for n in parts if n != "<locals>"), path
    assert not set(KEY_NAMES.values()) & (set(own) - set(KEY_NAMES))
    assert len(set(KEY_NAMES.values())) == len(KEY_NAMES)
    named = {KEY_NAMES.get(path, path): x for path, x in own.items()}
    for name, fields in [*KEY_FIELDS.items(), *LATER_FIELDS.items(), *UNKEYED_FIELDS.items()]:
        assert set(fields) <= set(named[name].__dataclass_fields__)
    edits = {n for n, x in named.items() if isinstance(x, type) and issubclass(x, Edit) and "._" not in n}
    assert edits - {"cutaway.models.edits.edit.Edit"} == EDITS


@dataclass(frozen=True)
class Place:
    site: str
    model: str = ""


def test_a_later_field_counts_where_it_is_not_its_default(monkeypatch):
    name = f"{Place.__module__}.{Place.__qualname__}"
    before = content(Place("z", "base"))
    monkeypatch.setitem(LATER_FIELDS, name, ("model",))
    assert content(Place("z", "base")) == before
    assert len({content(Place("z")), content(Place("z", "base")), content(Place("z", "tuned"))}) == 3
