"""`cutaway dict train` on the bundled model and its own text."""

import json
import os
import signal

import pytest

from cutaway.cli import main
from cutaway.cli.dict.recipes import Asked, names, recipes
from cutaway.core.refuse import Refused
from cutaway.dictionaries import objectives as ob
from cutaway.dictionaries import open as open_dictionary
from cutaway.dictionaries import training as tr

SIZE = ["--batch", "256", "--context", "48", "--threads", "1"]
FLAGS = [*SIZE, "--latents", "96", "--k", "4", "--rate", "0.01"]
SHORT = ["--tokens", "600", *SIZE]


def run(capsys, *words) -> tuple[int, str, str]:
    code = main(["dict", "train", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def trained(capsys, out, *words):
    """The data of a run that worked, and its dictionaries."""
    code, said, err = run(capsys, "--out", out, *words, "--json")
    assert code == 0, err
    data = json.loads(said)
    return data, [open_dictionary(f) for f in data["dictionaries"]]


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
    card = json.loads((tmp_path / "card.json").read_text())[0]
    assert card["tokens"] >= 3000
    assert card["held_out"]
    assert not card["warnings"]
    code, shown, _ = run(capsys, *words)  # the run is over: only the card is made again
    assert code == 0
    assert "FVU" in shown
    assert open_dictionary(data["dictionaries"][0]).fingerprint() == d.fingerprint()


def test_a_judgement_that_is_refused_loses_nothing(capsys, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise Refused("evidence", "there is too little of it", "give more")

    monkeypatch.setattr("cutaway.suites.dictionary_runs.card", refuse)
    data, (d,) = trained(capsys, tmp_path, "--site", "resid_post.0", *SHORT, "--latents", "32", "--rate", "0.01")
    assert d.n_latents == 32
    assert data["not judged"]["why"] == "there is too little of it"
    code, shown, _ = run(
        capsys, "--out", tmp_path, "--site", "resid_post.0", *SHORT, "--latents", "32", "--rate", ".01"
    )
    assert code == 0
    assert "not judged" in shown


def test_an_interrupted_run_says_how_it_goes_on(capsys, tmp_path, monkeypatch):
    step, calls = tr.Learner.step, iter(range(100))

    def interrupted(self, *given):
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *given)

    monkeypatch.setattr(tr.Learner, "step", interrupted)
    words = ["--site", "resid_post.0", "--out", tmp_path, "--no-resume", *SHORT, "--latents", "32", "--rate", "0.01"]
    code, _, err = run(capsys, *words)
    assert code == 130
    line = next(row for row in err.splitlines() if "go on with" in row)
    assert line.endswith("--rate 0.01")
    assert "--no-resume" not in line
    code, *_ = main(line.partition("go on with: cutaway ")[2].split()), capsys.readouterr()
    assert code == 0
    assert next(calls) == 3  # two steps before, one after


def test_repeated_flags_make_a_dictionary_each_and_seeds_are_compared(capsys, tmp_path):
    words = ["--site", "resid_post.0", *SHORT, "--latents", "32", "--latents", "48", "--seed", "0", "--seed", "1",
             "--k", "4", "--rate", "0.01"]  # fmt: skip
    data, made = trained(capsys, tmp_path, *words)
    assert [d.n_latents for d in made] == [32, 32, 48, 48]
    assert {f.rpartition("/")[2] for f in data["dictionaries"]} == {
        f"dictionary-latents{n}-seed{s}.safetensors" for n in (32, 48) for s in (0, 1)
    }
    code, shown, _ = run(capsys, "--out", tmp_path, *words)
    assert code == 0
    assert "32 latents, seeds 0, 1: cosine of matched ones" in shown
    assert "48 latents, seeds 0, 1: cosine of matched ones" in shown
    again, _ = trained(capsys, tmp_path / "again", "--recipe", tmp_path / "card.json", *SHORT)
    assert [c["recipe"] for c in again["cards"]] == [c["recipe"] for c in data["cards"]]
    assert run(capsys, "--out", tmp_path / "x", "--recipe", tmp_path / "card.json", "--k", "3")[0] == 2


def test_a_harvest_is_trained_on_without_its_model(capsys, tmp_path):
    acts = tmp_path / "acts"
    assert main(["harvest", "--sites", "mlp_in.*", "--sites", "mlp_out.*", "--tokens", "700", "--context", "48",
                 "--out", str(acts)]) == 0  # fmt: skip
    capsys.readouterr()
    words = [
        "--acts",
        acts,
        "--tokens",
        "1200",
        "--batch",
        "256",
        "--threads",
        "1",
        "--latents",
        "24",
        "--rate",
        "0.01",
    ]
    data, (d,) = trained(capsys, tmp_path / "set", "--site", "mlp_in", "--write", "mlp_out", *words)
    assert [(b.reads, b.writes) for b in d.blocks] == [((f"mlp_in.{i}",), (f"mlp_out.{i}",)) for i in range(6)]
    card = data["cards"][0]
    assert card["held_out"] is False
    assert "trained on" in card["warnings"][-1]
    assert run(capsys, "--out", tmp_path / "x", "--acts", acts, "--site", "z.1")[2].count("not harvested") == 1
    assert run(capsys, "--out", tmp_path / "x", "--acts", acts, "--site", "mlp_in", "--text", "t")[0] == 2


def test_several_models_make_a_crosscoder(capsys, tmp_path):
    words = ["--model", "a=miniworld", "--model", "b=miniworld", "--site", "resid_post.0", *SHORT]
    _, (d,) = trained(capsys, tmp_path, *words, "--latents", "32", "--rate", "0.01")
    assert d.reads == d.writes == ("a:resid_post.0", "b:resid_post.0")
    assert len(d.blocks) == 1


def test_end_to_end_runs_the_model(capsys, tmp_path):
    words = ["--site", "resid_post.4", "--end-to-end", "kl", "--latents", "32", "--rate", "0.01", *SHORT]
    data, _ = trained(capsys, tmp_path, *words)
    assert data["cards"][0]["recipe"]["terms"][-1]["kind"] == "Spliced"
    assert data["cards"][0]["held_out"]


def one(**flags):
    (made,) = recipes(Asked(**{"site": ["resid_post.1"], **flags}), list)
    return made


def test_flags_are_recipes():
    a, b, c, z = "mlp_in.0", "mlp_in.1", "mlp_out.0", "mlp_out.1"
    site, two = "resid_post.1", {"site": [a, b], "write": [c, z]}
    batch, wide = tr.TrainBatchTopK(16), tr.TrainJumpRelu(0.1, 2.0, to_input=True)
    for flags, recipe in [
        ({}, tr.autoencoder(site, 1024, batch)),
        ({"gate": "topk", "wide": 64, "k": [8]}, tr.autoencoder(site, 1024, tr.TrainTopK(8, 64))),
        ({"decoder": "norm-aware", "rate": 0.1}, tr.autoencoder(site, 1024, batch, decoder="norm_aware", rate=0.1)),
        ({"nested": [8, 64]}, tr.autoencoder(site, 1024, batch, (ob.AuxK(), ob.Matryoshka((8, 64))))),
        ({"gate": "relu", "penalty": 3.0}, tr.autoencoder(site, 1024, tr.TrainRelu(), (ob.L1(3.0),))),
        ({"gate": "gated", "penalty": 3.0}, tr.autoencoder(site, 1024, tr.TrainGated(), (ob.OpenGate(3.0),))),
        ({"gate": "jumprelu"}, tr.autoencoder(site, 1024, tr.TrainJumpRelu())),
        ({"gate": "jumprelu", "l0": 9.0}, tr.autoencoder(site, 1024, wide, (ob.L0Target(30.0, 9.0),))),
        (
            {"gate": "jumprelu", "penalty_kind": "tanh"},
            tr.autoencoder(site, 1024, wide, (ob.Tanh(5.0), ob.PreActivation())),
        ),
        ({"site": [a, b]}, tr.autoencoders([a, b], 1024, batch)),
        ({"site": [a, b], "kind": "crosscoder"}, tr.crosscoder([a, b], 1024, batch)),
        ({**two, "skip": True}, tr.transcoders([a, b], [c, z], 1024, batch, skip=True)),
        ({**two, "kind": "cross-layer"}, tr.cross_layer([a, b], [c, z], 1024, batch)),
        ({**two, "kind": "crosscoder"}, tr.crosscoder([a, b], 1024, batch, writes=[c, z])),
    ]:
        assert one(**flags) == recipe, flags


def test_files_are_named_by_what_differs():
    def made(**flags):
        return names(recipes(Asked(site=["resid_post.1"], **flags), list))

    assert made() == ["dictionary"]
    assert made(k=[4, 8]) == ["dictionary-k4", "dictionary-k8"]
    assert made(latents=[64, 96], seed=[0, 2])[1] == "dictionary-latents64-seed2"
    pair = [one(), one(rate=0.5)]
    assert names(pair) == ["dictionary-0", "dictionary-1"]
    assert names([one(), one(site=["b:z.1"], kind="autoencoder")])[1] == "dictionary-b_z.1"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--site", "nowhere.3"], "nowhere"),
        (["--site", "resid_post.99"], "outside"),
        (["--site", "resid_post.2", "--penalty", "3"], "--k"),
        (["--site", "resid_post.2", "--skip"], "--write"),
        (["--site", "resid_post.2", "--k", "4000"], "4000"),
        (["--site", "resid_post.2", "--latents", "0"], "more latents"),
        (["--site", "resid_post.2", "--nested", "5000"], "Matryoshka"),
        (["--site", "resid_post.2", "--gate", "relu", "--penalty", "-1"], "0 or more"),
        (["--site", "resid_post.2", "--gate", "relu", "--k", "3"], "--penalty"),
        (["--site", "resid_post.2", "--gate", "relu", "--l0", "3"], "--gate jumprelu"),
        (["--site", "resid_post.2", "--gate", "jumprelu", "--penalty-kind", "quadratic"], "--l0"),
        (["--site", "resid_post.2", "--wide", "64"], "--gate topk"),
        (["--site", "resid_post.2", "--rate", "-1"], "positive"),
        (["--site", "resid_post.2", "--tokens", "0"], "nothing to train on"),
        (["--site", "resid_post.2", "--tokens", "100", "--batch", "100000"], "would train on 100,000"),
        (["--site", "resid_post.2", "--seed", "3", "--seed", "3"], "twice"),
        (["--site", "resid_post.2", "--kind", "cross-layer"], "as many --write"),
        (["--site", "resid_post.2", "--device", "nowhere"], "nowhere"),
        (["--site", "resid_post.2", "--out", "/proc/xx"], "cannot be made"),
        (["--site", "resid_post.2", "--model", "miniworld", "--model", "a=miniworld"], "no name"),
        (["--site", "c:resid_post.2", "--model", "a=miniworld", "--model", "b=miniworld"], "named c"),
        (["--recipe", "CHANGELOG.md"], "JSON"),
        ([], "--site"),
    ],
)
def test_what_cannot_be_trained_is_refused(capsys, tmp_path, words, why):
    out = [] if "--out" in words else ["--out", str(tmp_path)]
    code, _, err = run(capsys, *words, *out)
    assert code == 2
    assert why in err


def test_a_checkpoint_of_another_run_is_refused_in_words_of_the_command(capsys, tmp_path):
    words = ["--site", "resid_post.0", *SHORT, "--latents", "32", "--rate", "0.01"]
    trained(capsys, tmp_path, *words)
    code, _, err = run(capsys, "--out", tmp_path, *words, "--seed", "4")
    assert code == 2
    assert "--no-resume" in err
