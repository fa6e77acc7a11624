"""Dictionaries named on the command line: choices behind the file or as options, the zoo's, and conversion."""

import json
import shlex

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from cutaway.cli import app
from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.dictionaries import autoencoder, formats
from cutaway.dictionaries.gates import Relu, TopK
from cutaway.dictionaries.opening import open_dictionary, valued


def run(capsys, line: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command line."""
    code = app.main(shlex.split(line))
    out, err = capsys.readouterr()
    return code, out, err


def made(gate, width: int = 16):
    rows = normalize(torch.randn(24, width, generator=generator(0)), dim=-1)
    return autoencoder("resid_post.1", rows, rows, torch.zeros(24), torch.zeros(width), gate)


def test_choices_stand_behind_the_file_or_beside_it(tmp_path):
    d = made(TopK(5))
    file = formats.write(d, tmp_path / "q.pt", "qwen_scope")
    for got in (
        open_dictionary(f"{file}?site=resid_post.1&k=5"),
        open_dictionary(str(file), ["site=resid_post.1", "k=5"]),
        open_dictionary(f"{file}?site=resid_post.1&format=qwen_scope", ["k=5"]),
    ):
        assert got.fingerprint() == d.fingerprint()
    with pytest.raises(Refused, match=r"say it: --choice k=…"):
        open_dictionary(str(file), ["site=resid_post.1"], options=True)
    with pytest.raises(Refused, match=r"say it: .*q\.pt\?site=…"):
        open_dictionary(str(file))
    for wrong, why in [("k=x", "whole number"), ("k", "name=value"), ("kk=3", "leaves open: site, k")]:
        with pytest.raises(Refused, match=why):
            open_dictionary(str(file), ["site=resid_post.1", wrong])


def test_dictionaries_of_the_zoo_are_named_and_listed(capsys):
    assert open_dictionary("miniworld/resid_post.3").reads == ("resid_post.3",)
    with pytest.raises(Refused, match="transcoders"):
        open_dictionary("miniworld/nothing")
    code, out, _ = run(capsys, "zoo list --json")
    assert code == 0
    assert json.loads(out)[0]["dictionaries"] == ["miniworld/resid_post.3", "miniworld/transcoders"]


def test_values_are_what_readers_take(tmp_path):
    from typing import get_type_hints

    scope, tracer = (get_type_hints(formats.module(n).read) for n in ("gemma_scope", "circuit_tracer"))
    assert valued("embedding", "true", scope["embedding"]) is True
    assert valued("norm_weight", "included", scope["norm_weight"]) == "included"
    save_file({"w": torch.ones(3)}, tmp_path / "w.safetensors")
    save_file({"0": torch.ones(3), "1": torch.zeros(3)}, tmp_path / "by_layer.safetensors")
    assert valued("norm_weight", str(tmp_path / "w.safetensors"), scope["norm_weight"]).tolist() == [1, 1, 1]
    assert set(valued("norm_weights", str(tmp_path / "by_layer.safetensors"), tracer["norm_weights"])) == {0, 1}
    assert valued("average_norms", '{"resid_post.0": 2.5}') == {"resid_post.0": 2.5}
    for hint, text in [("norm_weight", "includd"), ("norm_weight", str(tmp_path / "by_layer.safetensors"))]:
        with pytest.raises(Refused):
            valued(hint, text, scope[hint])


def test_a_dictionary_is_converted_and_read_back(capsys, tmp_path):
    file = formats.write(made(Relu()), tmp_path / "g.pth", "goodfire")
    code, out, err = run(capsys, f"dict convert {file}?site=resid_post.1 {tmp_path / 'o.pt'} --format openai --json")
    assert code == 0, err
    assert json.loads(out)["read back"]["largest difference"] < 1e-5
    assert open_dictionary(f"{tmp_path / 'o.pt'}?site=resid_post.1").n_latents == 24
    line = f"dict convert {file} {tmp_path / 'h.pth'} --choice site=resid_post.1"
    assert run(capsys, f"{line} --format goodfire --option names=short")[0] == 0
    for more, why in [("goodfire --option names=shrt", "linear, short"), ("goodfire --option k=3", "it has: names"),
                      ("qwen_scope", "no gate Relu"), ("qwen", "qwen_scope")]:  # fmt: skip
        code, _, err = run(capsys, f"{line} --format {more}")
        assert code == 2
        assert why in err
