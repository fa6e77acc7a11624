"""`cutaway features`: a store in one command, merged with another, and refusals as exit codes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from itertools import islice
from pathlib import Path

import pytest
import torch

from cutaway.cli import main
from cutaway.features import FeatureStore
from cutaway.features.formats.neuronpedia import read_neuronpedia
from cutaway.zoo.miniworld.documents import WorldDocuments
from tests.cli.test_processes import SHARED
from tests.conformance import subjects

DICTIONARY = ["--dictionary", "miniworld/resid_post.3"]


def run(capsys, *words):
    """Exit code, stdout and stderr of one command line."""
    code = main(list(map(str, words)))
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two files of different documents."""
    folder, world = tmp_path_factory.mktemp("texts"), subjects.miniworld().world
    for seed, name in enumerate("ab"):
        documents = islice(WorldDocuments(world, seed=seed).read(0), 40)
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in documents), "utf-8")
    return folder


def test_stores_are_made_found_again_and_merged(capsys, tmp_path, texts):
    def line(name, *more):
        out, text = ["--out", tmp_path / name], ["--text", texts / f"{name}.jsonl"]
        return ["features", "harvest", *DICTIONARY, *text, *out, "--context", "32", "--no-across", *more]

    code, said, err = run(capsys, *line("a"), "--json")
    assert (code, err) == (0, "")
    data = json.loads(said)
    store = FeatureStore(tmp_path / "a")
    command = data.pop("command")
    assert data.pop("folder") == str(tmp_path / "a")
    assert data == store.manifest
    assert store.names == ["resid_post.3"]
    code, said, _ = run(capsys, *shlex.split(command)[1:])
    assert code == 0
    assert f"again: {command}" in said
    assert f"{store.counted:,} tokens of miniworld" in said
    assert run(capsys, *line("b", "--like", tmp_path / "a"))[0] == 0
    code, said, _ = run(capsys, "features", "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c", "--json")
    assert code == 0
    both = [FeatureStore(tmp_path / n).counted for n in "abc"]
    assert json.loads(said)["counts"]["counted"] == both[2] == both[0] + both[1]
    code, said, _ = run(capsys, "features", "corpora", tmp_path / "a", tmp_path / "b", "--samples", "19")
    assert code == 0
    assert "latents differ" in said
    assert "documents permuted" in said


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "no end"),
        (["--text", "nowhere.txt"], "no such file"),
        (["--tokens", "9", "--dictionary", "miniworld/resid_post.3"], "two have one name"),
        (["--tokens", "9", "--acts", "x"], "contexts go through the model"),
        (["--tokens", "9", "--codes", "3"], "a share of the documents"),
        (["--tokens", "9", "--like", "nowhere"], "no harvest has finished"),
    ],
)
def test_what_cannot_be_harvested_is_refused(capsys, tmp_path, words, why):
    code, out, err = run(capsys, "features", "harvest", *DICTIONARY, "--out", tmp_path / "o", *words)
    assert (code, out) == (2, "")
    assert why in " ".join(err.split())


@pytest.fixture(scope="module")
def store(tmp_path_factory, texts):
    """A store of two dictionaries, one of them with a name of its own."""
    out = tmp_path_factory.mktemp("stores") / "both"
    line = ["features", "harvest", *DICTIONARY, "--dictionary", "mlp=miniworld/transcoders", "--text",
            texts / "a.jsonl", "--out", out, "--context", "32"]  # fmt: skip
    assert main(list(map(str, line))) == 0
    return out


def test_rules_cards_and_searches(capsys, tmp_path, store):
    code, said, _ = run(capsys, "features", "explain", store, "--name", "resid_post.3", "--show", "2")
    assert code == 0
    assert "latents have a short rule" in said
    assert "random features: F1 at most" in said
    latent = int(said.splitlines()[1].split("]")[1].split(":")[0])
    page = tmp_path / "card.html"
    line = ["features", "card", store, latent, "--name", "resid_post.3", "--contexts", "2"]
    code, said, _ = run(capsys, *line, "--out", page)
    assert code == 0
    assert f"What does latent {latent} of resid_post.3 do?" in said
    assert "(rule)" in said, "its label"
    assert "raises" in page.read_text("utf-8")
    code, said, _ = run(capsys, *line, "--alone", "--json")
    data = json.loads(said)
    assert code == 0
    assert "raises" not in data["fields"]
    assert run(capsys, *shlex.split(data["record"]["command"])[1:], "--json")[1].startswith('{"kind": "feature_card"')
    for words in (["--by", "token", " the"], ["--by", "phrase", "the city"], ["--by", "text", "the city of oslo ."],
                  ["--by", "raises", "oslo"], ["--like", "3"]):  # fmt: skip
        code, said, err = run(capsys, "features", "search", store, *words, "--name", "resid_post.3", "--most", "3")
        assert (code, len(said.splitlines())) == (0, 3), err
    out = tmp_path / "np"
    code, said, _ = run(capsys, "features", "export", store, out, "--name", "resid_post.3", "--set", "res-1k", "--json")
    assert code == 0
    assert json.loads(said)["folder"] == str(out / "miniworld" / "3-res-1k")
    assert len(read_neuronpedia(out / "miniworld" / "3-res-1k").rows["features"]) == 1536
    code, said, _ = run(capsys, "features", "compare", store, "--names", "resid_post.3,mlp", "--tokens", "500")
    assert code == 0
    assert "Which latents of mlp fire where those of resid_post.3 do?" in said
    code, said, _ = run(capsys, "features", "search", store, "token", "--json")
    assert code == 0
    assert all("token" in hit["labels"][0] for hit in json.loads(said))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["card", "STORE", "3"], "the store has several"),
        (["card", "STORE", "9999", "--name", "mlp"], "no such latent"),
        (["search", "STORE"], "words or --like"),
        (["search", "STORE", "a b", "--by", "token", "--name", "mlp"], "tokens here"),
        (["card", "STORE", "3", "--name", "mlp", "--source", "miniworld/resid_post.3"], "this one"),
        (["card", "STORE", "3", "--name", "mlp", "--out", "a.gif"], "says nothing"),
    ],
)
def test_what_a_store_cannot_answer_is_refused(capsys, store, words, why):
    code, out, err = run(capsys, "features", *(store if w == "STORE" else w for w in words))
    assert (code, out) == (2, "")
    assert why in " ".join(err.split())


@pytest.mark.wide
def test_two_processes_make_the_store_of_one(tmp_path):
    line = ["features", "harvest", *DICTIONARY, "--tokens", "3000", "--context", "32", "--out"]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*SHARED, *line, str(tmp_path / "two")], capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    assert main([*line, str(tmp_path / "one")]) == 0
    one, two = (FeatureStore(tmp_path / n) for n in ("one", "two"))
    assert one.manifest["counts"] == two.manifest["counts"]
    for name, t in one.latents().tensors.items():
        other = two.latents().tensors[name]
        assert torch.allclose(t, other, rtol=1e-6) if t.is_floating_point() else torch.equal(t, other), name
    assert [p.name for p in (tmp_path / "two").iterdir() if p.is_dir()] == []
