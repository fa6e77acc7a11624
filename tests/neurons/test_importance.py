"""Comparative Neuron Analysis, against the definition in float64, the model's own logits and planted neurons."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.models.edits.library import Ablate
from cutaway.neurons import importance, memories
from cutaway.neurons.contributions import Answers, Steps
from cutaway.neurons.importance import right
from tests.conformance import subjects


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gpt_neox_parallel", "gemma2", "granite", "cohere"])
def test_the_steps_of_the_last_layer_give_the_model_s_own_logits(name):
    model = subjects.family(name)
    bound = subjects.numbered_task(uneven=True).bind(model)
    last = model.shape.n_layers - 1
    steps, answers = Steps.of(model, bound.clean, [last]), Answers(model, bound.answers)
    v = memories.toward_logits(model, memories.values(model, last))
    whole = steps.base[:, 0] + steps.weight[:, 0] @ v
    if bool(model.weights.mlp_out_bias[last].any()):  # biases are no neuron's
        final = model.anatomy.norm(model.anatomy.top("final"))
        scale = final.scale(model.capture(bound.clean, f"resid_post.{last}")[f"resid_post.{last}@-1"])
        whole += memories.toward_logits(model, model.weights.mlp_out_bias[last][None]) / scale[:, None]
    own = model.run_last(bound.clean).log_softmax(-1)
    got = [answers.log_p(answers.rows @ whole[p] + answers.bias, p) for p in range(len(whole))]
    expected = own[torch.arange(len(own)), bound.answers]
    torch.testing.assert_close(torch.stack(got), expected, rtol=1e-4, atol=1e-4)


def by_hand(model: ca.Model, ids: torch.Tensor, answer: int, edits=()) -> list[list[float]]:
    """Importance of every neuron [layer neuron] of a Llama at the last token of a prompt, one after the other."""
    hf = model.hf
    got = model.capture(ids[None], ["resid_mid", "mlp_post", "resid_post"], edits=list(edits))
    last = got["resid_post"][-1, 0, -1].double()
    scale = (last.square().mean() + hf.model.norm.variance_epsilon).sqrt()
    rows = hf.lm_head.weight.double() * hf.model.norm.weight.double() / scale
    out = []
    for layer in range(model.shape.n_layers):
        mid, post = (got[site][layer, 0, -1].double() for site in ("resid_mid", "mlp_post"))
        plain = (rows @ mid).log_softmax(-1)[answer]
        values = hf.model.layers[layer].mlp.down_proj.weight.double()
        out.append(
            [float((rows @ (mid + c * values[:, n])).log_softmax(-1)[answer] - plain) for n, c in enumerate(post)]
        )
    return out


@pytest.mark.parametrize("heads", [(), ("1.2", "2.0")])
def test_scores_are_those_of_the_definition(heads):
    model, task = subjects.family("llama_gqa"), subjects.numbered_task()
    got = importance(model, task, heads=heads, sizes=(2, 5), candidates=0, samples=2)
    bound = task.bind(model)
    edits, found = [Ablate(f"z.{h}") for h in heads], list[tuple[torch.Tensor, torch.Tensor]]()
    for p, answer in enumerate(bound.answers.tolist()):
        own = torch.tensor(by_hand(model, bound.clean.ids[p], answer))
        other = by_hand(model, (bound.clean if heads else bound.corrupt).ids[p], answer, edits)
        found.append((own, own - torch.tensor(other)))
    chose = ((found[0][1] + found[2][1]) / 2).flatten()
    assert got.labels["neuron"] == [f"{i // 48}.{i % 48}" for i in chose.argsort(descending=True)[:5].tolist()]
    for at, label in enumerate(got.labels["neuron"]):
        own, score = (x[tuple(map(int, label.split(".")))] for x in found[1])
        assert float(got.importance[at]) == pytest.approx(float(own), rel=1e-3, abs=1e-5)
        assert float(got.score[at]) == pytest.approx(float(score), rel=1e-3, abs=1e-5)
    assert "every second prompt" in got.record["split"]


@pytest.mark.parametrize("name", ["llama_gqa", "gemma2"])
def test_all_right_answers_count(name):
    """Probabilities of several right tokens add up, in scores, derivatives and with neurons masked."""
    model, plain = subjects.family(name), subjects.numbered_task()
    more = [("w81",), ("w82", "w83"), ()]
    task = replace(plain, pairs=tuple(replace(p, answers=a) for p, a in zip(plain.pairs, more, strict=True)))
    bound = task.bind(model)
    steps, answers = Steps.of(model, bound.clean, [1]), Answers(model, right(bound))
    single = Answers(model, bound.answers)
    logits = steps.base[1, 0] @ single.rows.T + single.bias
    capped = single.cap * torch.tanh(logits / single.cap) if single.cap else logits
    sets = [model.text.token_id(w) for w in ("w62", "w82", "w83")]
    assert float(answers.log_p(logits, 1)) == pytest.approx(
        float(capped.double().softmax(-1)[sets].sum().log()), abs=1e-5
    )
    assert torch.equal(answers.log_p(logits, 2), single.log_p(logits, 2)), "an empty set is the answer alone"
    small, where = replace(steps, weight=1e-3 * steps.weight), [(1, n) for n in range(48)]
    torch.testing.assert_close(
        answers.added(small, where), 1e-3 * answers.first_order(steps)[:, 0], rtol=0.05, atol=2e-6
    )
    got = importance(model, task, sizes=(2,), samples=1, candidates=8)
    silent = [Ablate(f"mlp_post.{n}@-1") for n in got.labels["neuron"]]
    p = model.run_last(bound.rows([1]).clean, silent).softmax(-1)[0]
    assert float(got.masked[0, 0]) == pytest.approx(float(p[sets].sum()), rel=1e-4)
    assert "largest derivative of the others" in got.record


def test_derivatives_bound_what_a_neuron_adds():
    model, task = subjects.family("llama"), subjects.numbered_task()
    bound = task.bind(model)
    steps, answers = Steps.of(model, bound.clean, [0, 1, 2]), Answers(model, bound.answers)
    where = [(i, n) for i in range(3) for n in range(48)]
    added, slope = answers.added(steps, where), answers.first_order(steps).flatten(1)
    assert bool((added <= slope + 1e-5).all())
    small = replace(steps, weight=1e-3 * steps.weight)
    torch.testing.assert_close(answers.added(small, where), 1e-3 * slope, rtol=0.05, atol=2e-6)
    few = importance(model, task, candidates=10, sizes=(3,), samples=2)
    first = bound.rows([0, 2])
    every = Answers(model, first.answers).added(Steps.of(model, first.clean, [0, 1, 2]), where).mean(0)
    assert few.record["scored exactly"] == 10
    assert float(every.sort(descending=True).values[10]) <= few.record["importance of the others, at most"] + 1e-5


def test_masked_and_kept_are_the_model_without_these_neurons_and_with_them_alone():
    model, task = subjects.family("llama_gqa"), subjects.numbered_task(uneven=True)
    got = importance(model, task, sizes=(1, 4), samples=2, layers=(1, 2))
    bound = task.bind(model).rows([1])
    names = [tuple(map(int, n.split("."))) for n in got.labels["neuron"]]
    assert {i for i, _ in names} <= {1, 2}
    for j, size in enumerate((1, 4)):
        first = set(names[:size])
        for field, silent in (
            (got.masked, sorted(first)),
            (got.kept, [(i, n) for i in (1, 2) for n in range(48) if (i, n) not in first]),
        ):
            p = model.run_last(bound.clean, [Ablate(f"mlp_post.{i}.{n}@-1") for i, n in silent]).softmax(-1)[0]
            assert float(field[0, j]) == pytest.approx(float(p[bound.answers[0]]), rel=1e-4)
            assert float(field[1, j]) == float(p.argmax() == bound.answers[0])
    assert float(got.untouched[0]) == pytest.approx(
        float(model.run_last(bound.clean).softmax(-1)[0, bound.answers[0]]), rel=1e-4
    )


def test_a_planted_neuron_is_found_and_needed():
    model = subjects.random_llama(spread=1.0)
    task, mlp = subjects.llama_task(1), model.hf.model.layers[1].mlp
    bound = task.bind(model)
    seen = []
    with torch.no_grad(), mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        model.run_last(bound.clean)
    x = seen[0][0, -1]  # (d_model,) what the last position's neurons read
    with torch.no_grad():  # neuron 0 of the last layer fires on it and writes the prompt's answer
        mlp.gate_proj.weight[0] = mlp.up_proj.weight[0] = 3 * x / x.square().sum()
        mlp.down_proj.weight[:, 0] = 3 * model.hf.lm_head.weight[bound.answers[0]]
    got = importance(model, task, sizes=(1,), samples=5)
    assert got.labels["neuron"][0] == "1.0"
    assert float(got.score[0]) > float(got.null[0].max())
    assert float(got.masked[0, 0]) < float(got.masked_null[0, 0].min())


def test_what_cannot_be_asked_is_refused():
    model, task = subjects.family("llama_gqa"), subjects.numbered_task()
    for options, why in (
        ({"sizes": (200,)}, "half of the 48"),
        ({"sizes": (0,)}, "half of"),
        ({"heads": ("7.0",)}, "layer 7"),
    ):
        with pytest.raises(Refused, match=why):
            importance(model, task, **options)
