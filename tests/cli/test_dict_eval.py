"""`cutaway dict eval`: a dictionary of any file judged on a model or on a truth, as a table and as JSON."""

import json
import shlex

import pytest
import torch
from torch.nn.functional import normalize

from cutaway.cli import app
from cutaway.core.result import open_result
from cutaway.core.stats import generator
from cutaway.dictionaries import autoencoder, save
from cutaway.dictionaries.gates import TopK
from cutaway.dictionaries.truth import RECIPES, Recipe


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
    from tests.conformance.subjects import miniworld

    return miniworld().shape.d_model


def test_a_dictionary_is_judged_on_its_model(capsys, tmp_path, width):
    one, two = saved(tmp_path / "one.safetensors", width), saved(tmp_path / "two.safetensors", width, 60, 1)
    line = f"dict eval {one} --tokens 900 --sequences 3 --context 40 --nulls 1"
    code, out, err = run(capsys, f"{line} --features 2 --other {two} --out {tmp_path / 'scores.safetensors'} --json")
    assert code == 0, err
    data = json.loads(out)
    names = data["scores"]["labels"]["score"]
    assert {"L0", "FVU", "dead", "nearest cosine", "ΔCE", "CE recovered (mean)"} <= set(names)
    assert data["scores"]["fields"]["score"]["values"][names.index("L0")] <= 5
    assert data["scores"]["labels"]["control"] == ["pca", "pca first", "neurons"]
    assert len(data["features"]) == 2
    assert data["features"][0]["contexts"][0]["token"]
    assert data["comparison"]["kind"] == "dictionary_comparison"
    assert len(data["splitting"]["fields"]["parts"]["values"]) == 40
    assert data["scores"]["record"]["trained on them"] is False
    assert open_result(tmp_path / "scores.safetensors").kind == "dictionary_scores"
    code, out, err = run(capsys, f"{line} --features 1".replace("--sequences 3", "--sequences 0"))
    assert code == 0, err
    assert "FVU" in out
    assert "latent " in out
    assert "ΔCE" not in out


def test_a_dictionary_is_judged_on_a_truth(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", Recipe(40, 16, roots=2, branching=2, depth=2, least=0.03, apart=(5, 1e-3)))
    d = saved(tmp_path / "d.safetensors", 16)
    code, out, _ = run(capsys, f"dict eval {d} --truth tiny --tokens 900 --nulls 1 --json")
    assert code == 0
    assert {"F1", "MCC", "uniqueness", "full absorption"} <= set(json.loads(out)["scores"]["labels"]["score"])


def test_refusals_of_judging(capsys, tmp_path, width):
    d = saved(tmp_path / "d.safetensors", width)
    for line, why in [
        (f"dict eval {tmp_path / 'none.safetensors'}", "nothing"),
        (f"dict eval {d} --truth 7k", "1k, 4k, 16k"),
        (f"dict eval {d} --tokens 500 --random-weights 1000 --sequences 0", "how it was trained"),
    ]:
        code, _, err = run(capsys, line)
        assert code == 2
        assert why in err


def test_a_dictionary_of_shuffled_weights_is_a_control(capsys, tmp_path, width):
    from cutaway.dictionaries import train as tr

    recipe = tr.autoencoder("resid_post.1", 24, tr.TopK(3), rate=1e-3).as_dict()
    d = saved(tmp_path / "d.safetensors", width, recipe=recipe, rate=1e-3)
    more = "--nulls 1 --random-weights 2000 --context 32"
    code, out, _ = run(capsys, f"dict eval {d} --tokens 600 --sequences 0 {more} --json")
    assert code == 0
    scores = json.loads(out)["scores"]
    assert scores["labels"]["control"][-1] == "random weights"
    assert scores["fields"]["control"]["values"][0][-1] <= 3
