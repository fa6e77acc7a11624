"""A method, a readout, a subject and a format are one file or one row each: toys of them, used from everywhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import cutaway as ca
from cutaway.cli import app
from cutaway.core import method as table
from cutaway.core import result as results
from cutaway.core.subject import SUBJECTS
from cutaway.models.edits.rewrites import open_rewrites, rewritten
from cutaway.tasks.readouts import READOUTS, Readout, register
from tests.conformance import subjects, test_costs
from tests.conformance import test_methods as conformance
from tools.docs import pages

METHOD = '''"""How strongly is the answer preferred, counted in units that a note names?"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.repeat import Made
from cutaway.core.result import Result
from cutaway.core.subject import REQUIRED, Flag, Subject, register
from cutaway.models.model import Model
from cutaway.tasks.task import Task


@dataclass(frozen=True)
class Note:
    text: str
    made: Made | None = None

    def identity(self):
        return {"text": self.text}

    def sizes(self):
        return {"words": len(self.text.split())}


@dataclass(frozen=True, kw_only=True)
class Preference(Result, kind="toy_preference"):
    effect: Float[Tensor, "prompt"]


register(Subject("note", Note, (Flag("note", str, REQUIRED, "a word to count in"),),
                 lambda flags, opened: Note(flags["note"]), lambda opened: Note("toys")))


@method(answers="How strongly is the answer preferred?", paper="none", cost="prompts * F", control="none",
        rung="observational")
def toy(model: Model, task: Task, note: Note, /, *, factor: float = 1.0) -> Preference:
    """Measure the metric of a task.

    Args:
        factor: what the values are multiplied with.
    """
    bound = task.bind(model)
    return Preference(effect=factor * bound.metric(model.run_last(bound.clean)), units={"effect": note.text})
'''

OUTCOMES = '''"""Toys that return two results, and a rewrite of weights."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.result import Result
from cutaway.models.edits.rewrites import Rewrite
from cutaway.models.model import Model
from cutaway.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Values(Result, kind="toy_values"):
    """Values of prompts."""

    effect: Float[Tensor, "prompt"]


@method(answers="What do two kinds of run measure?", paper="none", cost="prompts * 2 * F", control="none",
        rung="observational", fills=())
def toy_pair(model: Model, task: Task, /, *, seed: int = 0) -> tuple[Values, Values]:
    """Measure clean and corrupt prompts."""
    bound = task.bind(model)
    return tuple(Values(effect=model.measure(t, bound.measure), units={"effect": bound.unit})
                 for t in (bound.clean, bound.corrupt))


@method(answers="Which change doubles an MLP?", paper="none", cost="prompts * F", control="none", rung="interventional")
def toy_rewrite(model: Model, task: Task, /, *, layer: int = 0, seed: int = 0) -> Rewrite:
    """Double an MLP's output weights.

    Args:
        layer: the MLP.
        seed: unused.
    """
    model.measure(task.bind(model).clean, lambda logits, prompt: logits[:, 0])
    return Rewrite(f"mlp_out.{layer}", delta=model.weights.mlp_out[layer].detach().clone(), record={"toy": True})
'''

FORMAT = '''"""Rows of an encoder in a text file."""

import json
from pathlib import Path

import torch

from cutaway.dictionaries.gates import Relu
from cutaway.dictionaries.transforms import autoencoder


def detect(files):
    return bool(files.matching("*.toy"))


def read(files):
    rows = torch.tensor(files.json(files.only("*.toy"))["rows"])
    n, width = rows.shape
    return autoencoder("resid_post.1", rows, rows, torch.zeros(n), torch.zeros(width), Relu())


def write(dictionary, path):
    Path(path).write_text(json.dumps({"rows": next(iter(dictionary.encoder[0].values())).tolist()}), "utf-8")
    return Path(path)
'''


def short_answers(logits, answers, foils, reference):
    """Logit of the answer, with no regard to the foil."""
    return logits.gather(-1, answers.reshape(len(logits), -1)[:, :1])[:, 0]


@pytest.fixture
def added(tmp_path, monkeypatch):
    """A method, a readout, a subject and a format."""
    with adding(tmp_path, monkeypatch, ("lenses", "toy", METHOD), ("dictionaries.formats", "toyfile", FORMAT)):
        register(Readout("toy_logit", short_answers, "logits", True, "logit of the answer"))
        yield


@pytest.fixture
def outcomes(tmp_path, monkeypatch):
    """Methods that return several results, and a rewrite."""
    with adding(tmp_path, monkeypatch, ("patching", "toys", OUTCOMES)):
        yield


@contextmanager
def adding(folder: Path, monkeypatch: Any, *toys: tuple[str, str, str]) -> Iterator[None]:
    """One file per toy in a folder that the rooms also look in; everything is taken away afterwards."""
    ca.methods()  # whatever registers itself when first imported has done so
    import_module("cutaway.dictionaries.evaluation")
    tables = (table.METHODS, READOUTS, SUBJECTS, results.KINDS)
    before = [dict(t) for t in tables]
    for room, name, text in toys:
        package = import_module(f"cutaway.{room}")
        (folder / room).mkdir()
        (folder / room / f"{name}.py").write_text(text, "utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder / room)])
    yield
    for t, was in zip(tables, before, strict=True):
        t.clear()
        t.update(was)
    for room, name, _ in toys:
        sys.modules.pop(f"cutaway.{room}.{name}", None)
        vars(import_module(f"cutaway.{room}")).pop(name, None)


def test_a_method_a_readout_and_a_subject_are_used_from_python_the_command_line_and_docs(added, capsys):
    row = ca.methods()["lenses.toy"]
    note = sys.modules["cutaway.lenses.toy"].Note("apples")
    model = subjects.miniworld()
    task = ca.tasks.load("facts", model, 2, metric="toy_logit")
    result = row.function(model, task, note, factor=2.0)
    bound = task.bind(model)
    logits = model.run_last(bound.clean)
    assert torch.equal(result.effect, 2 * logits.gather(-1, bound.answers[:, None])[:, 0])
    assert result.record["rung"] == "observational"
    assert result.record["subjects"]["note"] == {"text": "apples"}
    assert result.record["subjects"]["task"]["metric"] == "toy_logit"
    assert "note was made by hand" in result.record["command"]

    words = "lenses toy --task facts --task-n 2 --task-metric toy_logit --note apples --factor 2 --json"
    assert app.main(words.split()) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fields"]["effect"]["values"] == pytest.approx(result.effect.tolist())
    assert said["units"] == {"effect": "apples"}

    made = pages()
    assert (
        "- On the command line: `cutaway lenses toy --model … --task … --note …`" in made["docs/methods/lenses.toy.md"]
    )
    assert "| `factor` | float | `1.0` |" in made["docs/methods/lenses.toy.md"]
    assert "How strongly is the answer preferred?" in made["docs/methods.md"]


def test_a_method_returns_several_results_or_a_rewrite(outcomes, capsys, tmp_path, monkeypatch):
    rows = ca.methods()
    model, task = subjects.miniworld(), ca.tasks.load("facts", subjects.miniworld(), 2)
    pair = rows["patching.toy_pair"].function(model, task)
    bound = task.bind(model)
    runs = [model.measure(t, bound.measure) for t in (bound.clean, bound.corrupt)]
    assert all(torch.equal(r.effect, values) for r, values in zip(pair, runs, strict=True))
    assert [r.record["part"] for r in pair] == ["1 of 2", "2 of 2"]
    assert [r.record["method"] for r in pair] == ["patching.toy_pair"] * 2
    rewrite = rows["patching.toy_rewrite"].function(model, task)
    assert rewrite.record["toy"]
    assert rewrite.record["cost"]["forwards"] == 2
    with rewritten(model, rewrite):
        assert model.identity()["rewrites"][0]["record"]["method"] == "patching.toy_rewrite"

    words = "--task facts --task-n 2 --json --out"
    assert app.main(f"patching toy_pair {words} {tmp_path / 'a.safetensors'}".split()) == 0
    said = json.loads(capsys.readouterr().out)
    assert [s["fields"]["effect"]["values"] for s in said] == [pytest.approx(r.effect.tolist()) for r in pair]
    assert [torch.equal(ca.open(tmp_path / f"a.{i}.safetensors").effect, r.effect) for i, r in enumerate(pair, 1)]
    assert app.main(f"patching toy_rewrite {words} {tmp_path / 'b.safetensors'}".split()) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "Rewrite"
    assert open_rewrites(tmp_path / "b.safetensors")[0].identity() == rewrite.identity()
    assert app.main(f"patching toy_rewrite {words} {tmp_path / 'b.png'}".split()) == 2
    assert "no picture" in capsys.readouterr().err
    for name in ("toy_pair", "toy_rewrite"):
        assert app.main(f"patching {name} --task facts --task-n 2".split()) == 0
        assert f"again: cutaway patching {name} --model" in capsys.readouterr().out

    made = pages()
    assert "## Result: `Values`" in made["docs/methods/patching.toy_pair.md"]
    assert "## Returns: `Rewrite`" in made["docs/methods/patching.toy_rewrite.md"]

    for name in ("patching.toy_pair", "patching.toy_rewrite"):
        monkeypatch.setitem(conformance.ROWS, name, rows[name])
        conformance.test_the_model_and_all_chance_stay_untouched(name, {})
        conformance.test_the_record_is_complete(name, "llama")
        conformance.test_outcomes_survive_files_and_every_picture(name, "llama", tmp_path)
        test_costs.test_declared_cost_is_an_upper_bound(name, {})
        conformance.test_an_encoder_is_refused(name)
        conformance.test_wrong_options_are_refused(name)


def test_a_method_that_returns_something_else_is_an_error():
    def bad(model: Any, /) -> tuple[int, ...]: ...

    with pytest.raises(TypeError, match="record and a method save"):
        table.method(answers="?", paper="none", cost="F", control="none", rung="observational")(bad)


def test_a_format_is_read_written_and_told_apart(added, tmp_path, capsys):
    held = subjects.dictionary(8)
    where = ca.dictionaries.formats.write(held, tmp_path / "a.toy", "toyfile")
    back = ca.dictionaries.load(where)
    assert torch.equal(back.encoder[0]["resid_post.1"], held.encoder[0]["resid_post.1"])
    assert (
        app.main(["dict", "convert", str(where), str(tmp_path / "b.safetensors"), "--format", "house", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["read back"]["largest difference"] == 0


def test_nothing_of_the_toys_is_left():
    assert not {"lenses.toy", "patching.toy_pair", "patching.toy_rewrite"} & set(ca.methods())
    assert "toy_logit" not in READOUTS
    assert "note" not in SUBJECTS


def test_a_function_of_the_users_own_is_a_metric_and_named_so():
    model = subjects.miniworld()
    task = ca.tasks.load("facts", model, 2, metric=lambda logits, answers, foils: logits.logsumexp(-1))
    result = ca.patching.attribution(model, task, samples=1)
    assert result.record["subjects"]["task"]["metric"] == "user function <lambda>"
    assert result.record["command"].startswith("no command")
    assert float(result.effect.abs().max()) > 0
    with pytest.raises(ca.Refused, match="one number per prompt"):
        ca.patching.attribution(model, ca.tasks.load("facts", model, 2, metric=lambda x, a, f: x), samples=1)
