"""Commands that are no method repeat themselves too: whole paths, every flag that is not as usual, and nothing else."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cutaway.cli import explain, harvest
from cutaway.cli.dict import app as dictionaries
from cutaway.cli.dict import evaluate as dictionary_eval
from cutaway.cli.dict.recipes import Asked
from cutaway.cli.dict.source import From
from cutaway.cli.repeat import repeated


def usual(function: Any, **given: Any) -> dict[str, Any]:
    """What a command is given when only these flags are."""
    import inspect

    return {n: p.default for n, p in inspect.signature(function).parameters.items()} | given


@pytest.mark.parametrize(
    ("name", "function", "given", "words"),
    [
        ("explain", explain.explain, {"prompt": "a b", "effort": "quick", "html": Path("r.html")},
         ["a b", "--effort", "quick"]),
        ("explain", explain.explain, {"prompt": "-5 plus", "model": "a model", "seed": 3, "foil": "-x"},
         ["--foil=-x", "--model", "HERE/a model", "--seed", "3", "--", "-5 plus"]),
        ("dict eval", dictionary_eval.evaluate, {"file": "d 1.x?site=z", "choice": ["k=3", "a=t.safetensors"],
         "seeds": ["d 1.x", "miniworld/x"], "out": Path("o.safetensors"), "sequences": 0},
         ["HERE/d 1.x?site=z", "--choice", "k=3", "--choice", "a=HERE/t.safetensors", "--sequences", "0",
          "--seeds", "HERE/d 1.x", "--seeds", "miniworld/x"]),
        ("harvest", harvest.harvest, {"sites": ["z.1", "z.2"], "out": Path("o"), "across": False, "sinks": 0.0},
         ["--sites", "z.1", "--sites", "z.2", "--out", "HERE/o", "--no-across", "--sinks", "0.0"]),
        ("dict train", dictionaries.train, {"out": Path("o"), "what": replace(Asked(), site=["z.1"], k=[3, 4],
         skip=True),
         "of": replace(From(), model=["base=miniworld", "tuned=a model"]), "resume": False},
         ["--out", "HERE/o", "--site", "z.1", "--skip", "--k", "3", "--k", "4", "--model", "base=miniworld", "--model",
          "tuned=HERE/a model"]),
    ],
)  # fmt: skip
def test_the_words_of_a_command(tmp_path, monkeypatch, name, function, given, words):
    for file in ("a model", "d 1.x", "t.safetensors", "miniworld"):  # a zoo name is one, whatever lies here
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    leave = ["resume"] if name == "dict train" else []
    command = repeated(name, function, usual(function, **given), *leave)
    assert shlex.split(command) == ["cutaway", *name.split(), *(w.replace("HERE", str(tmp_path)) for w in words)]
