"""Loss recovered by splicing, against a slow reference in plain torch."""

from dataclasses import replace

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.dictionaries import autoencoder, one_block
from cutaway.dictionaries.evaluation.loss import splice_loss
from cutaway.dictionaries.gates import AbsTopK, BatchTopK, Relu
from cutaway.models.edits.library import Replace
from tests.conformance.subjects import family

SITE = "resid_post.1"


def identity(width: int, k: int | None = None, scale: float = 1.0):
    """A dictionary that gives activations back (times `scale`)."""
    eye = torch.eye(width)
    return autoencoder(SITE, eye, eye * scale, torch.zeros(width), torch.zeros(width), AbsTopK(k or width))


def prompts() -> torch.Tensor:
    return torch.randint(3, 100, (5, 9), generator=generator(0))


@pytest.fixture(scope="module")
def model():
    return family("llama")


def reference(model, ids, site_value, special):
    """Cross-entropy and KL by hand, with a forward hook on the second block."""
    target = ids[:, 1:]
    keep = ~special

    def hook(module, inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        new = torch.where(keep[..., None], site_value(x), x)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with torch.no_grad():
        clean = model.hf(ids).logits[:, :-1].log_softmax(-1)
        handle = model.hf.model.layers[1].register_forward_hook(hook)
        logs = model.hf(ids).logits[:, :-1].log_softmax(-1)
        handle.remove()
    counted = keep[:, :-1]
    ce = [-(v.gather(-1, target[..., None])[..., 0])[counted].mean() for v in (clean, logs)]
    kl = (clean.exp() * (clean - logs)).sum(-1)[counted].mean()
    return float(ce[0]), float(ce[1]), float(kl)


def test_losses_are_those_of_a_slow_reference(model):
    ids = prompts()
    special = torch.zeros_like(ids, dtype=torch.bool)
    special[:, 0] = True
    d = identity(32, k=6)
    got = splice_loss(model, d, ids, special=special, batch=2)
    acts = model.capture(ids, SITE)[SITE]
    mean = acts[~special].mean(0)
    clean, spliced, kl = reference(model, ids, lambda x: d.forward(x), special)
    zero, kl_zero = reference(model, ids, torch.zeros_like, special)[1:]
    flat, kl_mean = reference(model, ids, lambda x: mean.expand_as(x), special)[1:]
    want = {
        "CE clean": clean, "CE spliced": spliced, "ΔCE": spliced - clean, "KL spliced": kl, "CE zero-ablated": zero,
        "CE recovered (zero)": (zero - spliced) / (zero - clean), "KL recovered (zero)": 1 - kl / kl_zero,
        "CE mean-ablated": flat, "CE recovered (mean)": (flat - spliced) / (flat - clean),
        "KL recovered (mean)": 1 - kl / kl_mean,
    }  # fmt: skip
    assert got.labels["score"] == list(want)
    assert got.score.tolist() == pytest.approx(list(want.values()), rel=2e-4, abs=2e-5)
    assert got.record["special tokens left alone"] == 5
    assert got.record["predictions"] == 35
    assert (got.interval[:, 0] <= got.score + 1e-5).all()


def test_a_perfect_dictionary_recovers_everything_and_a_zero_one_nothing(model):
    got = splice_loss(
        model, identity(32), prompts(), null=[identity(32, scale=0.0)], control={"half": identity(32, scale=0.5)}
    )
    for a in ("zero", "mean"):
        assert got[f"CE recovered ({a})"].value == pytest.approx(1, abs=1e-4)
        assert got[f"KL recovered ({a})"].value == pytest.approx(1, abs=1e-4)
    assert got["KL recovered (zero)"].null[0] == pytest.approx(0, abs=1e-4)
    assert 0 < got["KL spliced"].control["half"] < got["KL spliced"].null[0]
    assert got.labels["control"] == ["half"]


def test_a_crosscoder_of_two_layers_is_replaced_in_a_second_pass(model):
    ids, sites = prompts(), ("resid_post.0", SITE)
    eye, zero = torch.eye(32), torch.zeros(32)
    half = dict.fromkeys(sites, eye / 2)  # reads the mean of both, writes it to both
    d = one_block(half, dict.fromkeys(sites, eye), zero, dict.fromkeys(sites, zero), AbsTopK(32))
    got = splice_loss(model, d, ids, batch=2, control={"half": replace(d, decoder=(half,))})
    acts = model.capture(ids, list(sites))
    mean = (acts[sites[0]] + acts[sites[1]]) / 2
    logs = model.run(ids, [Replace(s, mean) for s in sites])[:, :-1].log_softmax(-1)
    want = -logs.gather(-1, ids[:, 1:, None]).mean()
    assert got["CE spliced"].value == pytest.approx(float(want), rel=1e-4)
    assert "clean run" in got.record["splice"]
    assert got.control.shape[1] == 1
    whole = replace(d, gates=(BatchTopK(3),))
    with pytest.raises(Refused, match="threshold"):
        splice_loss(model, whole, ids)
    names = {s: f"a:{s}" for s in sites}
    two = one_block({names[s]: t for s, t in half.items()}, dict.fromkeys(names.values(), eye), zero,
                    dict.fromkeys(names.values(), zero), AbsTopK(32))  # fmt: skip
    with pytest.raises(Refused, match="name models"):
        splice_loss(model, two, ids)


def test_padding_and_special_tokens_do_not_count(model):
    short = [[1, 5, 6, 7], [1, 9, 8]]
    from cutaway.models.tokens import batch

    got = splice_loss(model, identity(32, k=4), batch(short, pad=0))
    both = [splice_loss(model, identity(32, k=4), torch.tensor([r])) for r in short]
    weights = [b.record["predictions"] for b in both]
    assert got.record["predictions"] == sum(weights)
    for name in ("CE clean", "CE spliced", "KL spliced", "CE zero-ablated"):
        mean = sum(w * b[name].value for w, b in zip(weights, both, strict=True)) / sum(weights)
        assert got[name].value == pytest.approx(mean, rel=1e-4)
    assert both[0].reasons


def test_refusals(model):
    with pytest.raises(Refused, match="no prediction"):
        splice_loss(model, identity(32), torch.tensor([[5]]))
    whole = autoencoder(SITE, torch.eye(32), torch.eye(32), torch.zeros(32), torch.zeros(32), BatchTopK(3))
    with pytest.raises(Refused, match="threshold"):
        splice_loss(model, whole, prompts())
    wide = autoencoder(SITE, torch.eye(8), torch.eye(8), torch.zeros(8), torch.zeros(8), Relu())
    with pytest.raises(Refused):
        splice_loss(model, wide, prompts())
