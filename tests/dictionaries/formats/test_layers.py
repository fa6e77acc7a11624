"""circuit-tracer and llamascopium: sets, cross-layer transcoders, crosscoders; formulas written out."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from cutaway import dictionaries
from cutaway.core.refuse import Refused
from cutaway.dictionaries import formats
from cutaway.dictionaries.gates import BatchTopK, JumpRelu
from cutaway.dictionaries.norms import Scale
from cutaway.dictionaries.transforms import fold
from tests.dictionaries.common import dictionary
from tests.dictionaries.formats.common import D, F, acts, draw, kept, near, there_and_back

L = 3
X = {i: acts(seed=90 + i).double() for i in range(L)}


def seeded(name: int, i: int, *shape: int) -> torch.Tensor:
    return draw(*shape, seed=100 * name + i)


# --- circuit-tracer


def traced(folder, activation=None, skip=False, transposed=False, reads="hook_resid_mid", **config):
    """A per-layer set; returns its parts as well."""
    folder.mkdir()
    parts = []
    for i in range(L):
        t = {
            "W_enc": seeded(1, i, F, D),
            "W_dec": seeded(2, i, F, D),
            "b_enc": seeded(3, i, F),
            "b_dec": seeded(4, i, D),
        }
        if activation == "jumprelu":
            t["activation_function.threshold"] = seeded(5, i, F) - 0.5  # below 0 in places: negative values pass
        if skip:
            t["W_skip"] = seeded(6, i, D, D)
        if activation == "k":
            t["k"] = torch.tensor(4)
        parts.append({n: v.double() for n, v in t.items()})
        if transposed:
            t["W_dec"] = t["W_dec"].T.contiguous()
        save_file(t, folder / f"layer_{i}.safetensors")
    lines = {"model_name": "m", "model_kind": "transcoder_set", "feature_input_hook": reads,
             "feature_output_hook": "hook_mlp_out", "scan": "s", **config}  # fmt: skip
    (folder / "config.yaml").write_text("".join(f"{n}: {v}\n" for n, v in lines.items()))
    return folder, parts


def acting(t, x, activation):
    pi = x @ t["W_enc"].T + t["b_enc"]
    if activation == "jumprelu":
        return pi * (pi > t["activation_function.threshold"])
    return kept(pi, 4) if activation == "k" else torch.relu(pi)


def test_a_set_without_configuration_asks_for_everything_at_once(tmp_path):
    path, _ = traced(tmp_path / "a")
    (path / "config.yaml").unlink()
    with pytest.raises(Refused) as refusal:
        formats.load(path)
    assert refusal.value.instead == "say it: site=… target=…"
    assert "without a layer" in refusal.value.why
    with pytest.raises(Refused) as refusal:
        formats.load(path, activation="topk")
    assert refusal.value.instead == "say it: site=… target=… k=…"
    with pytest.raises(Refused, match=r"give mlp_in"):
        formats.load(path, site="mlp_in.3", target="mlp_out")
    assert formats.load(path, site="mlp_in", target="mlp_out").reads == tuple(f"mlp_in.{i}" for i in range(L))


@pytest.mark.parametrize("activation", [None, "jumprelu", "k"])
@pytest.mark.parametrize("skip", [False, True])
def test_sets_of_circuit_tracer(activation, skip, tmp_path):
    path, parts = traced(tmp_path / "a", activation, skip)
    assert formats.detect(path) == ["circuit_tracer"]
    d = formats.load(path)
    x = {f"resid_mid.{i}": X[i] for i in range(L)}
    out, codes = d.forward(x), d.encode(x).dense()
    for i, t in enumerate(parts):
        f = acting(t, X[i], activation)
        assert near(codes[:, i * F : (i + 1) * F], f)
        y = f @ t["W_dec"] + t["b_dec"]
        assert near(out[f"mlp_out.{i}"], y + X[i] @ t["W_skip"].T if skip else y)
    assert activation != "jumprelu" or bool((codes < 0).any())
    there_and_back(d, tmp_path / "b", "circuit_tracer", x)
    one = formats.load(path / "layer_1.safetensors")
    assert near(one.forward(X[1]), out["mlp_out.1"])


def test_mlps_are_entered_by_the_hook_that_circuit_tracer_runs(tmp_path):
    path, _ = traced(tmp_path / "a", reads="mlp.hook_in")
    formats.write(formats.load(path), tmp_path / "b", "circuit_tracer")
    assert '"feature_input_hook": "mlp.hook_in"' in (tmp_path / "b" / "config.yaml").read_text("utf-8")
    assert formats.load(tmp_path / "b").reads == tuple(f"mlp_in.{i}" for i in range(L))


def test_sets_in_other_words(tmp_path):
    old, parts = traced(tmp_path / "old", transposed=True)
    x = {f"resid_mid.{i}": X[i] for i in range(L)}
    y = acting(parts[2], X[2], None) @ parts[2]["W_dec"] + parts[2]["b_dec"]
    assert near(formats.load(old).forward(x)["mlp_out.2"], y)
    top, parts = traced(tmp_path / "top")
    y = kept(X[2] @ parts[2]["W_enc"].T + parts[2]["b_enc"], 4) @ parts[2]["W_dec"] + parts[2]["b_dec"]
    assert near(formats.load(top, activation="topk", k=4).forward(x)["mlp_out.2"], y)
    with pytest.raises(Refused, match="k="):
        formats.load(top, activation="topk")
    (top / "config.yaml").unlink()
    with pytest.raises(Refused, match="site="):
        formats.load(top)
    assert formats.load(top, site="mlp_in", target="mlp_out").reads == ("mlp_in.0", "mlp_in.1", "mlp_in.2")


def test_sets_that_read_the_norm_without_its_weight(tmp_path):
    path, parts = traced(tmp_path / "a", "jumprelu", skip=True, reads="ln2.hook_normalized")
    with pytest.raises(Refused, match="norm_weights="):
        formats.load(path)
    weights = {i: seeded(7, i, D).abs() + 0.5 for i in range(L)}
    d = formats.load(path, norm_weights=weights)
    out = d.forward({f"mlp_in.{i}": X[i] * weights[i] for i in range(L)})
    plain = formats.load(path, norm_weights="included").forward({f"mlp_in.{i}": X[i] for i in range(L)})
    for i, t in enumerate(parts):
        y = acting(t, X[i], "jumprelu") @ t["W_dec"] + t["b_dec"] + X[i] @ t["W_skip"].T
        assert near(out[f"mlp_out.{i}"], y)
        assert near(plain[f"mlp_out.{i}"], y)


@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_cross_layer_transcoders_of_circuit_tracer(jump, skip, tmp_path):
    path, parts = tmp_path / "a", []
    path.mkdir()
    for i in range(L):
        t = {"W_enc": seeded(1, i, F, D), "b_enc": seeded(3, i, F), "b_dec": seeded(4, i, D)}
        t |= {"threshold": seeded(5, i, F) - 0.5} if jump else {}
        t |= {"W_skip": seeded(6, i, D, D)} if skip else {}
        decoder = seeded(2, i, F, L - i, D)
        save_file({f"{n}_{i}": v for n, v in t.items()}, path / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": decoder}, path / f"W_dec_{i}.safetensors")
        parts.append({n: v.double() for n, v in {**t, "W_dec": decoder}.items()})
    words = "model_name: m\nmodel_kind: cross_layer_transcoder\nfeature_input_hook: hook_resid_mid\n"
    (path / "config.yaml").write_text(words + "feature_output_hook: hook_mlp_out\n")
    assert formats.detect(path) == ["circuit_tracer"]
    d = formats.load(path)
    x = {f"resid_mid.{i}": X[i] for i in range(L)}
    for m in range(L):
        y = parts[m]["b_dec"]
        for i in range(m + 1):
            pi = X[i] @ parts[i]["W_enc"].T + parts[i]["b_enc"]
            f = pi * (pi > parts[i]["threshold"]) if jump else torch.relu(pi)
            y = y + f @ parts[i]["W_dec"][:, m - i]
        y = y + X[m] @ parts[m]["W_skip"] if skip else y
        assert near(d.forward(x)[f"mlp_out.{m}"], y)
    there_and_back(d, tmp_path / "b", "circuit_tracer", x)
    (path / "W_dec_2.safetensors").unlink()
    with pytest.raises(Refused, match="missing"):
        formats.load(path)
    (path / "W_enc_2.safetensors").unlink()
    with pytest.raises(Refused, match="fetch all layers"):
        formats.load(path)


# --- llamascopium


def scoped(folder, tensors, **config):
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "sae_weights.safetensors")
    base = {"d_model": D, "expansion_factor": F / D, "act_fn": "relu", "norm_activation": "inference",
            "sparsity_include_decoder_norm": True, "top_k": 4}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**base, **config}))
    return folder


ONE = {"W_E": seeded(11, 0, D, F), "b_E": seeded(12, 0, F), "W_D": seeded(13, 0, F, D), "b_D": seeded(14, 0, D)}
LOG = "activation_function.log_jumprelu_threshold"
HOOKS = {"sae_type": "sae", "hook_point_in": "blocks.4.hook_resid_post", "hook_point_out": "blocks.4.hook_resid_post"}


def chosen(pi, act, n, theta):
    """What a gate of llamascopium makes of pre-activations; n are decoder norms."""
    scaled = pi * n
    passed = {"relu": scaled > 0, "topk": kept(torch.relu(scaled), 4) > 0, "jumprelu": scaled > theta}[act]
    return pi * passed


@pytest.mark.parametrize("act", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("how", ["inference", "dataset-wise", "token-wise"])
def test_autoencoders_of_llamascopium(how, aware, act, tmp_path):
    theta = seeded(15, 0, F).abs()
    tensors = ONE | ({LOG: theta.log()} if act == "jumprelu" else {})
    tensors["dataset_average_activation_norm.blocks.4.hook_resid_post"] = torch.tensor(5.0)
    config = {"act_fn": act, "norm_activation": how, "sparsity_include_decoder_norm": aware}
    path = scoped(tmp_path / "a", tensors, **HOOKS, **config)
    assert formats.detect(path) == ["llamascopium"]
    d = formats.load(path)
    assert d.reads == d.writes == ("resid_post.4",)
    x = X[0]
    s = {"inference": 1.0, "dataset-wise": D**0.5 / 5.0, "token-wise": D**0.5 / x.norm(dim=1, keepdim=True)}[how]
    pi = (x * s) @ ONE["W_E"].double() + ONE["b_E"]
    f = chosen(pi, act, ONE["W_D"].double().norm(dim=1) if aware else 1.0, theta)
    assert near(d.forward(x), (f @ ONE["W_D"].double() + ONE["b_D"]) / s)
    if how != "token-wise":
        there_and_back(d, tmp_path / "b", "llamascopium", x)


def test_llamascopium_asks_for_norms_that_no_file_tells(tmp_path):
    path = scoped(tmp_path / "a", ONE, **HOOKS, norm_activation="dataset-wise")
    with pytest.raises(Refused, match="average_norms="):
        formats.load(path)
    x, norms = X[0], ONE["W_D"].double().norm(dim=1)
    for given, s in (("folded", 1.0), ({"resid_post.4": 3.0}, D**0.5 / 3.0)):
        f = chosen((x * s) @ ONE["W_E"].double() + ONE["b_E"], "relu", norms, 0.0)
        y = (f @ ONE["W_D"].double() + ONE["b_D"]) / s
        assert near(formats.load(path, average_norms=given).forward(x), y)


def test_the_r1_dictionaries_of_llamascopium(tmp_path):
    theta = seeded(15, 0, F).abs()
    tensors = {"encoder.weight": ONE["W_E"].T, "encoder.bias": ONE["b_E"], "decoder.weight": ONE["W_D"].T,
               "decoder.bias": ONE["b_D"], "log_jumprelu_threshold": theta.log()}  # fmt: skip
    d = formats.load(scoped(tmp_path / "a", tensors, **HOOKS, act_fn="jumprelu", sparsity_include_decoder_norm=False))
    pi = X[0] @ ONE["W_E"].double() + ONE["b_E"]
    assert near(d.forward(X[0]), (pi * (pi > theta)) @ ONE["W_D"].double() + ONE["b_D"])


@pytest.mark.parametrize("act", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("aware", [False, True])
def test_cross_layer_transcoders_of_llamascopium(aware, act, tmp_path):
    ins, outs = [f"blocks.{i}.hook_resid_mid" for i in range(L)], [f"blocks.{i}.hook_mlp_out" for i in range(L)]
    theta = seeded(25, 0, L, F).abs()
    tensors = {"W_E": seeded(21, 0, L, D, F), "b_E": seeded(22, 0, L, F)}
    tensors |= {f"W_D.{m}": seeded(23, m, m + 1, F, D) for m in range(L)} | {
        f"b_D.{m}": seeded(24, m, D) for m in range(L)
    }
    tensors |= {LOG: theta.log()} if act == "jumprelu" else {}
    tensors |= {f"dataset_average_activation_norm.{h}": torch.tensor(2.0 + n) for n, h in enumerate([*ins, *outs])}
    path = scoped(tmp_path / "a", tensors, sae_type="clt", hook_points_in=ins, hook_points_out=outs, act_fn=act,
                  norm_activation="dataset-wise", sparsity_include_decoder_norm=aware)  # fmt: skip
    assert formats.detect(path) == ["llamascopium"]
    d = formats.load(path)
    x, t = {f"resid_mid.{i}": X[i] for i in range(L)}, {n: v.double() for n, v in tensors.items()}
    fs = []
    for i in range(L):
        norm = sum(t[f"W_D.{m}"][i].pow(2).sum(1) for m in range(i, L)).sqrt() if aware else 1.0
        fs.append(chosen((X[i] * D**0.5 / (2.0 + i)) @ t["W_E"][i] + t["b_E"][i], act, norm, theta[i]))
    for m in range(L):
        y = sum(fs[i] @ t[f"W_D.{m}"][i] for i in range(m + 1)) + t[f"b_D.{m}"]
        assert near(d.forward(x)[f"mlp_out.{m}"], y / (D**0.5 / (2.0 + L + m)))
    there_and_back(d, tmp_path / "b", "llamascopium", x)


@pytest.mark.parametrize("act", ["relu", "jumprelu", "topk"])
def test_crosscoders_of_llamascopium_gate_each_site_for_itself(act, tmp_path):
    hooks, theta = [f"blocks.{i}.hook_resid_post" for i in range(L)], seeded(35, 0, F).abs()
    tensors = {"W_E": seeded(31, 0, L, D, F), "b_E": seeded(32, 0, L, F), "W_D": seeded(33, 0, L, F, D),
               "b_D": seeded(34, 0, L, D)} | ({LOG: theta.log()} if act == "jumprelu" else {})  # fmt: skip
    path = scoped(tmp_path / "a", tensors, sae_type="crosscoder", hook_points=hooks, act_fn=act)
    d = formats.load(path)
    t, x = {n: v.double() for n, v in tensors.items()}, {f"resid_post.{i}": X[i] for i in range(L)}
    pi = sum(X[i] @ t["W_E"][i] + t["b_E"][i] for i in range(L))
    for i in range(L):
        f = chosen(pi, act, t["W_D"][i].norm(dim=1), theta)
        assert near(d.forward(x)[f"resid_post.{i}"], f @ t["W_D"][i] + t["b_D"][i])
    counts = [int(d.encode(x, block=i).counts().sum()) for i in range(len(d.blocks))]
    assert len(d.blocks) == (1 if act == "relu" else L)
    assert (len(set(counts)) > 1) == (act == "jumprelu")
    there_and_back(d, tmp_path / "b", "llamascopium", x)


# --- a threshold found by BatchTopK, where formats know JumpReLUs


def test_the_transcoders_that_ship_go_to_circuit_tracer_and_back(tmp_path):
    d = dictionaries.load("miniworld/transcoders")
    assert all(isinstance(g, BatchTopK) for g in d.gates)
    x = {s: acts(d.width(s), seed=i) * 4 for i, s in enumerate(d.reads)}
    there_and_back(d, tmp_path / "a", "circuit_tracer", x)


JUMPING = [
    "gemma_scope",
    "gemma_scope_2",
    "llama_scope",
    "llamascopium",
    "saelens",
    "saelens_old",
    "dictionary_learning",
]


@pytest.mark.parametrize("name", JUMPING)
def test_a_threshold_of_a_batch_is_written_for_every_latent(name, tmp_path):
    d = dictionary([(F, ["resid_post.1"], ["resid_post.1"])], {"resid_post.1": D}, dtype=torch.float32)
    d = replace(d, gates=(BatchTopK(3, 0.7),), reading={"resid_post.1": Scale(1.5)}, norm_aware=True)
    pi = d.pre_activations(0, X[0])
    f = pi * (pi > 0.7)
    assert 0 < int((f != 0).sum()) < int((pi > 0).sum())
    assert near(fold(d).encode(X[0]).dense(), f)
    formats.write(d, tmp_path / "a", name, **({"kind": "JumpReluAutoEncoder"} if name.endswith("learning") else {}))
    again = formats.load(tmp_path / "a", **({"site": "resid_post.1"} if name == "gemma_scope" else {}))
    assert isinstance(again.gate, JumpRelu)
    assert near(again.forward(X[0]), d.forward(X[0]))
    assert near(again.encode(X[0]).dense(), f)
    with pytest.raises(Refused, match="BatchTopK without a threshold"):
        formats.write(replace(d, gates=(BatchTopK(3),)), tmp_path / "b", "gemma_scope")


def test_what_these_formats_cannot_hold_is_refused(tmp_path):
    widths = {f"{s}.{i}": 3 for s in ("mlp_in", "mlp_out") for i in range(3)}
    apart = dictionary([(4, ["mlp_in.1"], ["mlp_out.1"]), (4, ["mlp_in.0"], ["mlp_out.0"])], widths)
    for name in ("circuit_tracer", "llamascopium", "gemma_scope_2"):
        with pytest.raises(Refused, match="the format holds"):
            formats.write(apart, tmp_path / name, name)
    gated = dictionary([(4, ["mlp_in.0"], ["mlp_out.0"])], widths, "gated")
    top = dictionary([(4, ["mlp_in.0"], ["mlp_out.0"])], widths, "topk")
    for d, name in ((gated, "circuit_tracer"), (gated, "llamascopium"), (top, "circuit_tracer")):
        with pytest.raises(Refused, match="no gate"):
            formats.write(d, tmp_path / "x", name)
    with pytest.raises(Refused, match="all layers together"):
        formats.load(scoped(tmp_path / "l", ONE, **HOOKS, act_fn="layertopk"))
    with pytest.raises(Refused, match="depends on the batch"):
        formats.load(scoped(tmp_path / "b", ONE, **HOOKS, norm_activation="batch-wise"))
