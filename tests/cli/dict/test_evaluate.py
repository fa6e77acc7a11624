"""`cutaway dict eval`: a dictionary of any file judged on a model or on a truth, as a table and as JSON."""

import json
import re
import shlex
from itertools import islice

import pytest
import torch
from torch.nn.functional import normalize

from cutaway.cli import app
from cutaway.core.refuse import Refused
from cutaway.core.result import open_result
from cutaway.core.stats import generator
from cutaway.core.subject import examples
from cutaway.dictionaries import autoencoder, letter_absorption, load, probing, save
from cutaway.dictionaries.benchmarks import RECIPES, SyntheticRecipe
from cutaway.dictionaries.evaluation.reading import HELD_OUT, read_evidence
from cutaway.dictionaries.gates import TopK
from cutaway.suites.dictionary_report import DictionaryReport
from cutaway.zoo.miniworld.documents import WorldDocuments
from tests.conformance.subjects import miniworld


def run(capsys, line: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command line."""
    code = app.main(shlex.split(line))
    out, err = capsys.readouterr()
    return code, out, err


def saved(path, width: int, latents: int = 40, seed: int = 0, **about):
    """A dictionary with random directions."""
    rows = normalize(torch.randn(latents, width, generator=generator(seed)), dim=-1)
    d = autoencoder("resid_post.1", rows, rows, torch.zeros(latents), torch.zeros(width), TopK(5), about=about)
    return save(d, path)


@pytest.fixture
def width():
    return miniworld().shape.d_model


def test_a_dictionary_is_judged_on_its_model(capsys, tmp_path, width):
    one, two = saved(tmp_path / "one.safetensors", width), saved(tmp_path / "two.safetensors", width, 60, 1)
    line = f"dict eval {one} --tokens 900 --sequences 3 --context 40 --nulls 1"
    more = f"--features 2 --by frequency --seeds {two} {two} --declared-l0 5"
    code, out, err = run(capsys, f"{line} {more} --other {two} --out {tmp_path / 'scores.safetensors'} --json")
    assert code == 0, err
    data = json.loads(out)
    names = data["scores"]["labels"]["score"]
    assert {"L0", "FVU", "dead", "nearest cosine", "ΔCE", "CE recovered (mean)"} <= set(names)
    assert data["scores"]["fields"]["score"]["values"][names.index("L0")] <= 5
    assert data["scores"]["labels"]["control"] == ["pca", "pca first", "neurons"]
    assert len(data["features"]) == 2
    shown = [c for f in data["features"] for c in f["contexts"]]
    documents = [d.lower() for d in islice(WorldDocuments(miniworld().world, HELD_OUT).read(0), 300)]
    for c in shown:  # running text: nothing is missing between its ends
        pieces = (c["before"] + c["token"] + c["after"]).strip("…").split("<bos>")
        assert all(any(p.strip() in d for d in documents) for p in pieces)
    assert data["features"][0]["frequency"] >= data["features"][1]["frequency"]
    assert sum(data["density"]["latents"]) == 40
    assert data["seeds"]["fields"]["alike"]["values"][1][2] > 0.999
    assert data["scores"]["record"]["declared L0"] == {"declared": 5.0, "measured": 5.0, "agrees": True}
    assert " sequences" in str(data["scores"]["record"]["interval"])
    assert data["comparison"]["kind"] == "dictionary_comparison"
    assert len(data["splitting"]["fields"]["parts"]["values"]) == 40
    assert data["scores"]["record"]["trained on them"] is False
    assert open_result(tmp_path / "scores.safetensors").kind == "dictionary_scores"
    code, out, err = run(capsys, f"{line} --features 1".replace("--sequences 3", "--sequences 0"))
    assert code == 0, err
    assert "FVU" in out
    assert "latent " in out
    assert re.search("<<.+>>", out)  # the firing token, where colours are lost
    assert "ΔCE" not in out


def test_a_dictionary_is_judged_on_a_truth(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(
        RECIPES, "tiny", SyntheticRecipe(40, 16, roots=2, branching=2, depth=2, least=0.03, apart=(5, 1e-3))
    )
    d = saved(tmp_path / "d.safetensors", 16)
    code, out, _ = run(capsys, f"dict eval {d} --truth tiny --tokens 900 --nulls 1 --json")
    assert code == 0
    found = json.loads(out)["scores"]
    assert {"F1", "MCC", "uniqueness", "full absorption"} <= set(found["labels"]["score"])
    code, out, _ = run(capsys, f"{found['record']['command'].removeprefix('cutaway ')} --json")
    assert json.loads(out)["scores"]["fields"] == found["fields"]


def test_refusals_of_judging(capsys, tmp_path, width):
    d = saved(tmp_path / "d.safetensors", width)
    for line, why in [
        (f"dict eval {tmp_path / 'none.safetensors'}", "nothing"),
        (f"dict eval {d} --truth 7k", "1k, 4k, 16k"),
        ("dict eval miniworld/resid_post.3 --truth 1k", "trained on a model's activations"),
        (f"dict eval {d} --other miniworld/resid_post.3", "the dictionary judged of resid_post.1"),
        (f"dict eval {d} --words world --tokens 900 --sequences 0 --nulls 1", "can spell"),
        (f"dict eval {d} --labels {d} --tokens 900 --sequences 0", "cannot be read"),
    ]:
        code, _, err = run(capsys, line)
        assert code == 2
        assert why in err


def test_a_dictionary_of_shuffled_weights_is_a_control(capsys, tmp_path, width):
    from cutaway.dictionaries import training as tr

    recipe = tr.autoencoder("resid_post.1", 24, tr.TrainTopK(3), rate=1e-3).as_dict()
    told = saved(tmp_path / "told.safetensors", width, recipe=recipe, rate=1e-3)
    untold = saved(tmp_path / "untold.safetensors", width)
    for d, k, said in [(told, 3, "the same recipe"), (untold, 5, "no recipe in the file")]:
        more = "--nulls 1 --random-weights 2000 --context 32"
        code, out, err = run(capsys, f"dict eval {d} --tokens 600 --sequences 0 {more} --json")
        assert code == 0, err
        scores = json.loads(out)["scores"]
        assert scores["labels"]["control"][-1] == "random weights"
        assert scores["fields"]["control"]["values"][0][-1] <= k
        assert said in scores["record"]["random weights"]
        assert "behind those judged on" in scores["record"]["random weights"]
        assert scores["record"]["fed"] == "contexts and documents begin with '<bos>' (its training is not known)"


@pytest.mark.parametrize(("policy", "first"), [("none", "no beginning-of-text token"), ("both", "contexts and doc")])
def test_a_dictionary_is_fed_as_it_was_trained(policy, first, width, tmp_path):
    d = load(saved(tmp_path / "d.safetensors", width, stream={"packing": {"bos": policy}}))
    report = DictionaryReport(d, miniworld(), None, 600, 32, 1)
    assert report.fed.startswith(first)
    assert report.fed.endswith("(as in its training)")
    begins = report.evidence.text.contexts[1][0] == miniworld().tokenizer.bos_token_id
    assert begins == (policy == "both")


def test_what_is_judged_on_is_not_trained_on_and_a_short_text_is_refused(capsys, tmp_path, width):
    text = tmp_path / "t.txt"
    text.write_text("gatoko lives in phuket and plays the flute . " * 40)
    d = saved(tmp_path / "d.safetensors", width)
    line = f"dict eval {d} --text {text} --context 16 --sequences 2 --nulls 1"
    code, out, err = run(capsys, f"{line} --tokens 300 --json")
    assert code == 0, err
    assert " contexts" in str(json.loads(out)["scores"]["record"]["interval"])
    code, _, err = run(capsys, f"{line} --random-weights 1000")
    assert code == 2
    assert "nothing is left to train on" in err


def test_methods_give_the_numbers_of_the_report(tmp_path, width):
    model, d = miniworld(), load(saved(tmp_path / "d.safetensors", width))
    report = DictionaryReport(d, model, None, 600, 32)
    evidence = read_evidence(model, d, tokens=600, context=32)
    labelled, words = (examples([n], {"model": model})[n] for n in ("labelled", "words"))
    here, there = probing(model, d, evidence, labelled), report.probing(labelled)
    for name, values in there.tensors().items():
        assert torch.equal(getattr(here, name), values), name
    assert here.labels["concept"] == ["park", "Mary"]
    here, there = letter_absorption(model, d, evidence, words), report.first_letters(words)
    assert torch.equal(here.score, there.score)
    assert torch.equal(here.null, there.null)
    with pytest.raises(Refused, match="reads nothing"):
        probing(model, d, evidence, labelled, ks=[2, 0])


def test_concepts_are_probed_on_labelled_texts(capsys, tmp_path, width):
    d, file = saved(tmp_path / "d.safetensors", width), tmp_path / "l.jsonl"
    rows = [{"text": f"{n} lives in {c}", "label": c} for n in ("gatoko", "jarisa", "lomi", "newa") for c in
            ("phuket", "busan") for _ in range(8)]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    code, out, err = run(capsys, f"dict eval {d} --tokens 600 --sequences 0 --nulls 1 --labels {file} --json")
    assert code == 0, err
    found = json.loads(out)["probing"]
    assert len(found["labels"]["concept"]) == 1
    assert found["fields"]["accuracy"]["values"][found["labels"]["method"].index("linear probe")][0] == 1.0
