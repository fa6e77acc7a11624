"""Answers of several tokens: every number against plain runs of prompt and answer, and of prompt and foil, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.record import counting
from cutaway.core.refuse import Refused
from cutaway.lenses import direct_attribution, logit_lens
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Freeze
from cutaway.models.model import Model
from cutaway.models.sweep.plan import PREFIX
from cutaway.patching import activation, attribution, causal_trace, group, knockout, knockout_curve, path
from cutaway.tasks.pair import Pair
from cutaway.tasks.task import Task
from tests.conformance import subjects
from tests.models.test_tails import far
from tests.patching.made import alike

MORE = [("", ""), (" w11", " w12"), (" w13 w14", " w15 w16 w17")]


def longer(task: Task) -> Task:
    """The task with answers and foils of one to four tokens."""
    pairs = [
        Pair(p.clean, p.corrupt, f" {p.answer}{a}", f" {p.foil}{f}", joined=True)
        for p, (a, f) in zip(task.pairs, MORE, strict=True)
    ]
    return replace(task, pairs=pairs)


def ids(text: str) -> list[int]:
    return [int(w[1:]) for w in text.split()]


def said(model: Model, prompt: str, tail: str, edits: Sequence[Edit] = ()) -> Tensor:
    """Log-probability of a continuation, token for token, from one plain run of this text alone."""
    row, k = ids(prompt) + ids(tail), len(ids(tail))
    logits = model.run(torch.tensor(row), edits)[0].double().log_softmax(-1)
    return torch.stack([logits[len(row) - k + j - 1, t] for j, t in enumerate(ids(tail))]).sum()


def by_hand(model: Model, task: Task, cell: Address | None = None) -> Tensor:
    """log P(answer) − log P(foil) of every corrupt prompt, with one cell from its clean run behind the same words."""
    out = []
    for p in task.pairs:
        both = []
        for tail in (p.answer, p.foil):
            edits = list[Edit]()
            if cell is not None:
                at = None if cell.position is None else cell.position + len(ids(p.clean))
                given = model.capture(torch.tensor(ids(p.clean) + ids(tail)), str(cell.place))
                edits = [Freeze(replace(cell, position=at), given)]
            both.append(said(model, p.corrupt, tail, edits))
        out.append(both[0] - both[1])
    return torch.stack(out).float()


@pytest.mark.parametrize(("family", "uneven"), [("gpt2", True), ("llama_gqa", False), ("mistral_window", True)])
def test_activation_patching_by_hand(family, uneven):
    model, task = far(family), longer(subjects.numbered_task(uneven))
    base = by_hand(model, task)
    for site, by in (("resid_pre", "position"), ("z", "unit")):
        got = activation(model, task, site=site, by=by, samples=1)
        assert got.units["effect"] == "nats"
        assert torch.allclose(got.corrupt, base, atol=1e-4)
        for layer, unit, position in ((0, 1, -2), (1, 2, -1), (2, 0, -3)):
            place = Address(site, layer, None, position) if by == "position" else Address(site, layer, unit)
            want = by_hand(model, task, place) - base
            cell = got.effect[layer, position if by == "position" else unit]
            assert float(cell) == pytest.approx(float(want.mean()), abs=1e-4), (site, layer)


def test_positions_and_labels_are_those_of_the_prompt():
    model, plain = far("gpt2"), subjects.numbered_task()
    single, several = (activation(model, t, site="resid_pre", samples=1) for t in (plain, longer(plain)))
    assert several.labels == single.labels
    bound = longer(plain).bind(model)
    assert bound.span("last").nonzero()[:, 1].tolist() == [5, 5, 5]
    assert bound.changed.nonzero()[:, 1].tolist() == [2, 2, 2]
    assert [len(b) for b in bound.buckets()] == [1, 1, 1]


def test_one_token_is_the_same_number_either_way():
    model, plain = far("llama_gqa"), subjects.numbered_task()
    first = activation(model, plain.take(1), site="z", samples=1)
    pairs = [plain.pairs[0], longer(plain).pairs[1]]
    mixed = longer(plain).bind(model).rows([0])
    assert float(model.measure(mixed.clean, mixed.measure)) == pytest.approx(float(first.clean[0]), abs=1e-4)
    both = activation(model, Task("two", pairs), site="z", samples=1)
    assert float(both.clean[0]) == pytest.approx(float(first.clean[0]), abs=1e-4)


def test_attribution_is_the_slope_of_patching():
    task = longer(subjects.numbered_task())
    model = alike(far("gpt2"), task, step=1e-3)
    for site in ("resid_pre", "z"):
        want = activation(model, task, site=site, samples=1).effect
        got = attribution(model, task, site=site, audit=4)
        assert torch.allclose(got.effect, want, rtol=0.03, atol=0.01 * float(want.abs().max()))


def test_further_metrics_of_whole_answers():
    model, task = far("gpt2"), longer(subjects.numbered_task())
    bound = task.bind(model)
    answers = torch.stack([said(model, p.clean, p.answer) for p in task.pairs]).float()
    foils = torch.stack([said(model, p.clean, p.foil) for p in task.pairs]).float()
    want = {"log_prob": answers, "prob": answers.exp(), "prob_diff": answers.exp() - foils.exp(), "kl": 0 * answers}
    for name, value in want.items():
        other = bound.measured_by(name, model)
        assert torch.allclose(model.measure(bound.clean, other.measure), value, atol=1e-4, rtol=1e-3), name
        assert torch.allclose(
            model.measure(bound.clean, replace(task, metric=name).bind(model).measure), value, atol=1e-4, rtol=1e-3
        )
    top = []
    for p in task.pairs:
        row = ids(p.clean)
        for t in ids(p.answer):
            top.append(int(model.run_last(torch.tensor(row)).argmax()) == t)
            row.append(t)
    own = [Pair(p.clean, p.corrupt, " " + " ".join(_greedy(model, p.clean, 2)), p.foil, joined=True) for p in task]
    right = Task("own", own, "accuracy").bind(model)
    assert model.measure(right.clean, right.measure).tolist() == [1.0, 1.0, 1.0]
    accuracy = bound.measured_by("accuracy", model)
    assert not any(top)
    assert model.measure(bound.clean, accuracy.measure).tolist() == [0.0, 0.0, 0.0]


def _greedy(model: Model, prompt: str, n: int) -> list[str]:
    row = ids(prompt)
    for _ in range(n):
        row.append(int(model.run_last(torch.tensor(row))[0, 1:].argmax()) + 1)
    return [f"w{i}" for i in row[-n:]]


def test_other_methods_take_them():
    model, task = far("gpt2"), longer(subjects.numbered_task(True))
    bound = task.bind(model)
    clean, corrupt = (model.measure(t, bound.measure) for t in (bound.clean, bound.corrupt))
    one = group(model, task, heads=("0.1",), how="corrupt", direction="denoise", samples=1)
    alone = activation(model, task, site="z.0", samples=1).effect[0, 1]
    assert float(one.effect) == pytest.approx(float(alone), abs=1e-4)
    traced = causal_trace(model, task, samples=1)
    assert float(traced.clean.mean()) == pytest.approx(float(clean.mean()), abs=1e-4)
    sent = path(model, task, samples=1)
    assert sent.units["relative"] == "share of the answer's |log-probability|"
    frozen = path(model, task, samples=1, freeze_mlps=True, freeze_norms=True)
    assert float(frozen.gap) == pytest.approx(float((clean - corrupt).mean()), abs=1e-4)
    knocked = knockout(model, longer(subjects.numbered_task()), samples=1)
    assert not bool(knocked.effect.isnan().any())
    assert knockout_curve(model, task, samples=1, top=2).units["metric"] == "nats"


def test_last_heads_to_the_logits_are_activation_patching():
    """As with answers of one token: nothing lies between heads of the last layer and the logits but its MLP."""
    model, task = far("llama_gqa"), longer(subjects.numbered_task())
    want = activation(model, task, site="z", samples=1).effect[-1]
    assert torch.allclose(path(model, task, direction="denoise", samples=1).effect[-1], want, atol=1e-4)


def test_lenses_read_the_first_token_and_say_so():
    model, task = far("gpt2"), longer(subjects.numbered_task())
    first = replace(
        task, pairs=[replace(p, answer=" " + p.answer.split()[0], foil=" " + p.foil.split()[0]) for p in task]
    )
    for lens in (logit_lens, direct_attribution):
        got, want = lens(model, task, samples=1), lens(model, first, samples=1)
        for name, tensor in want.tensors().items():
            assert torch.allclose(getattr(got, name), tensor, equal_nan=True), name
        assert "first token" in got.record["answer"]
    same = replace(task, pairs=[Pair(p.clean, p.corrupt, " w3 w4", " w3 w5", joined=True) for p in task])
    behind = replace(task, pairs=[Pair(f"{p.clean} w3", f"{p.corrupt} w3", "w4", "w5") for p in task])
    got, want = logit_lens(model, same, samples=1), logit_lens(model, behind, samples=1)
    assert torch.equal(got.probability, want.probability)
    assert "what they share" in got.record["answer"]


def test_what_cannot_be_compared_is_refused():
    model, plain = subjects.family("gpt2"), subjects.numbered_task()
    task = longer(plain)
    with pytest.raises(Refused, match="log_prob"):
        replace(task, metric="rank").bind(model)
    with pytest.raises(Refused, match="user function"):
        replace(task, metric=lambda logits, answers, foils: logits[:, 0]).bind(model)
    with pytest.raises(Refused, match="beginning of the other"):
        replace(task, pairs=[Pair("w1 w2", "w1 w3", " w4", " w4 w5", joined=True)]).bind(model)
    with pytest.raises(Refused, match="sets of answers"):
        replace(task, pairs=[replace(task.pairs[1], answers=(" w4",))]).bind(model)
    with pytest.raises(Refused, match="counts positions itself"):
        task.bind(subjects.family("bloom"))
    with pytest.raises(Refused, match="nats off"):
        task.bind(far("gpt_neo"))
    with pytest.raises(Refused, match="carry a state"):
        task.bind(subjects.family("mamba"))


def test_records_say_what_was_measured():
    model, task = subjects.family("gpt2"), longer(subjects.numbered_task())
    got = activation(model, task, site="z", samples=1)
    assert any("up to 4 tokens" in n for n in got.record["notes"])


def test_prompts_of_one_layout_share_what_stands_before_the_first_edit():
    """As with answers of one token: fewer forwards than running each variant anew, and the same numbers."""
    model, told = far("mistral_window"), subjects.numbered_task()
    pairs = [replace(p, answer=f" {p.answer} w11 w12", foil=f" {p.foil} w13", joined=True) for p in told]
    task = replace(told, pairs=pairs)
    with counting() as used:
        got = activation(model, task, site="resid_pre", samples=1)
    model.disabled[PREFIX] = "for this test"
    try:
        with counting() as anew:
            want = activation(model, task, site="resid_pre", samples=1)
    finally:
        del model.disabled[PREFIX]
    assert torch.allclose(got.effect, want.effect, atol=1e-5)
    assert torch.allclose(got.null, want.null, atol=1e-5)
    assert used.forwards < 0.9 * anew.forwards
