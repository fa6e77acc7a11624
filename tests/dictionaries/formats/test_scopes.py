"""Gemma Scope 1 and 2, Llama Scope, Qwen Scope: files made by hand, formulas written out."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cutaway.core.refuse import Refused
from cutaway.dictionaries import formats
from cutaway.dictionaries.gates import JumpRelu, Relu
from cutaway.dictionaries.transforms import fold
from tests.dictionaries.common import dictionary
from tests.dictionaries.formats.common import D, F, acts, draw, kept, near, there_and_back

X = acts().double()
W_ENC, W_DEC, B_ENC, B_DEC = draw(D, F, seed=0), draw(F, D, seed=1), draw(F, seed=2), draw(D, seed=3)
THETA = draw(F, seed=4).abs()


def jumped(x, theta=THETA):
    pi = x @ W_ENC.double() + B_ENC
    return pi * (pi > theta)


def decoded(f):
    return f @ W_DEC.double() + B_DEC


# --- Gemma Scope 1


def npz(folder, lower=False, **more):
    folder.mkdir(parents=True)
    w = ("w_enc", "w_dec") if lower else ("W_enc", "W_dec")
    tensors = {w[0]: W_ENC, w[1]: W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THETA, **more}
    np.savez(folder / "params.npz", **{n: t.numpy() for n, t in tensors.items()})
    return folder


@pytest.mark.parametrize(
    ("repository", "site"), [("x-2b-pt-res", "resid_post"), ("x-2b-pt-mlp", "mlp_out"), ("x-9b-pt-att", "z")]
)
@pytest.mark.parametrize("lower", [False, True])
def test_the_first_scope_tells_site_layer_and_l0_by_its_path(repository, site, lower, tmp_path):
    path = npz(tmp_path / repository / "layer_20" / "width_16k" / "average_l0_71", lower)
    assert formats.detect(path) == formats.detect(path / "params.npz") == ["gemma_scope"]
    d = formats.load(path)
    assert d.reads == d.writes == (f"{site}.20",)
    assert d.about["declared_l0"] == 71
    assert near(d.encode(X).dense(), jumped(X))
    assert near(d.forward(X), decoded(jumped(X)))
    there_and_back(d, tmp_path / "again", "gemma_scope", X, site=f"{site}.20")


def test_the_first_scope_asks_for_the_site_that_its_path_hides(tmp_path):
    with pytest.raises(Refused, match="site="):
        formats.load(npz(tmp_path / "params"))


def test_embeddings_are_divided_by_the_root_of_the_width(tmp_path):
    d = formats.load(npz(tmp_path / "x-pt-res" / "embedding" / "width_4k" / "average_l0_6"))
    assert d.reads == ("embed",)
    pi = X @ (W_ENC.double() / D**0.5) + B_ENC
    assert near(d.forward(X), (pi * (pi > THETA)) @ (W_DEC.double() * D**0.5) + B_DEC)


def test_transcoders_of_the_first_scope_read_the_norm_without_its_weight(tmp_path):
    path = npz(tmp_path / "x-2b-pt-transcoders" / "layer_5" / "width_16k" / "average_l0_10")
    with pytest.raises(Refused, match="norm_weight="):
        formats.load(path)
    weight = 1 + draw(D, seed=5, scale=0.2)
    d = formats.load(path, norm_weight=weight)
    assert (d.reads, d.writes) == (("mlp_in.5",), ("mlp_out.5",))
    assert near(d.forward(X * weight), decoded(jumped(X)))
    assert near(formats.load(path, norm_weight="included").forward(X), decoded(jumped(X)))
    zero = weight.clone()
    zero[2] = 0
    with pytest.raises(Refused, match="zero"):
        formats.load(path, norm_weight=zero)


# --- Gemma Scope 2


def second(folder, config=None, skip=None):
    folder.mkdir(parents=True)
    tensors = {"w_enc": W_ENC, "w_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THETA}
    tensors |= {} if skip is None else {"affine_skip_connection": skip}
    save_file(tensors, folder / "params.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "model_name": "m", **config}))
    return folder


@pytest.mark.parametrize(
    ("module", "site", "folder"),
    [("output", "resid_post", "resid_post_all"), ("self_attn.o_proj.input", "z", "attn_out"),
     ("post_feedforward_layernorm.output", "mlp_out", "mlp_out")],
)  # fmt: skip
def test_the_second_scope_with_and_without_configuration(module, site, folder, tmp_path):
    path = second(tmp_path / "any", {"hf_hook_point_in": f"model.layers.9.{module}"})
    bare = second(tmp_path / folder / "layer_9_width_16k_l0_small")
    for p in (path, bare):
        assert formats.detect(p) == ["gemma_scope_2"]
        d = formats.load(p)
        assert d.reads == d.writes == (f"{site}.9",)
        assert near(d.forward(X), decoded(jumped(X)))
    there_and_back(d, tmp_path / "again", "gemma_scope_2", X)


@pytest.mark.parametrize("named", [True, False])
def test_affine_transcoders_add_x_times_their_matrix(named, tmp_path):
    skip = draw(D, D, seed=6)
    hooks = {"hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output", "affine_connection": True,
             "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output"}  # fmt: skip
    path = second(tmp_path / "transcoder_all" / "layer_3_width_16k_l0_big_affine", hooks if named else None, skip)
    d = formats.load(path)
    assert (d.reads, d.writes) == (("mlp_in.3",), ("mlp_out.3",))
    assert near(d.forward(X), decoded(jumped(X)) + X @ skip.double())
    there_and_back(d, tmp_path / "again", "gemma_scope_2", X)


def crossing(folder, layers=3, affine=True):
    folder.mkdir(parents=True)
    parts = []
    for i in range(layers):
        t = {"w_enc": draw(D, F, seed=10 + i), "w_dec": draw(F, layers, D, seed=20 + i), "b_enc": draw(F, seed=30 + i),
             "b_dec": draw(D, seed=40 + i), "threshold": draw(F, seed=50 + i).abs()}  # fmt: skip
        t |= {"affine_skip_connection": draw(D, D, seed=60 + i)} if affine else {}
        save_file(t, folder / f"params_layer_{i}.safetensors")
        parts.append({n: v.double() for n, v in t.items()})
    return folder, parts


@pytest.mark.parametrize("affine", [False, True])
def test_cross_layer_transcoders_of_the_second_scope(affine, tmp_path):
    path, parts = crossing(tmp_path / "clt" / "width_262k_l0_medium", affine=affine)
    assert formats.detect(path) == ["gemma_scope_2"]
    d = formats.load(path)
    x = {f"mlp_in.{i}": acts(seed=70 + i).double() for i in range(3)}
    for m in range(3):
        y = parts[m]["b_dec"].clone()
        for i in range(m + 1):
            pi = x[f"mlp_in.{i}"] @ parts[i]["w_enc"] + parts[i]["b_enc"]
            y = y + (pi * (pi > parts[i]["threshold"])) @ parts[i]["w_dec"][:, m]
        y = y + x[f"mlp_in.{m}"] @ parts[m]["affine_skip_connection"] if affine else y
        assert near(d.forward(x)[f"mlp_out.{m}"], y)
    there_and_back(d, tmp_path / "again", "gemma_scope_2", x)
    (path / "params_layer_1.safetensors").unlink()
    with pytest.raises(Refused, match="fetch all layers"):
        formats.load(path)


# --- Llama Scope


def llama(folder, theta=1.2, norms=(4.0, 7.0), **config):
    (folder / "checkpoints").mkdir(parents=True)
    out = draw(F, D, seed=1)
    save_file({"encoder.weight": W_ENC.T.contiguous(), "encoder.bias": B_ENC, "decoder.weight": out.T.contiguous(),
               "decoder.bias": B_DEC}, folder / "checkpoints" / "final.safetensors")  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps({
        "d_model": D, "d_sae": F, "act_fn": "jumprelu", "jump_relu_threshold": theta, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norms[0], "out": norms[1]}, "top_k": 5,
        "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post",
        "sparsity_include_decoder_norm": False, "apply_decoder_bias_to_pre_encoder": False, **config,
    }))  # fmt: skip
    return folder


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("space", ["scaled", "raw"])
def test_llama_scope_in_both_spaces(space, subtract, aware, tmp_path):
    path = llama(tmp_path / "a", sparsity_include_decoder_norm=aware, apply_decoder_bias_to_pre_encoder=subtract)
    assert formats.detect(path) == ["llama_scope"]
    with pytest.raises(Refused, match="threshold_space="):
        formats.load(path)
    d = formats.load(path, threshold_space=space)
    s_in, s_out = D**0.5 / 4.0, D**0.5 / 7.0
    pi = (X * s_in - B_DEC * subtract) @ W_ENC.double() + B_ENC
    n = W_DEC.double().norm(dim=1) if aware else 1.0
    f = pi * (pi * n > (1.2 if space == "scaled" else 1.2 * s_in))
    assert near(d.forward(X), decoded(f) / s_out)
    assert near(fold(d).forward(X), decoded(f) / s_out)
    assert d.reads == ("resid_post.15",)
    if not aware:
        again = there_and_back(d, tmp_path / "b", "llama_scope", X)
        assert near(again.forward(X), decoded(f) / s_out)


def test_measured_l0_tells_the_spaces_of_llama_scope_apart(tmp_path):
    path = llama(tmp_path, theta=4.0, norms=(0.5, 0.5))
    l0 = {s: formats.l0_check(formats.load(path, threshold_space=s), X, factor=1.5) for s in ("scaled", "raw")}
    pi = X * (D**0.5 / 0.5) @ W_ENC.double() + B_ENC
    for s, theta in (("scaled", 4.0), ("raw", 4.0 * D**0.5 / 0.5)):
        assert l0[s].measured == pytest.approx(float((pi > theta).sum(1).double().mean()))
        assert l0[s].declared == 5
    assert l0["scaled"].agrees != l0["raw"].agrees
    with pytest.raises(Refused, match="declared="):
        formats.l0_check(formats.load(path, threshold_space="raw"), X, declared=0)


# --- Qwen Scope


def test_qwen_scope(tmp_path):
    folder = tmp_path / "SAE-Res-Any-1.7B-W32K-L0_4"
    folder.mkdir()
    file = folder / "layer7.sae.pt"
    torch.save({"W_enc": W_ENC.T.contiguous(), "W_dec": W_DEC.T.contiguous(), "b_enc": B_ENC, "b_dec": B_DEC}, file)
    assert formats.detect(file) == ["qwen_scope"]
    d = formats.load(file)
    assert d.reads == ("resid_post.7",)
    assert near(d.forward(X), decoded(torch.relu(kept(X @ W_ENC.double() + B_ENC, 4))))
    there_and_back(d, tmp_path / "layer7.sae.pt", "qwen_scope", X, k=4)
    file.rename(tmp_path / "some.pt")
    for missing, question in (({"k": 4}, "site="), ({"site": "resid_post.7"}, "k=")):
        with pytest.raises(Refused, match=question):
            formats.load(tmp_path / "some.pt", **missing)


def test_what_these_formats_cannot_hold_is_refused(tmp_path):
    d = dictionary([(F, ["resid_post.1"], ["resid_post.1"])], {"resid_post.1": D}, dtype=torch.float32)
    signed = type(d)(d.blocks, d.encoder, d.decoder, d.b_enc, d.b_dec, (JumpRelu(-THETA, signed=True),))
    assert isinstance(d.gate, Relu)
    for name in ("gemma_scope", "gemma_scope_2", "qwen_scope"):
        with pytest.raises(Refused, match="no gate Relu"):
            formats.write(d, tmp_path / name, name)
        with pytest.raises(Refused, match="negative values"):
            formats.write(signed, tmp_path / name, name)
    many = type(d)(d.blocks, d.encoder, d.decoder, d.b_enc, d.b_dec, (JumpRelu(THETA),))
    with pytest.raises(Refused, match="one θ"):
        formats.write(many, tmp_path / "l", "llama_scope")
