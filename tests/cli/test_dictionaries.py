"""`cutaway dict train` on the bundled model and its own text."""

import json

import pytest

from cutaway.cli import main
from cutaway.dictionaries import open as open_dictionary

FLAGS = ["--batch", "256", "--context", "48", "--threads", "1", "--latents", "96", "--k", "4", "--rate", "0.01"]


def run(capsys, *words):
    code = main(["dict", "train", *words])
    return code, *capsys.readouterr()


def test_a_dictionary_is_trained_saved_and_judged(capsys, tmp_path):
    words = ["--site", "resid_post.2", "--out", str(tmp_path), "--tokens", "3000", *FLAGS]
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, err
    data = json.loads(out)
    d = open_dictionary(data["dictionaries"][0])
    assert d.reads == d.writes == ("resid_post.2",)
    assert d.n_latents == 96
    scores = data["cards"][0]["scores"]
    assert scores["FVU"]["interval"][0] < scores["FVU"]["value"] < 1
    assert "tokens/s" in err
    assert json.loads((tmp_path / "card.json").read_text())[0]["tokens"] >= 3000
    code, shown, _ = run(capsys, *words)  # the run is over: only the card is made again
    assert code == 0
    assert "FVU" in shown
    assert open_dictionary(data["dictionaries"][0]).fingerprint() == d.fingerprint()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--site", "nowhere.3"], "nowhere"),
        (["--site", "resid_post.99"], "outside"),
        (["--site", "resid_post.2", "--penalty", "3"], "--k"),
        (["--site", "resid_post.2", "--skip"], "--write"),
        (["--site", "resid_post.2", "--k", "4000"], "4000"),
        (["--site", "resid_post.2", "--nested", "5000"], "Matryoshka"),
    ],
)
def test_what_cannot_be_trained_is_refused(capsys, tmp_path, words, why):
    code, _, err = run(capsys, *words, "--out", str(tmp_path))
    assert code == 2
    assert why in err
