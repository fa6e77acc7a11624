"""crosslayer-coding's cross-layer transcoders, and attention dictionaries in plain files; formulas written out."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from cutaway.core.refuse import Refused
from cutaway.dictionaries import formats
from cutaway.dictionaries.gates import BatchTopK, TopK
from tests.dictionaries.common import dictionary
from tests.dictionaries.formats.common import D, F, acts, draw, near, there_and_back

L, WHERE = 3, {"site": "mlp_in", "target": "mlp_out"}
X = [acts(seed=90 + i).double() for i in range(L)]
PAIRS = [(s, m) for s in range(L) for m in range(s, L)]


def named(s, m, tying):
    return {"per_source": f"{s}", "per_target": f"{m}", "none": f"{s}->{m}"}[tying]


def coded(path, tying="none", act="jumprelu", **config):
    """A folder of crosslayer-coding; returns its tensors by their short names, in double precision."""
    path.mkdir()
    enc, dec = "encoder_module.encoders", "decoder_module.decoders"
    t = {f"{enc}.{i}.weight": draw(F, D, seed=i) for i in range(L)}
    t |= {f"{enc}.{i}.bias_param": draw(F, seed=10 + i) for i in range(L)}
    for n, (s, m) in enumerate(PAIRS):
        name = named(s, m, tying)
        t |= {f"{dec}.{name}.weight": draw(D, F, seed=20 + n), f"{dec}.{name}.bias_param": draw(D, seed=40 + n)}
        if tying == "none" or s == m:
            t[f"decoder_module.skip_weights.{name}"] = draw(D, D, seed=60 + n)
    if tying != "none":
        t |= {f"decoder_module.feature_scale.{m}": draw(F, seed=80 + m) for m in range(L)}
    if act == "jumprelu":
        t["theta_manager.log_threshold"] = draw(L, F, seed=99)
    save_file(t, path / "model.safetensors")
    words = {"num_features": F, "num_layers": L, "d_model": D, "activation_fn": act, "decoder_tying": tying}
    (path / "cfg.json").write_text(json.dumps({**words, "normalization_method": "none", **config}))
    return {n.split(".", 1)[1].replace("bias_param", "bias"): v.double() for n, v in t.items()}


def written(t, tying):
    """What that tool writes at each layer: tied to the target, latents are added first and decoded once."""
    f = []
    for i in range(L):
        pi = X[i] @ t[f"encoders.{i}.weight"].T + t[f"encoders.{i}.bias"]
        f.append(pi * (pi >= t["log_threshold"][i].exp()) if "log_threshold" in t else pi.relu())
    out = []
    for m in range(L):
        scale = t.get(f"feature_scale.{m}", torch.ones(F).double())
        if tying == "per_target":
            y = sum(f[s] * scale for s in range(m + 1)) @ t[f"decoders.{m}.weight"].T + t[f"decoders.{m}.bias"]
        else:
            names = [named(s, m, tying) for s in range(m + 1)]
            y = sum((f[s] * scale) @ t[f"decoders.{n}.weight"].T + t[f"decoders.{n}.bias"] for s, n in enumerate(names))
        for s in range(m + 1) if tying == "none" else [m]:
            y = y + X[s] @ t[f"skip_weights.{named(s, m, tying)}"].T
        out.append(y)
    return out


@pytest.mark.parametrize("tying", ["none", "per_source", "per_target"])
@pytest.mark.parametrize("act", ["relu", "jumprelu"])
def test_cross_layer_transcoders_of_crosslayer_coding(tying, act, tmp_path):
    t = coded(tmp_path / "a", tying, act)
    assert formats.detect(tmp_path / "a") == ["crosslayer_coding"]
    d = formats.load(tmp_path / "a", **WHERE)
    x = {f"mlp_in.{i}": X[i] for i in range(L)}
    for m, y in enumerate(written(t, tying)):
        assert near(d.forward(x)[f"mlp_out.{m}"], y)
    there_and_back(d, tmp_path / "b", "crosslayer_coding", x, **WHERE)


def test_what_crosslayer_coding_leaves_open(tmp_path):
    coded(tmp_path / "a", normalization_method="mean_std")
    with pytest.raises(Refused, match="site="):
        formats.load(tmp_path / "a")
    with pytest.raises(Refused, match="normalised="):
        formats.load(tmp_path / "a", **WHERE)
    assert formats.load(tmp_path / "a", **WHERE, normalised="before").n_latents == L * F
    coded(tmp_path / "b", act="batchtopk")
    with pytest.raises(Refused, match="of all layers"):
        formats.load(tmp_path / "b", **WHERE)
    widths = {f"{s}.{i}": D for s in ("mlp_in", "mlp_out") for i in range(2)}
    blocks = [(F, ["mlp_in.0"], ["mlp_out.0", "mlp_out.1"]), (F, ["mlp_in.1"], ["mlp_out.1"])]
    clt = dictionary(blocks, widths, dtype=torch.float32)
    one = replace(clt, gates=(BatchTopK(3, 0.5), BatchTopK(3, 0.7)))
    there_and_back(one, tmp_path / "c", "crosslayer_coding", {r: acts() for r in clt.reads}, **WHERE)
    for other, why in (
        (dictionary(blocks[1:], widths), "cross-layer"),
        (replace(clt, gates=(TopK(2),) * 2), "no gate"),
    ):
        with pytest.raises(Refused, match=why):
            formats.write(other, tmp_path / "x", "crosslayer_coding")


def test_attention_dictionaries_in_plain_files(tmp_path):
    t = {"W_enc": draw(D, F, seed=1), "W_dec": draw(F, D, seed=2), "b_enc": draw(F, seed=3), "b_dec": draw(D, seed=4)}
    for name in ("gpt2_L5_Hcat_z", "gpt2_L6_Hcat_z"):
        torch.save(t, tmp_path / f"{name}.pt")
        words = {"act_name": f"blocks.{name[6]}.attn.hook_z", "act_size": D, "dict_size": F, "model_name": "gpt2-small"}
        (tmp_path / f"{name}_cfg.json").write_text(json.dumps(words))
    path = tmp_path / "gpt2_L6_Hcat_z.pt"
    assert formats.detect(path) == ["connor_rob"]
    d = formats.load(path)
    assert d.reads == d.writes == ("z.6",)
    x = X[0]
    f = torch.relu((x - t["b_dec"]) @ t["W_enc"].double() + t["b_enc"])
    assert near(d.encode(x).dense(), f)
    assert near(d.forward(x), f @ t["W_dec"].double() + t["b_dec"])
    there_and_back(d, tmp_path / "b", "connor_rob", x)
    with pytest.raises(Refused, match="no gate TopK"):
        formats.write(replace(d, gates=(TopK(2),)), tmp_path / "x", "connor_rob")
