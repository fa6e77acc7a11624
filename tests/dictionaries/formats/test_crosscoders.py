"""Crosscoders of dictionary_learning's fork, formulas written out; and crosscoders of one block in other formats."""

from dataclasses import replace

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.dictionaries import formats
from cutaway.dictionaries.gates import BatchTopK, JumpRelu, TopK
from cutaway.dictionaries.norms import Scale
from cutaway.dictionaries.transforms import fold
from tests.dictionaries.common import dictionary
from tests.dictionaries.formats.common import D, F, N, acts, draw, near, there_and_back

L, NAME = 3, "dictionary_learning_crosscoder"
SITES = tuple(f"resid_post.{i}" for i in range(L))
X = {s: acts(seed=90 + i) for i, s in enumerate(SITES)}
STACKED = torch.stack(list(X.values()), 1).double()  # [token, layer, width], as that tool has them
NORMS = {"crosscoder": 1, "sae": 2, "mixed": 3, "none": 4, "decoupled": 5}


def saved(path, code=None, theta=None, normalised=False, prefix=""):
    """A file of the fork; returns its parts in double precision."""
    t = {"encoder.weight": draw(L, D, F, seed=1), "encoder.bias": draw(F, seed=2),
         "decoder.weight": draw(L, F, D, seed=3), "decoder.bias": draw(L, D, seed=4)}  # fmt: skip
    if code:
        t["code_normalization_id"] = torch.tensor(NORMS[code])
    if theta is not None:
        t |= {"k": torch.tensor(4, dtype=torch.int32), "threshold": torch.tensor(theta)}
        shape = (L, D)
        t |= {"activation_mean": draw(*shape, seed=5), "activation_std": draw(*shape, seed=6).abs()}
        t |= {"target_rms": torch.tensor(1.0), "activation_global_scale": torch.tensor(0.3 if normalised else 1.0)}
        if not normalised:
            t |= {n: torch.full(shape, torch.nan) for n in ("activation_mean", "activation_std")}
    path.mkdir()
    torch.save({prefix + n: v for n, v in t.items()}, path / "ae.pt")
    return {n: v.double() for n, v in t.items()}


def forward(t, code, theta, normalised, mix=(1.0, 0.1)):
    """What the fork computes: latents [token, layer, latent] in its unit of activations, and reconstructions."""
    x, g = STACKED, 0.3
    x = (x - t["activation_mean"]) * g if normalised else x
    f = torch.einsum("bld,ldf->bf", x, t["encoder.weight"]) + t["encoder.bias"]
    f, norms = f.relu()[:, None].expand(-1, L, -1), t["decoder.weight"].norm(dim=2)
    summed, joint = norms.sum(0), t["decoder.weight"].norm(dim=(0, 2))
    n = {"crosscoder": summed, "sae": joint, "mixed": mix[0] * joint + mix[1] * summed, "decoupled": norms}.get(
        code, torch.tensor(1.0).double()
    )
    if theta is not None:
        scaled = f * n
        floor = torch.tensor(theta).double().reshape(-1, 1)
        f = f * (scaled > floor)
    y = torch.einsum("blf,lfd->bld", f, t["decoder.weight"]) + t["decoder.bias"]
    return f * n, (y / (g + 1e-8) + t["activation_mean"] if normalised else y)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("code", ["crosscoder", "sae", "none", "mixed"])
def test_crosscoders_of_the_fork_with_a_threshold(code, normalised, tmp_path):
    theta = 20.0 if code != "none" else 4.0
    t = saved(tmp_path / "a", code, theta, normalised, prefix="_orig_mod." if normalised else "")
    assert formats.detect(tmp_path / "a") == [NAME]
    choices = {"sites": ",".join(SITES)} | ({"mix": (1.0, 0.1)} if code == "mixed" else {})
    d = formats.load(tmp_path / "a", **choices)
    assert len(d.blocks) == 1
    f, y = forward(t, code, theta, normalised)
    assert 0 < int((f > 0).sum()) < int((forward(t, code, -1.0, normalised)[0] > 0).sum())
    assert near(d.encode(X).dense(), f[:, 0])
    for i, s in enumerate(SITES):
        assert near(d.forward(X)[s], y[:, i])
    assert there_and_back(d, tmp_path / "b", NAME, X).gate.threshold == pytest.approx(theta)
    if code == "mixed":
        with pytest.raises(Refused, match="mix="):
            formats.load(tmp_path / "a", sites=SITES)


def test_decoupled_layers_have_thresholds_of_their_own(tmp_path):
    theta = [3.0, 6.0, 9.0]
    t = saved(tmp_path / "a", "decoupled", theta)
    d = formats.load(tmp_path / "a", sites=SITES)
    f, y = forward(t, "decoupled", theta, False)
    assert [b.writes for b in d.blocks] == [(s,) for s in SITES]
    for i, s in enumerate(SITES):
        assert near(d.encode(X, block=i).dense(), f[:, i])
        assert near(d.forward(X)[s], y[:, i])
    saved(tmp_path / "b", "decoupled", theta, normalised=True)
    with pytest.raises(Refused, match="normalises activations twice"):
        formats.load(tmp_path / "b", sites=SITES)


def test_crosscoders_of_the_fork_without_a_threshold(tmp_path):
    for code in (None, "sae"):  # older files have no id; for a ReLU norms do not matter
        t = saved(tmp_path / str(code), code)
        assert formats.detect(tmp_path / str(code)) == [NAME]
        d = formats.load(tmp_path / str(code), sites=list(SITES))
        f, y = forward(t, "none", None, False)
        assert near(d.encode(X).dense(), f[:, 0])
        assert near(d.forward(X)[SITES[1]], y[:, 1])
        there_and_back(d, tmp_path / f"{code}-again", NAME, X)
    t = saved(tmp_path / "unset", "crosscoder", -1.0)  # no threshold yet: the largest of the batch
    d = formats.load(tmp_path / "unset", sites=SITES)
    f, _ = forward(t, "crosscoder", -1.0, False)
    least = f[:, 0].reshape(-1).topk(4 * N).values[-1]
    assert near(d.encode(X).dense(), f[:, 0] * (f[:, 0] >= least))
    there_and_back(d, tmp_path / "unset-again", NAME, X)


def test_what_files_of_the_fork_leave_open_is_asked_for(tmp_path):
    saved(tmp_path / "a", None, 3.0)
    with pytest.raises(Refused, match="sites="):
        formats.load(tmp_path / "a")
    with pytest.raises(Refused, match="3 layers"):
        formats.load(tmp_path / "a", sites="resid_post.1,resid_post.2")
    with pytest.raises(Refused, match="code_normalization="):
        formats.load(tmp_path / "a", sites=SITES)
    t = saved(tmp_path / "b", "none", 3.0)
    assert near(formats.load(tmp_path / "a", sites=SITES, code_normalization="none").forward(X)[SITES[0]],
                forward(t, "none", 3.0, False)[1][:, 0])  # fmt: skip


def trained(gate, **settings):
    """A crosscoder as training leaves it: scaled, its gate aware of norms."""
    made = dictionary([(F, list(SITES), list(SITES))], dict.fromkeys(SITES, D), dtype=torch.float32)
    scales = {s: Scale(0.5 + i) for i, s in enumerate(SITES)}
    settings = {"norm_aware": True, "reading": scales, "writing": scales} | settings
    return replace(made, gates=(gate,) if gate else made.gates, **settings)


def test_crosscoders_trained_here_go_to_the_fork_and_back(tmp_path):
    for name, gate in (("relu", None), ("batch", BatchTopK(4, 0.9)), ("young", BatchTopK(4))):
        there_and_back(trained(gate), tmp_path / name, NAME, X)
    d = trained(JumpRelu(draw(F, seed=7).abs() + 0.1))
    formats.write(d, tmp_path / "jump", NAME, k=4)
    again = formats.load(tmp_path / "jump")
    assert near(again.forward(X)[SITES[2]], d.forward(X)[SITES[2]])
    assert torch.equal(again.encode(X).counts(), d.encode(X).counts())
    with pytest.raises(Refused, match="k=…"):
        formats.write(d, tmp_path / "x", NAME)


def test_crosscoders_trained_here_go_to_llamascopium_where_norms_do_not_matter(tmp_path):
    there_and_back(trained(None), tmp_path / "relu", "llamascopium", X)
    d = trained(BatchTopK(4, 0.9))
    with pytest.raises(Refused, match="all sites share one threshold"):
        formats.write(d, tmp_path / "x", "llamascopium")
    d = fold(d)
    rows = {s: w / w.norm(dim=1, keepdim=True) for s, w in d.decoder[0].items()}
    even = replace(d, decoder=(rows,))
    formats.write(even, tmp_path / "even", "llamascopium")
    again = formats.load(tmp_path / "even")
    for s in SITES:
        assert near(again.forward(X)[s], even.forward(X)[s])
    assert torch.equal(again.encode(X, block=1).counts(), even.encode(X).counts())


def test_crosscoders_that_do_not_fit_are_refused(tmp_path):
    causal = dictionary([(F, [SITES[0]], list(SITES))], dict.fromkeys(SITES, D))
    uneven = dictionary([(F, list(SITES), list(SITES))], dict(zip(SITES, (3, 4, 5), strict=True)))
    for d in (causal, uneven):
        with pytest.raises(Refused, match="all of one width"):
            formats.write(d, tmp_path / "x", NAME)
    with pytest.raises(Refused, match="of one width"):
        formats.write(uneven, tmp_path / "x", "llamascopium")
    for name in (NAME, "llamascopium"):
        with pytest.raises(Refused, match="no gate TopK"):
            formats.write(trained(TopK(3)), tmp_path / "x", name)
