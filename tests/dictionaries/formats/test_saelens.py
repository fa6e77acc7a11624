"""SAELens, new and old: files made by hand, formulas written out."""

import json

import pytest
import torch
from safetensors.torch import save_file

from cutaway.core.refuse import Refused
from cutaway.dictionaries import formats
from cutaway.dictionaries.about import trained_bos
from cutaway.dictionaries.gates import BatchTopK, GroupMax, JumpRelu, MatchingPursuit
from cutaway.dictionaries.norms import TokenLayerNorm
from cutaway.dictionaries.transforms import fold
from tests.dictionaries.common import dictionary
from tests.dictionaries.formats.common import D, F, acts, draw, kept, near, there_and_back

X = acts().double()
T = {"W_enc": draw(D, F, seed=0), "W_dec": draw(F, D, seed=1), "b_dec": draw(D, seed=2), "b_enc": draw(F, seed=3)}
HOOK = {"model_name": "m", "hook_name": "blocks.3.hook_resid_post", "hook_head_index": None}


def put(path, config, tensors, scaler=None, **metadata):
    """A folder as SAELens writes it."""
    path.mkdir(exist_ok=True, parents=True)
    cfg = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
           "normalize_activations": "none", "reshape_activations": "none", "metadata": {**HOOK, **metadata},
           **config}  # fmt: skip
    (path / "cfg.json").write_text(json.dumps(cfg))
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "sae_weights.safetensors")
    if scaler is not None:
        (path / "activation_scaler.json").write_text(json.dumps(scaler))
    return path


def linear(x, subtract=True):
    return (x - T["b_dec"].double() * subtract) @ T["W_enc"].double()


def decoded(f):
    return f @ T["W_dec"].double() + T["b_dec"].double()


THETA = draw(F, seed=4).abs()
G = {"r_mag": draw(F, seed=5, scale=0.3), "b_gate": draw(F, seed=6), "b_mag": draw(F, seed=7)}
NORMS = T["W_dec"].double().norm(dim=1)


def gated(x):
    pi = linear(x)
    return ((pi + G["b_gate"]) > 0) * torch.relu(pi * G["r_mag"].double().exp() + G["b_mag"])


def pre(x, subtract=True):
    return linear(x, subtract) + T["b_enc"].double()


WITHOUT = {n: t for n, t in T.items() if n != "b_enc"}
CASES = {
    "standard": ({"architecture": "standard"}, T, lambda x: torch.relu(pre(x))),
    "no subtraction": (
        {"architecture": "standard", "apply_b_dec_to_input": False}, T, lambda x: torch.relu(pre(x, False)),
    ),
    "topk": ({"architecture": "topk", "k": 4}, T, lambda x: torch.relu(kept(pre(x), 4))),
    "abstopk": (
        {"architecture": "abstopk", "k": 4}, T, lambda x: pre(x) * (kept(pre(x).abs(), 4) > 0),
    ),
    "topk by norm": (
        {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True}, T,
        lambda x: torch.relu(kept(pre(x) * NORMS, 4)) / NORMS,
    ),
    "jumprelu": (
        {"architecture": "jumprelu"}, {**T, "threshold": THETA}, lambda x: pre(x) * (pre(x) > THETA),
    ),
    "jumprelu, log": (
        {"architecture": "jumprelu"}, {**T, "log_threshold": THETA.log()}, lambda x: pre(x) * (pre(x) > THETA),
    ),
    "batchtopk in training": (
        {"architecture": "batchtopk", "k": 3, "rescale_acts_by_decoder_norm": True},
        {**T, "topk_threshold": torch.tensor(2.5, dtype=torch.float64)},
        lambda x: pre(x) * (pre(x) * NORMS > 2.5),
    ),
    "gated": ({"architecture": "gated"}, {**WITHOUT, **G}, gated),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_is_its_formula(name, tmp_path):
    config, tensors, code = CASES[name]
    path = put(tmp_path / "a", config, tensors)
    assert formats.detect(path) == ["saelens"]
    d = formats.load(path)
    assert d.reads == d.writes == ("resid_post.3",)
    assert near(d.encode(X).dense(), code(X))
    assert near(d.forward(X), decoded(code(X)))
    assert d.about["model"] == "m"
    there_and_back(d, tmp_path / "b", "saelens", X)


def test_matching_pursuit_reads_by_its_decoder_only(tmp_path):
    rows = torch.nn.functional.normalize(T["W_dec"], dim=1)
    config = {"architecture": "matching_pursuit", "residual_threshold": 0.2, "max_iterations": 3,
              "stop_on_duplicate_support": True}  # fmt: skip
    d = formats.load(put(tmp_path / "a", config, {"W_dec": rows, "b_dec": T["b_dec"]}))
    assert (d.gate.residual, d.gate.steps, d.gate.stop_on_repeat) == (0.2, 3, True)
    out, rest = torch.zeros_like(X), X - T["b_dec"].double()
    best = rest @ rows.double().T
    first = torch.relu(best.max(1).values)[:, None] * rows.double()[best.argmax(1)]
    one = formats.load(put(tmp_path / "b", {**config, "max_iterations": 1}, {"W_dec": rows, "b_dec": T["b_dec"]}))
    assert near(one.forward(X), out + first + T["b_dec"].double())
    assert isinstance(there_and_back(d, tmp_path / "c", "saelens", X).gate, MatchingPursuit)


def test_normalisations(tmp_path):
    def with_norm(how):
        return formats.load(put(tmp_path / how, {"architecture": "standard", "normalize_activations": how}, T))

    length = X.norm(dim=1, keepdim=True) / D**0.5
    assert near(with_norm("constant_norm_rescale").forward(X), decoded(torch.relu(pre(X / length))) * length)
    mean = X.mean(1, keepdim=True)
    std = ((X - mean).pow(2).sum(1, keepdim=True) / (D - 1)).sqrt()
    d = with_norm("layer_norm")
    assert near(d.forward(X), decoded(torch.relu(pre((X - mean) / (std + 1e-5)))) * std + mean)
    there_and_back(d, tmp_path / "again", "saelens", X)
    assert near(with_norm("expected_average_only_in").forward(X), decoded(torch.relu(pre(X))))
    with pytest.raises(Refused, match="not known"):
        with_norm("batch_norm")


def test_a_training_checkpoint_brings_its_scale_or_whitening(tmp_path):
    config = {"architecture": "batchtopk", "k": 3, "normalize_activations": "expected_average_only_in"}
    tensors = {**T, "topk_threshold": torch.tensor(1.0, dtype=torch.float64)}
    d = formats.load(put(tmp_path / "a", config, tensors, {"scaling_factor": 0.4, "has_whitening": False}))
    f = pre(0.4 * X) * (pre(0.4 * X) > 1.0)
    assert near(d.forward(X), decoded(f) / 0.4)
    assert isinstance(d.gate, BatchTopK)
    assert near(fold(d).forward(X), decoded(f) / 0.4)
    again = there_and_back(d, tmp_path / "b", "saelens", X)
    assert isinstance(again.gate, JumpRelu)  # as that tool converts it
    path = put(tmp_path / "c", config, tensors, {"scaling_factor": None, "has_whitening": True})
    matrix = torch.eye(D).double() + 0.2 * draw(D, D, seed=8)
    parts = {
        "mean": draw(D, seed=9).double(),
        "matrix": matrix,
        "inverse_matrix": torch.linalg.inv(matrix).contiguous(),
    }
    save_file(parts, path / "activation_whitening.safetensors")
    x = (X - parts["mean"]) @ matrix
    f = pre(x) * (pre(x) > 1.0)
    assert near(formats.load(path).forward(X), decoded(f) @ parts["inverse_matrix"] + parts["mean"])


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_transcoders_read_one_site_and_write_another(kind, tmp_path):
    out = 4
    tensors = {**T, "W_dec": draw(F, out, seed=10), "b_dec": draw(out, seed=11)}
    tensors |= {"threshold": THETA} if "jump" in kind else {}
    tensors |= {"W_skip": draw(out, D, seed=12)} if "skip" in kind else {}
    hooks = {"hook_name": "blocks.3.hook_mlp_in", "hook_name_out": "blocks.3.hook_mlp_out"}
    d = formats.load(put(tmp_path / "a", {"architecture": kind, "d_out": out}, tensors, **hooks))
    pi = X @ T["W_enc"].double() + T["b_enc"]
    f = pi * (pi > THETA) if "jump" in kind else torch.relu(pi)
    y = f @ tensors["W_dec"].double() + tensors["b_dec"]
    y = y + X @ tensors["W_skip"].double().T if "skip" in kind else y
    assert (d.reads, d.writes) == (("mlp_in.3",), ("mlp_out.3",))
    assert near(d.forward(X), y)
    there_and_back(d, tmp_path / "b", "saelens", X)


def test_a_norm_read_before_its_weight_is_asked_for_and_divided_out(tmp_path):
    hooks = {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}
    path = put(tmp_path, {"architecture": "skip_transcoder"}, {**T, "W_skip": draw(D, D, seed=13)}, **hooks)
    with pytest.raises(Refused, match="norm_weight="):
        formats.load(path)
    plain = formats.load(path, norm_weight="included")
    weight, bias = draw(D, seed=14).abs() + 0.5, draw(D, seed=15)
    moved = formats.load(path, norm_weight=weight, norm_bias=bias)
    assert near(moved.forward(X * weight + bias), plain.forward(X))
    assert torch.equal(moved.encode(X * weight + bias).counts(), plain.encode(X).counts())


def test_heads_and_single_heads(tmp_path):
    hook = {"hook_name": "blocks.2.attn.hook_z"}
    d = formats.load(put(tmp_path / "a", {"architecture": "standard", "reshape_activations": "hook_z"}, T, **hook))
    assert d.reads == ("z.2",)
    assert near(d.forward(X.reshape(-1, 2, D // 2)).reshape(-1, D), decoded(torch.relu(pre(X))))
    there_and_back(d, tmp_path / "b", "saelens", X)
    path = put(tmp_path / "c", {"architecture": "standard"}, T, **{**hook, "hook_head_index": 3})
    one = formats.load(path)
    assert one.reads == ("z.2.3",)
    assert there_and_back(one, tmp_path / "d", "saelens", X).reads == ("z.2.3",)


def old(path, tensors, **config):
    """A folder as versions 3 to 5 wrote it."""
    path.mkdir()
    cfg = {"d_in": D, "d_sae": F, "dtype": "torch.float32", "hook_point": "blocks.3.hook_resid_post",
           "hook_point_head_index": None, "sae_lens_version": "4.1.0", **config}  # fmt: skip
    (path / "cfg.json").write_text(json.dumps(cfg))
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "sae_weights.safetensors")
    return path


def test_older_versions(tmp_path):
    plain = formats.load(old(tmp_path / "a", T, normalize_activations=False))
    assert formats.detect(tmp_path / "a") == ["saelens_old"]
    assert near(plain.forward(X), decoded(torch.relu(pre(X))))
    top = formats.load(old(tmp_path / "b", T, activation_fn_str="topk", activation_fn_kwargs={"k": 4}))
    assert near(top.forward(X), decoded(torch.relu(kept(pre(X), 4))))
    no = formats.load(old(tmp_path / "c", T, apply_b_dec_to_input=False, architecture="standard"))
    assert near(no.forward(X), decoded(torch.relu(pre(X, False))))
    gate = formats.load(old(tmp_path / "d", {**WITHOUT, **G}, architecture="gated", normalize_activations=None))
    assert near(gate.forward(X), decoded(gated(X)))
    jump = formats.load(old(tmp_path / "e", {**T, "threshold": THETA}, architecture="jumprelu"))
    assert near(jump.forward(X), decoded(pre(X) * (pre(X) > THETA)))
    for n, d in enumerate((plain, top, no, gate, jump)):
        there_and_back(d, tmp_path / f"again{n}", "saelens_old", X)


def test_the_older_scaling_factor_counts_when_it_is_said_to(tmp_path):
    s = draw(F, seed=16).abs() + 0.5
    tensors = {**T, "scaling_factor": s}
    scaled = decoded(torch.relu(pre(X)) * s)
    assert near(formats.load(old(tmp_path / "a", tensors, finetuning_scaling_factor=True)).forward(X), scaled)
    path = old(tmp_path / "b", tensors)
    with pytest.raises(Refused, match="does it count"):
        formats.load(path)
    assert near(formats.load(path, use_scaling_factor=True).forward(X), scaled)
    assert near(formats.load(path, use_scaling_factor=False).forward(X), decoded(torch.relu(pre(X))))
    ones = old(tmp_path / "c", {**T, "scaling_factor": torch.ones(F)})
    assert near(formats.load(ones).forward(X), decoded(torch.relu(pre(X))))


def test_what_is_missing_or_unknown_is_refused(tmp_path):
    with pytest.raises(Refused, match="'temporal' is not known"):
        formats.load(put(tmp_path / "a", {"architecture": "temporal"}, T))
    skip = {"architecture": "skip_transcoder", "normalize_activations": "layer_norm"}
    with pytest.raises(Refused, match="its skip adds what is not"):
        formats.load(put(tmp_path / "s", skip, {**T, "W_skip": draw(D, D, seed=20)}), target="mlp_out.3")
    with pytest.raises(Refused, match="has no threshold"):
        formats.load(put(tmp_path / "b", {"architecture": "jumprelu"}, T))
    with pytest.raises(Refused, match="no counterpart"):
        formats.load(put(tmp_path / "c", {"architecture": "standard"}, T, hook_name="blocks.1.attn.hook_strange"))
    with pytest.raises(Refused, match="site="):
        formats.load(put(tmp_path / "d", {"architecture": "standard"}, T, hook_name=None))
    assert formats.load(tmp_path / "d", site="mlp_out.1").reads == ("mlp_out.1",)
    with pytest.raises(Refused, match="does not leave that open"):
        formats.load(tmp_path / "d", k=3)
    d = formats.load(put(tmp_path / "e", {"architecture": "standard"}, T))
    many = type(d)(d.blocks, d.encoder, d.decoder, d.b_enc, d.b_dec, (GroupMax(2),))
    with pytest.raises(Refused, match="no gate GroupMax"):
        formats.write(many, tmp_path / "f", "saelens")
    two = dictionary([(4, ["mlp_in.0"], ["mlp_out.0"]), (4, ["mlp_in.1"], ["mlp_out.1"])],
                     {f"mlp_{s}.{i}": 3 for s in ("in", "out") for i in (0, 1)})  # fmt: skip
    with pytest.raises(Refused, match="one block"):
        formats.write(two, tmp_path / "g", "saelens")
    odd = dictionary([(4, ["mlp_in.0"], ["mlp_out.0"])], {"mlp_in.0": 3, "mlp_out.0": 3},
                     reading={"mlp_in.0": TokenLayerNorm(0.1)})  # fmt: skip
    with pytest.raises(Refused, match="no such normalisation"):
        formats.write(odd, tmp_path / "h", "saelens")


def test_centred_writing_weights_are_asked_for_and_taken_out(tmp_path):
    centred = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    path = put(tmp_path / "a", {"architecture": "standard"}, T, **centred)
    with pytest.raises(Refused, match="centered="):
        formats.load(path)
    assert near(formats.load(path, centered=False).forward(X), decoded(torch.relu(pre(X))))
    d, mean = formats.load(path, centered=True), X.mean(1, keepdim=True)
    assert near(d.forward(X), decoded(torch.relu(pre(X - mean))) + mean)
    formats.write(d, tmp_path / "b", "saelens")
    assert near(formats.load(tmp_path / "b", centered=True).forward(X), d.forward(X))
    inside = {"hook_name": "blocks.3.mlp.hook_post"}  # neurons are the same in a centred model
    assert near(formats.load(put(tmp_path / "c", {"architecture": "standard"}, T, **centred, **inside)).forward(X),
                decoded(torch.relu(pre(X))))  # fmt: skip
    out = {"hook_name_out": "blocks.3.hook_mlp_out"}
    with pytest.raises(Refused, match="only autoencoders"):
        formats.load(put(tmp_path / "d", {"architecture": "transcoder"}, T, **centred, **out), centered=True)


def test_the_file_says_what_contexts_began_with(tmp_path):
    for prepend, policy in [(True, "both"), (False, "document")]:
        path = put(tmp_path / str(prepend), {"architecture": "standard"}, T, prepend_bos=prepend)
        d = formats.load(path)
        assert trained_bos(d.about) == policy
        formats.write(d, tmp_path / "again", "saelens")
        assert trained_bos(formats.load(tmp_path / "again").about) == policy
    assert trained_bos({}) is None
    assert trained_bos({"parts": [{"stream": {"packing": {"bos": "none"}}}]}) == "none"
