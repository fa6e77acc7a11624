"""OpenAI, sparsify, dictionary_learning, Goodfire: files made by hand, formulas written out."""

import json

import pytest
import torch
from safetensors.torch import save_file

from cutaway.core.refuse import Refused
from cutaway.dictionaries import formats
from cutaway.dictionaries.formats import sparsify
from cutaway.dictionaries.gates import BatchTopK, GroupMax, TopK
from tests.dictionaries.common import dictionary
from tests.dictionaries.formats.common import D, F, N, acts, draw, kept, near, there_and_back

X = acts().double()
ENC, DEC, B_ENC, B_DEC = draw(F, D, seed=0), draw(D, F, seed=1), draw(F, seed=2), draw(D, seed=3)


def pre(x, subtract=True):
    return (x - B_DEC * subtract) @ ENC.double().T + B_ENC


def decoded(f):
    return f @ DEC.double().T + B_DEC


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


# --- OpenAI

STATS = {"stats_last_nonzero": torch.zeros(F, dtype=torch.long), "latents_activation_frequency": torch.ones(F),
         "latents_mean_square": torch.zeros(F)}  # fmt: skip
OPENAI = {"pre_bias": B_DEC, "encoder.weight": ENC, "latent_bias": B_ENC, "decoder.weight": DEC, **STATS}


def test_openai_top_k_normalises_every_token(tmp_path):
    state = {"k": 4, "postact_fn": "ReLU"}
    path = put(tmp_path / "resid_post_mlp_v5_32k" / "autoencoders" / "6.pt",
               {**OPENAI, "activation": "TopK", "activation_state_dict": state})  # fmt: skip
    assert formats.detect(path) == ["openai"]
    d = formats.load(path)
    assert d.reads == ("resid_post.6",)
    mean = X.mean(1, keepdim=True)
    std = ((X - mean).pow(2).sum(1, keepdim=True) / (D - 1)).sqrt()
    f = torch.relu(kept(pre((X - mean) / (std + 1e-5)), 4))
    assert near(d.encode(X).dense(), f)
    assert near(d.forward(X), decoded(f) * std + mean)
    there_and_back(d, tmp_path / "again.pt", "openai", X, site="resid_post.6")


@pytest.mark.parametrize("tied", [False, True])
def test_openai_relu_does_not(tied, tmp_path):
    content = {n: t for n, t in OPENAI.items() if not (tied and n == "decoder.weight")}
    path = put(tmp_path / "mlp_post_act" / "autoencoders" / "2.pt", {**content, "activation": "ReLU"})
    d, f = formats.load(path), torch.relu(pre(X))
    assert d.reads == ("mlp_post.2",)
    assert near(d.forward(X), f @ ENC.double() + B_DEC if tied else decoded(f))
    there_and_back(d, tmp_path / "again.pt", "openai", X, site="mlp_post.2")


def test_openai_asks_and_refuses(tmp_path):
    path = put(tmp_path / "x.pt", {**OPENAI, "activation": "ReLU"})
    with pytest.raises(Refused, match="site="):
        formats.load(path)
    with pytest.raises(Refused, match="'GELU' is not known"):
        formats.load(put(tmp_path / "y.pt", {**OPENAI, "activation": "GELU"}), site="resid_post.1")
    top = dictionary([(F, ["resid_post.1"], ["resid_post.1"])], {"resid_post.1": D}, "topk", dtype=torch.float32)
    with pytest.raises(Refused, match="normalises every token"):
        formats.write(top, tmp_path / "z.pt", "openai")


# --- sparsify


def run(folder, name, tensors=None, **config):
    path = folder / name
    path.mkdir(parents=True)
    own = {"encoder.weight": ENC, "encoder.bias": B_ENC, "W_dec": DEC.T.contiguous(), "b_dec": B_DEC, **(tensors or {})}
    save_file(own, path / "sae.safetensors")
    base = {"d_in": D, "activation": "topk", "expansion_factor": 3, "num_latents": F, "k": 4, "multi_topk": False,
            "normalize_decoder": True, "skip_connection": False, "transcode": False}  # fmt: skip
    (path / "cfg.json").write_text(json.dumps({**base, **config}))
    return path


MODULES = {"layers.10": "resid_post.10", "layers.10.mlp": "mlp_out.10", "layers.3.self_attn/seed1": "attn_out.3",
           "h.2.mlp": "mlp_out.2"}  # fmt: skip


@pytest.mark.parametrize(("name", "site"), MODULES.items())
def test_sparsify_autoencoders_read_module_outputs(name, site, tmp_path):
    path = run(tmp_path, name, unknown_key=3)
    assert formats.detect(path) == ["sparsify"]
    d = formats.load(path)
    assert d.reads == d.writes == (site,)
    assert near(d.forward(X), decoded(torch.relu(kept(pre(X), 4))))
    if name == "layers.10.mlp":
        assert sparsify.folder(d) == name
        there_and_back(d, tmp_path / "again" / sparsify.folder(d), "sparsify", X)


def test_sparsify_transcoders_subtract_nothing(tmp_path):
    skip = draw(D, D, seed=4)
    d = formats.load(run(tmp_path, "layers.5.mlp", {"W_skip": skip}, transcode=True, skip_connection=True))
    assert (d.reads, d.writes) == (("mlp_in.5",), ("mlp_out.5",))
    assert near(d.forward(X), decoded(torch.relu(kept(pre(X, False), 4))) + X @ skip.double().T)
    there_and_back(d, tmp_path / "again" / "layers.5.mlp", "sparsify", X)


def test_sparsify_group_max_and_multi_top_k(tmp_path):
    d = formats.load(run(tmp_path, "layers.1", activation="groupmax"))
    groups = torch.relu(pre(X)).reshape(N, 4, F // 4)
    f = (groups * (groups == groups.max(-1, keepdim=True).values)).reshape(N, F)
    assert near(d.forward(X), decoded(f))
    assert isinstance(there_and_back(d, tmp_path / "again" / "layers.1", "sparsify", X).gate, GroupMax)
    multi = formats.load(run(tmp_path, "layers.2", multi_topk=True))
    assert multi.gate.multi
    assert there_and_back(multi, tmp_path / "again" / "layers.2", "sparsify", X).gate.multi


def test_sparsify_asks_and_refuses(tmp_path):
    path = run(tmp_path, "strange")
    with pytest.raises(Refused, match="site="):
        formats.load(path)
    assert formats.load(path, site="mlp_post.1").reads == ("mlp_post.1",)
    with pytest.raises(Refused, match="signed"):
        formats.load(run(tmp_path, "layers.1", signed=True))


# --- dictionary_learning

LINEAR = {"encoder.weight": ENC, "encoder.bias": B_ENC, "decoder.weight": DEC}
TOP = {**LINEAR, "b_dec": B_DEC, "k": torch.tensor(4, dtype=torch.int32), "threshold": torch.tensor(0.8)}
FLAT = {"W_enc": ENC.T.contiguous(), "W_dec": DEC.T.contiguous(), "b_enc": B_ENC, "b_dec": B_DEC}
R, GATE, MAG, THETA = draw(F, seed=5, scale=0.3), draw(F, seed=6), draw(F, seed=7), draw(F, seed=8).abs()


def thresholded(x):
    f = torch.relu(pre(x))
    return f * (f > 0.8)


def gated(x):
    pi = (x - B_DEC) @ ENC.double().T
    return ((pi + GATE) > 0) * torch.relu(R.double().exp() * pi + MAG)


CLASSES = {
    "AutoEncoder": ({**LINEAR, "bias": B_DEC}, lambda x: torch.relu(pre(x))),
    "AutoEncoderNew": ({**LINEAR, "decoder.bias": B_DEC}, lambda x: torch.relu(pre(x, False))),
    "GatedAutoEncoder": (
        {"encoder.weight": ENC, "decoder.weight": DEC, "decoder_bias": B_DEC, "r_mag": R, "gate_bias": GATE,
         "mag_bias": MAG},
        gated,
    ),
    "AutoEncoderTopK": (TOP, lambda x: torch.relu(kept(pre(x), 4))),
    "BatchTopKSAE": (TOP, thresholded),
    "MatryoshkaBatchTopKSAE": (
        {**FLAT, "k": TOP["k"], "threshold": TOP["threshold"], "group_sizes": torch.tensor([5, 15])}, thresholded,
    ),
    "JumpReluAutoEncoder": ({**FLAT, "threshold": THETA}, lambda x: pre(x, False) * (pre(x, False) > THETA)),
}  # fmt: skip


def trained(folder, kind, content, **trainer):
    put(folder / "ae.pt", content)
    base = {"dict_class": kind, "layer": 8, "lm_name": "m", "submodule_name": "resid_post_layer_8"}
    (folder / "config.json").write_text(json.dumps({"trainer": {**base, **trainer}, "buffer": {"ctx_len": 128}}))
    return folder


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_of_dictionary_learning(kind, tmp_path):
    content, code = CLASSES[kind]
    path = trained(tmp_path / "trainer_0", kind, content)
    assert formats.detect(path) == ["dictionary_learning"]
    d = formats.load(path)
    assert d.reads == d.writes == ("resid_post.8",)
    assert near(d.encode(X).dense(), code(X))
    assert near(d.forward(X), decoded(code(X)))
    formats.write(d, tmp_path / "again", "dictionary_learning", kind=kind)
    again = formats.load(tmp_path / "again")
    assert near(again.forward(X), decoded(code(X)))
    assert torch.equal(again.encode(X).counts(), d.encode(X).counts())


def test_checkpoints_find_the_configuration_above(tmp_path):
    trained(tmp_path / "t", "BatchTopKSAE", TOP, submodule_name="mlp_layer_8")
    file = put(tmp_path / "t" / "checkpoints" / "ae_100.pt", TOP)
    d = formats.load(file)
    assert d.reads == ("mlp_out.8",)
    assert near(d.forward(X), decoded(thresholded(X)))


def test_the_two_top_k_classes_share_their_tensors_so_the_question_is_asked(tmp_path):
    file = put(tmp_path / "ae.pt", TOP)
    with pytest.raises(Refused, match="kind="):
        formats.load(file, site="resid_post.8")
    with pytest.raises(Refused, match="site="):
        formats.load(file, kind="BatchTopKSAE")
    top = formats.load(file, site="resid_post.8", kind="AutoEncoderTopK")
    assert near(top.forward(X), decoded(torch.relu(kept(pre(X), 4))))
    unset = put(tmp_path / "unset.pt", {**TOP, "threshold": torch.tensor(-1.0)})
    d = formats.load(unset, site="resid_post.8", kind="BatchTopKSAE")
    assert isinstance(d.gate, BatchTopK)
    assert d.gate.whole_batch


def test_dictionary_learning_refuses_what_it_cannot_hold(tmp_path):
    d = formats.load(trained(tmp_path / "t", "AutoEncoderTopK", TOP))
    assert isinstance(d.gate, TopK)
    with pytest.raises(Refused, match="another gate"):
        formats.write(d, tmp_path / "x", "dictionary_learning", kind="JumpReluAutoEncoder")
    with pytest.raises(Refused, match="not known"):
        formats.load(trained(tmp_path / "u", "SomethingElse", TOP))


# --- Goodfire and the R1 dictionaries


@pytest.mark.parametrize(("end", "layer"), [("Any-8B-Instruct-SAE-l19.pth", 19), ("Any-SAE-l50.pt", 50)])
@pytest.mark.parametrize("names", ["linear", "short"])
def test_plain_linear_pairs(names, end, layer, tmp_path):
    e, d = ("encoder_linear", "decoder_linear") if names == "linear" else ("encoder", "decoder")
    content = {f"{e}.weight": ENC, f"{e}.bias": B_ENC, f"{d}.weight": DEC, f"{d}.bias": B_DEC}
    path = put(tmp_path / end, content)
    assert formats.detect(path) == ["goodfire"]
    made = formats.load(path)
    assert made.reads == (f"resid_post.{layer}",)
    assert near(made.forward(X), decoded(torch.relu(pre(X, False))))
    formats.write(made, tmp_path / "again" / end, "goodfire", names=names)
    assert near(formats.load(tmp_path / "again" / end).forward(X), made.forward(X))
    with pytest.raises(Refused, match="site="):
        formats.load(put(tmp_path / "nameless.pt", content))
