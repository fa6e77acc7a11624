"""Scores of edges against loops of edits and gradients by hand, against each other, and where they must agree."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.circuits.alternatives import alternatives
from cutaway.circuits.edge_effects import measured
from cutaway.circuits.edge_estimates import Backward, estimated
from cutaway.circuits.edge_scores import inclusion
from cutaway.core.refuse import Refused
from cutaway.models.access.reader_gradients import reader_gradients
from cutaway.models.edits.edge_mask import places_written, written
from cutaway.models.edits.library import Add, Replace
from cutaway.models.edits.wiring import wiring
from cutaway.models.sweep.masks import sweep_masks
from tests.circuits.made import FAMILIES, bound, changes, model, norm_of
from tests.circuits.made import written as by_hand
from tests.conformance import subjects
from tests.patching.made import straight

ESTIMATES = ("eap", "eap_ig", "eap_ig_activations", "clean_corrupted", "relp")


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((got - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_measured_edges_are_those_of_a_loop_of_edits(name):
    """One edge after the other: the reader's input of the clean run with the writer's change in it, behind its norm."""
    m, b = model(name), bound(model(name))
    w, delta = wiring(m), changes(m, b)
    streams = m.capture(b.clean, ["resid_pre", "resid_post"] + (["resid_mid"] if not m.anatomy.parallel else []))
    before, want, some = m.measure(b.clean, b.measure), [], [*range(0, len(w.pairs), 5), len(w.pairs) - 1]
    for u, v in w.pairs[some].tolist():
        reader = w.readers[v]
        norm, stream = norm_of(m, reader)
        x = streams[stream] + delta[u]
        where = stream if reader.layer is None else reader
        with torch.no_grad():
            edit = Replace(where, x if norm is None else norm(x))
        want.append(before - m.measure(b.clean, b.measure, edit))
    given = alternatives(m, b, places_written(w), "corrupt")
    got = measured(m, w, given, some)[0]
    assert close(got, torch.stack(want))
    assert len({round(float(x), 6) for x in got[:, 0]}) > len(some) / 2


def gradients_by_hand(m, b, edits=()):
    """Gradients at each reader's own input, and autograd through the norm's own module, reader by reader."""
    sites = ["q_in", "k_in", "v_in", "mlp_in", f"resid_post.{m.shape.n_layers - 1}"]
    _, slopes, _ = m.gradients(b.clean, sites, b.measure, edits)
    streams = m.capture(b.clean, ["resid_pre"] + (["resid_mid"] if not m.anatomy.parallel else []), edits)
    columns = []
    for reader in wiring(m).readers:
        norm, stream = norm_of(m, reader)
        slope = slopes[stream if reader.layer is None else str(reader)]
        if norm is not None:
            x = streams[stream].clone().requires_grad_(True)
            slope = torch.autograd.grad(norm(x), x, slope)[0]
        columns.append(slope * b.clean.mask[..., None])
    return columns


@pytest.mark.parametrize("name", FAMILIES)
def test_estimates_are_changes_times_gradients_by_hand(name):
    m, b = model(name), bound(model(name), (6, 4))
    w, delta, columns = wiring(m), changes(m, b), gradients_by_hand(m, b)
    want = torch.stack([(delta[u] * columns[v]).sum((1, 2)) for u, v in w.pairs.tolist()], 1)
    places = places_written(w)

    def gradients(some, stand):
        with m.edited():
            return Backward.of(places, [reader_gradients(m.anatomy, some.clean, some.measure, places)])

    got = estimated(m, w, alternatives(m, b, places, "corrupt"), gradients)
    assert close(got.each, want)
    length = torch.stack([d.square().sum(-1) for d in delta])[w.pairs[:, 0]]
    steep = torch.stack([c.square().sum(-1) for c in columns])[w.pairs[:, 1]]
    assert close(got.variance, (length * steep).sum((1, 2)) / m.shape.d_model / len(b) ** 2, 1e-4)


def test_gradients_by_a_mask_are_the_estimate_and_integrate_finite_differences():
    m, task = subjects.random_llama(), subjects.llama_task(2)
    w, b = wiring(m), task.bind(m)
    one = ca.circuits.mask_gradients(m, task, steps=1, audit=0, samples=1)
    assert close(one.score, ca.circuits.eap(m, task, audit=0).score, 1e-4)
    values, e = written(m, m.capture(b.corrupt, places_written(w))), 2e-3
    some, masks = [3, 20, 81], []
    for k in (1, 2):
        for u, v in w.pairs[some].tolist():
            for sign in (e, -e):
                masks.append(torch.full(w.heard.shape, k / 2))
                masks[-1][u, v] += sign
    ends = sweep_masks(m, w, b.clean, masks, values, b.measure).mean(1).reshape(2, len(some), 2)
    slopes = ((ends[..., 0] - ends[..., 1]) / (2 * e)).mean(0)
    two = ca.circuits.mask_gradients(m, task, steps=2, audit=0, samples=1)
    torch.testing.assert_close(two.score[some], slopes, atol=2e-4, rtol=0.01)


def test_information_flow_by_hand():
    """Each writer's part in the 1-norm, token by token; the first is left out."""
    m, task = subjects.random_llama(), subjects.uneven_task()
    b, w = task.bind(m), wiring(m)
    prompts = ca.tasks.as_prompts([p.clean for p in b.pairs])
    found, adds = ca.circuits.information_flow(m, prompts), by_hand(m, w, b.clean)
    streams = m.capture(b.clean, ["resid_pre", "resid_mid", "resid_post"])
    matrix = found.matrix()
    for v in (0, 8, 12, len(w.readers) - 1):
        x, heard = streams[norm_of(m, w.readers[v])[1]], w.heard[:, v].nonzero()[:, 0].tolist()
        near = torch.stack([(x.abs().sum(-1) - (x - adds[u]).abs().sum(-1)).clamp_min(0) for u in heard])
        parts = [(near / near.sum(0))[:, i, 1:n].mean(1) for i, n in enumerate(b.clean.lengths.tolist())]
        assert close(matrix[heard, v], torch.stack(parts).mean(0))
    assert matrix.nansum(0).tolist() == pytest.approx([1.0] * len(w.readers), abs=1e-5)


@pytest.mark.parametrize("name", ESTIMATES)
def test_without_curvature_every_estimate_is_the_measured_score(name):
    """No norms, no activation functions, and patterns that are the same in every run."""
    found = getattr(ca.circuits, name)(straight(), subjects.llama_task(3), audit=10_000)
    assert close(found.score, found.exact, 1e-4)
    assert found.agreement[:2].tolist() == pytest.approx([1.0, 1.0], abs=1e-3)


def test_estimates_are_tied_to_each_other():
    m, task = subjects.random_llama(), subjects.uneven_task()
    noise, denoise = (ca.circuits.eap(m, task, direction=d, audit=0).score for d in ("noise", "denoise"))
    assert close(ca.circuits.eap_ig(m, task, steps=1, audit=0).score, denoise)
    assert close(ca.circuits.clean_corrupted(m, task, audit=0).score, (noise + denoise) / 2)
    assert not close(noise, denoise, 0.1)


def test_integrated_gradients_are_means_of_gradients_by_hand_from_the_corrupt_inputs_on():
    m, task = subjects.random_llama(), subjects.uneven_task()
    w, b = wiring(m), task.bind(m)
    delta, far = changes(m, b), changes(m, b)[0]
    runs = [gradients_by_hand(m, b, Add("resid_pre.0", (1 - k / 3) * far)) for k in range(3)]
    want = [sum(float((delta[u] * columns[v]).sum()) for columns in runs) / 3 for u, v in w.pairs.tolist()]
    assert close(ca.circuits.eap_ig(m, task, steps=3, audit=0).score, -torch.tensor(want) / len(b), 1e-4)


def test_edges_into_the_logits_are_paths_past_frozen_heads_and_mlps():
    m, task = subjects.random_llama(), subjects.llama_task(2)
    edges = ca.circuits.exact(m, task, writers="z", readers="logits")
    paths = ca.patching.path(m, task, freeze_mlps=True, null_cells=1)
    assert close(edges.score, -paths.effect.flatten())


def test_with_many_steps_a_writers_way_is_its_whole_effect():
    """The products of a writer with all readers, integrated on its own way, add up to what patching it does."""
    m, task = subjects.random_llama(), subjects.llama_task(2)
    found = ca.circuits.eap_ig_activations(m, task, steps=400, audit=0)
    patched = ca.patching.activation(m, task, site="mlp_out", by="auto", direction="noise", null_cells=1)
    edges = found.select(edge=[e for e in found.labels["edge"] if e.startswith("mlp_out.1→")])
    assert float(edges.score.sum()) == pytest.approx(-float(patched.effect[1].sum()), rel=0.02)


@pytest.mark.parametrize("how", ["zero", "mean", "position_mean", "resample"])
def test_values_that_stand_in_are_those_of_ablation(how):
    """Edges from the last MLP and heads to the logits, all at once to first order in a model that is linear there."""
    m, task = straight(), subjects.llama_task(3)
    edges = ca.circuits.exact(m, task, how=how, writers="mlp_out.1", readers="logits")
    whole = ca.patching.ablate(m, task, site="mlp_out", how=how, layers=(1,), samples=2)
    assert close(edges.score, -whole.effect, 1e-4)


def test_edges_are_named_chosen_and_drawn():
    found = ca.circuits.exact(subjects.random_llama(), subjects.llama_task(2), writers="z.0, embed", readers="k_in.1.1")
    assert found.labels["edge"] == [f"{u}→k_in.1.1" for u in ("embed", "z.0.0", "z.0.1", "z.0.2", "z.0.3")]
    top = found.score.abs().argmax()
    assert found.mask(1).nonzero().tolist() == [[int(found.writer[top]), int(found.reader[top])]]
    assert found.matrix()[found.writer, found.reader].tolist() == found.score.tolist()
    assert found.graph(2).edge_names() == [found.labels["edge"][i] for i in found.score.abs().topk(2).indices]


def test_the_share_of_resamples_counts_the_largest_means():
    each = torch.tensor([[3.0, 2.0, 0.0], [3.0, 0.0, 2.0], [3.0, 0.0, 2.0]])
    always, seldom, often = inclusion(each, 2 / 3, 0).tolist()
    assert always == 1
    assert seldom + often == pytest.approx(1, abs=1e-6)
    assert seldom == pytest.approx(7 / 27, abs=0.1)  # most of the draws are of the first prompt


def test_refusals():
    m, task = subjects.random_llama(), subjects.llama_task(2)
    with pytest.raises(Refused, match="bring an answer back"):
        ca.circuits.eap(m, task, how="zero", direction="denoise")
    with pytest.raises(Refused, match="a mean needs a run"):
        ca.circuits.eap_ig(m, task, steps=0)
    with pytest.raises(Refused, match="there is none"):
        ca.circuits.exact(m, task, writers="z.1", readers="q_in.0")
