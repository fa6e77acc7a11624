"""Methods on readouts other than the last logits: against plain runs, central differences, and models without error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cutaway as ca
from cutaway.core.address import Address
from cutaway.core.record import counting
from cutaway.core.refuse import Refused
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.patching import activation, attribution, attribution_star, causal_trace, knockout, knockout_curve, path
from cutaway.patching import relevance as relp
from cutaway.tasks.pair import Pair
from cutaway.tasks.readouts import Readout
from cutaway.tasks.task import Task
from tests.conformance import subjects
from tests.models.common import noise
from tests.models.tiny import V, build
from tests.patching.made import alike, straight

NAMES = ("cross_entropy", "sequence_log_prob", "along", "neuron", "latent", "everywhere", "own")


def far(name: str) -> Model:
    """A tiny random model of a family, its weights so large that effects are no rounding."""
    model = Model(build(name), subjects.word_tokenizer(V), f"far-{name}")
    with torch.no_grad():
        for p in model.hf.parameters():
            p.mul_(4.0 if p.ndim > 1 else 1.0)
    return model


def readout(name: str, model: Model, layer: int = 1) -> Any:
    """A readout of each kind, at the last position, another, or all of them."""
    site, d = f"resid_post.{layer}", model.shape.d_model
    match name:
        case "along":
            return ca.tasks.activation(f"{site}@-1", noise(d))
        case "neuron":
            return ca.tasks.activation(f"mlp_post.{layer}.3@2")
        case "everywhere":
            return ca.tasks.activation(f"z.{layer}.1", noise(model.shape.d_head))
        case "latent":
            return ca.dictionaries.latent(subjects.dictionary(d, site), 5)
        case "own":
            own = lambda acts, *_: acts[site][:, 0].tanh().sum(-1) - acts["z.0.2@-1"].pow(2).sum(-1)  # noqa: E731
            return Readout("own", own, "mine", True, "of two places", reads=(site, "z.0"))
    return name


def task_of(name: str, model: Model, task: Task, layer: int = 1) -> Task:
    """The task under a readout; of whole answers with answers of one, two and three tokens."""
    if name == "sequence_log_prob":
        more = [("", ""), (" w11", " w12"), (" w13 w14", " w15 w16")]
        task = replace(task, pairs=[
            Pair(p.clean, p.corrupt, f" {p.answer}{a}", f" {p.foil}{f}", joined=True)
            for p, (a, f) in zip(task.pairs, more, strict=True)
        ])  # fmt: skip
    return replace(task, metric=readout(name, model, layer))


def by_hand(name: str, model: Model, t: Tokens, edits: list[Edit], answers: list[list[int]], layer: int = 1) -> Tensor:
    """The readout of every prompt from the plain activations and logits of one run."""
    acts, site = model.capture(t, ["resid_post", "mlp_post", "z", "logits"], edits), f"resid_post.{layer}"
    out = []
    for i in range(len(t)):
        first, n = int(t.column(0)[i]), int(t.lengths[i])
        x = {a: acts[a][i, first : first + n].double() for a in acts}
        said = x["logits"].log_softmax(-1)
        ids = t.ids[i, first : first + n].tolist()
        match name:
            case "cross_entropy":
                value = sum(said[p, ids[p + 1]] for p in range(n - 1)) / (n - 1)
            case "sequence_log_prob":
                k = len(answers[i])
                assert ids[-k:] == answers[i]
                value = sum(said[n - k + j - 1, a] for j, a in enumerate(answers[i]))
            case "along":
                value = x[site][-1] @ noise(model.shape.d_model).double()
            case "neuron":
                value = x[f"mlp_post.{layer}"][2, 3]
            case "everywhere":
                value = (x[f"z.{layer}"][:, 1] @ noise(model.shape.d_head).double()).mean()
            case "latent":
                d = subjects.dictionary(model.shape.d_model, site)
                value = torch.relu(x[site] @ d.encoder[0][site][5].double() + d.b_enc[0][5]).mean()
            case "own":
                value = x[site][0].tanh().sum() - x["z.0"][-1, 2].pow(2).sum()
        out.append(value)
    return torch.stack([torch.as_tensor(v) for v in out]).float()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("family", "uneven"), [("gpt2", True), ("llama_gqa", False)])
def test_activation_patching_by_hand(name, family, uneven):
    model = far(family)
    task = task_of(name, model, subjects.numbered_task(uneven))
    bound = task.bind(model)
    answers = [[int(w[1:]) for w in p.answer.split()] for p in task.pairs]
    clean, corrupt = (by_hand(name, model, t, [], answers) for t in (bound.clean, bound.corrupt))
    given = model.capture(bound.clean, ["resid_pre", "z"])
    for site, by in (("resid_pre", "position"), ("z", "unit")):
        got = activation(model, task, site=site, by=by, samples=1)
        assert torch.allclose(got.clean, clean, atol=1e-5)
        assert torch.allclose(got.corrupt, corrupt, atol=1e-5)
        for layer, unit, position in ((0, 1, -2), (1, 2, -1), (2, 0, -3)):
            a = Address(site, layer, None, position) if by == "position" else Address(site, layer, unit)
            want = by_hand(name, model, bound.corrupt, [Replace(a, given[str(a)])], answers) - corrupt
            cell = got.effect[layer, position if by == "position" else unit]
            assert float(cell) == pytest.approx(float(want.mean()), abs=2e-5), a


@pytest.mark.parametrize("name", NAMES)
def test_attribution_is_the_slope_of_patching(name):
    """Words almost alike make steps small, where both agree; places behind what is read have no effect in either."""
    task = task_of(name, far("gpt2"), subjects.numbered_task())
    model = alike(far("gpt2"), task, step=1e-3)
    for site in ("resid_pre", "z"):
        want = activation(model, task, site=site, samples=1).effect
        got = attribution(model, task, site=site, audit=4)
        assert torch.allclose(got.effect, want, rtol=0.03, atol=0.01 * float(want.abs().max()))
        measured = ~got.exact.isnan()
        assert torch.allclose(got.exact[measured], want[measured], atol=1e-6)
    if name in ("along", "neuron", "latent", "everywhere"):
        assert bool((want[2] == 0).all())
        assert bool((got.effect[2] == 0).all())


@pytest.mark.parametrize("method", [attribution, attribution_star, relp])
def test_estimates_of_a_linear_readout_of_a_linear_model_are_exact(method):
    model, told = straight(), subjects.llama_task(3)
    task = replace(told, metric=readout("along", model, layer=0))
    for site in ("z", "resid_pre", "mlp_out"):
        want = activation(model, task, site=site, samples=1).effect
        got = method(model, task, site=site, audit=0).effect
        assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))
        assert bool((got[1] == 0).all())


def test_attribution_by_central_differences():
    model, told = subjects.random_llama(), subjects.llama_task(2)
    for name in ("cross_entropy", "along", "latent"):
        task = replace(told, metric=readout(name, model, 0))
        bound = task.bind(model)
        own, donor = (model.capture(t, "z.0")["z.0"] for t in (bound.corrupt, bound.clean))
        got, step = attribution(model, task, site="z.0", audit=0).effect[0], 1e-2 * (donor - own)
        for head in range(2):
            edits = [Replace(f"z.0.{head}", (own + sign * step)[:, :, head]) for sign in (1, -1)]
            up, down = (model.measure(bound.corrupt, bound.measure, e) for e in edits)
            assert float(got[head]) == pytest.approx(float((up - down).mean()) / 2e-2, rel=2e-2, abs=1e-4)


def test_runs_end_where_a_readout_ends():
    model, told = subjects.family("llama_gqa"), subjects.numbered_task()
    spent = {}
    for name in ("prob", "along"):
        with counting() as used:
            activation(model, replace(told, metric=readout(name, model, 0)), site="resid_pre", samples=1)
        spent[name] = used.forwards
    assert spent["along"] < 0.5 * spent["prob"]


def test_further_metrics_read_other_places_of_the_same_runs():
    model, told = subjects.family("gpt2"), subjects.numbered_task()
    task = replace(told, metric=readout("along", model))
    got = activation(model, task, site="z", metrics=("prob", "cross_entropy"), samples=1)
    for n, name in enumerate(("prob", "cross_entropy")):
        alone = activation(model, replace(told, metric=name), site="z", samples=1)
        assert torch.allclose(got.metrics[n], alone.effect, atol=1e-6)


@pytest.mark.parametrize("method", [path, knockout, knockout_curve, causal_trace])
def test_methods_that_read_one_next_token_refuse_whole_answers(method):
    model = subjects.family("gpt2")
    with pytest.raises(Refused, match="answers behind them"):
        method(model, task_of("sequence_log_prob", model, subjects.numbered_task()))


def test_methods_with_a_second_metric_take_readouts_of_activations():
    model = subjects.family("gpt2")
    told = subjects.numbered_task()
    task = replace(told, metric=readout("along", model))
    got, plain = causal_trace(model, task, samples=1), causal_trace(model, replace(told, metric="prob"), samples=1)
    assert torch.allclose(got.probability, plain.effect, atol=1e-6)
    want = activation(model, task, site="resid_post", samples=1).effect
    assert torch.allclose(got.effect, want, atol=1e-5)


def test_readouts_that_cannot_be_measured_are_refused():
    model, told = subjects.family("gpt2"), subjects.numbered_task()
    with pytest.raises(Refused, match="shape"):
        activation(model, replace(told, metric=ca.tasks.activation("resid_post.1@-1", noise(3))), site="z")
    with pytest.raises(Refused, match="name one unit"):
        activation(model, replace(told, metric=ca.tasks.activation("resid_post.1@-1")), site="z")
    with pytest.raises(Refused, match="0 indices were given"):
        ca.tasks.activation("resid_post")
    with pytest.raises(Refused, match="no such latent"):
        ca.dictionaries.latent(subjects.dictionary(32), 99)
    with pytest.raises(Refused, match="reads resid_post"):
        _ = replace(told, metric=readout("along", model)).bind(model).metric
    with pytest.raises(Refused, match="last logits"):
        Readout("r", torch.zeros, "nats", True, "", needs_reference=True, reads="logits")
    with pytest.raises(Refused, match="at every position"):
        Readout("r", torch.zeros, "nats", True, "", whole_answer=True)
    with pytest.raises(Refused, match="without a gradient"):
        attribution(model, replace(told, metric="rank"), audit=0)
