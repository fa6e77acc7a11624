"""A method, a readout, a subject and a format are one file or one row each: toys of them, used from everywhere."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import pytest
import torch

import cutaway as ca
from cutaway.cli import app
from cutaway.core import method as table
from cutaway.core import result as results
from cutaway.core.subject import SUBJECTS
from cutaway.dictionaries import formats
from cutaway.tasks.readouts import READOUTS, Readout, register
from tests.conformance import subjects
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

FORMAT = '''"""Rows of an encoder in a text file."""

import json
from pathlib import Path

import torch

from cutaway.dictionaries.gates import Relu
from cutaway.dictionaries.transforms import autoencoder


def detect(source):
    return bool(source.files("*.toy"))


def read(source):
    rows = torch.tensor(source.json(source.only("*.toy"))["rows"])
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
    """One file per toy in a folder that the rooms also look in; everything is taken away afterwards."""
    ca.methods()  # whatever registers itself when first imported has done so
    import_module("cutaway.dictionaries.evaluation")
    tables = (table.METHODS, READOUTS, SUBJECTS, results.KINDS)
    before = [dict(t) for t in tables]
    for room, name, text in [("lenses", "toy", METHOD), ("dictionaries.formats", "toyfile", FORMAT)]:
        package = import_module(f"cutaway.{room}")
        (tmp_path / room).mkdir()
        (tmp_path / room / f"{name}.py").write_text(text, "utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / room)])
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, "toyfile"))
    register(Readout("toy_logit", short_answers, "logits", True, "logit of the answer"))
    yield tmp_path
    for t, was in zip(tables, before, strict=True):
        t.clear()
        t.update(was)
    for room, name in (("lenses", "toy"), ("dictionaries.formats", "toyfile")):
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
    assert "lenses.toy" not in ca.methods()
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
