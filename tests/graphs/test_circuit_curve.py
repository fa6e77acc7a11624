"""Curves of feature circuits: against runs in which every site is put together by hand, from first to last."""

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.dictionaries.gates import JumpRelu
from cutaway.dictionaries.transforms import autoencoder
from cutaway.graphs import circuit_curve, feature_circuit
from cutaway.models.edits.library import Replace
from tests.conformance import subjects
from tests.graphs.test_feature_circuit import SITES, model, planted, saes, task, transcoder

SOME = ("resid_pre.0", "attn_out.0", "resid_post.0", "attn_out.1")


def mixed(name):
    """Autoencoders and a transcoder, whose block reads another site than it writes."""
    return [*saes(name, "relu", SOME), transcoder(name)]


def by_hand(m, ds, bound, kept, errors, how):
    """The metric with only some latents (block, number) and errors (block) as they are."""
    given = m.capture(bound.clean if how == "clean_mean" else bound.corrupt, [*list(SITES), "mlp_in.1"])
    edits = []
    for b, d in enumerate(ds):
        read, site = d.reads[0], d.writes[0]
        now = m.capture(bound.clean, [read, site], edits=edits)

        def nodes(acts, d=d, read=read, site=site):
            f = d.encode({read: acts[read].flatten(0, 1)}).dense().reshape(*acts[read].shape[:2], -1)
            return f, acts[site] - f @ d.decoder[0][site] - d.b_dec[site]

        (f, e), (f_out, e_out) = nodes(now), (x.mean(0) * (how != "zero") for x in nodes(given))
        inside = torch.tensor([(b, i) in kept for i in range(d.n_latents)])
        x = torch.where(inside, f, f_out) @ d.decoder[0][site] + d.b_dec[site] + (e if b in errors else e_out)
        edits.append(Replace(site, x))
    return bound.metric(m.run_last(bound.clean, edits)).mean()


@pytest.mark.parametrize(
    ("name", "errors", "how"),
    [
        ("gpt2", "default", "corrupt_mean"),
        ("gpt2", "keep", "zero"),
        ("llama_gqa", "keep", "corrupt_mean"),
        ("gemma2", "remove", "clean_mean"),
    ],
)
def test_circuits_by_hand(name, errors, how):
    m, ds, bound = model(name), mixed(name), task().bind(model(name))
    c = circuit_curve(m, task(), ds, sizes=3, errors=errors, baseline=how, samples=2)
    assert "too few to split" in c.record["split"]
    every, blocks = {(b, i) for b, d in enumerate(ds) for i in range(d.n_latents)}, set(range(len(ds)))
    whole, none = bound.metric(m.run_last(bound.clean)).mean(), by_hand(m, ds, bound, set(), set(), how)
    assert float(c.whole) == pytest.approx(float(whole), abs=1e-5)
    assert float(c.empty) == pytest.approx(float(none), abs=1e-5)
    graph = feature_circuit(m, task(), ds, nodes=0.0, edges=0.0, audit=0)
    order = [n for _, n in sorted(zip(-graph.effect[:-1].abs(), graph.nodes[:-1], strict=True), key=lambda x: x[0])]
    order = [n for n in order if errors == "default" or hasattr(n, "index")]
    for k, faithful, complete in zip(c.labels["step"], c.faithfulness, c.completeness, strict=True):
        first = order[: int(k)]
        latents = {(n.block, n.index) for n in first if hasattr(n, "index")}
        left = {n.block for n in first if not hasattr(n, "index")}
        inside, outside = {"default": (left, blocks - left), "keep": (blocks, blocks), "remove": (set(), set())}[errors]
        for value, kept, held in ((faithful, latents, inside), (complete, every - latents, outside)):
            want = (by_hand(m, ds, bound, kept, held, how) - none) / (whole - none)
            assert float(value) == pytest.approx(float(want), abs=1e-4)
    only = (by_hand(m, ds, bound, set(), blocks, how) - none) / (whole - none)
    assert float(c.errors_only) == pytest.approx(float(only), abs=1e-4)


def test_all_nodes_are_the_model_and_no_nodes_are_the_baseline():
    c = circuit_curve(model("gpt2"), task(), mixed("gpt2"), samples=2)
    assert c.labels["step"][0] == "0"
    assert c.labels["step"][-1] == str(4 * 7 + 7)
    assert c.faithfulness[[0, -1]].tolist() == pytest.approx([0.0, 1.0], abs=1e-5)
    assert c.completeness[[0, -1]].tolist() == pytest.approx([1.0, 0.0], abs=1e-5)
    assert c.null[-1].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert c.threshold[1:].diff().max() <= 0
    kept = circuit_curve(model("gpt2"), task(), mixed("gpt2"), samples=2, errors="keep")
    assert float(kept.faithfulness[0]) == pytest.approx(float(c.errors_only), abs=1e-6)


def identity(site, width):
    eye, zeros = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    return autoencoder(site, eye, eye, zeros, zeros, JumpRelu(torch.full_like(zeros, -torch.inf), signed=True))


def test_with_a_dictionary_that_is_the_identity_latents_are_neurons():
    ds = [identity(site, model("gpt2").shape.d_model) for site in ("resid_pre.0", "mlp_out.0", "attn_out.1")]
    c = circuit_curve(model("gpt2"), task(), ds, errors="keep", samples=2)
    assert torch.allclose(c.faithfulness, c.neurons, atol=1e-5)
    assert c.record["nodes"]["neurons"] == 3 * model("gpt2").shape.d_model


def test_a_planted_latent_is_the_circuit():
    """The metric reads one latent's direction: that node alone is faithful, without it nothing is left."""
    d, asked = planted()
    c = circuit_curve(model("llama_gqa"), asked, [d], samples=8)
    assert c.faithfulness[1:].tolist() == pytest.approx([1.0] * (len(c.faithfulness) - 1), abs=1e-5)
    assert c.completeness[1:].tolist() == pytest.approx([0.0] * (len(c.faithfulness) - 1), abs=1e-5)
    assert float(c.errors_only) == pytest.approx(0.0, abs=1e-5)
    assert float(c.null[1].mean()) < 0.6


def test_prompts_of_several_lengths_have_baselines_of_their_own():
    m = model("gpt2")
    uneven, even = subjects.numbered_task(uneven=True), task()
    both = type(even)("both", (*uneven.pairs, *even.pairs[1:]))
    c = circuit_curve(m, both, saes("gpt2"), sizes=2, samples=2)
    assert c.faithfulness[[0, -1]].tolist() == pytest.approx([0.0, 1.0], abs=1e-4)


def test_a_baseline_that_is_the_run_itself_is_refused():
    one = type(task())("one", task().pairs[:1])
    with pytest.raises(Refused, match="the same with all nodes"):
        circuit_curve(model("gpt2"), one, saes("gpt2"), baseline="clean_mean", samples=1)
