"""The logit lens and its grid, against the modules applied by hand with plain hooks."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.tasks.task import Task
from tests.conformance import subjects
from tests.lenses.plain import WIRING, run
from tests.models.common import widely
from tests.models.tiny import CONFIGS

CAUSAL = [n for n in CONFIGS if n != "bert"]


def by_hand(name: str, task: Task) -> torch.Tensor:
    """Logits of the lens [depth, prompt, token]: each stream through the model's own final norm and unembedding."""
    model, w, rows = subjects.family(name), WIRING[name], []
    for pair in task.pairs:
        ids = torch.tensor([[int(word[1:]) for word in pair.clean.split()]])
        with torch.no_grad():
            x = torch.stack(run(model.hf, w, ids).stream).float()
            logits = model.hf.get_submodule(w.head)(model.hf.get_submodule(w.final)(x)) * w.scale
        rows.append(torch.tanh(logits / w.cap) * w.cap if w.cap else logits)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("name", list(WIRING))
@pytest.mark.parametrize("uneven", [False, True])
def test_every_depth_by_hand(name, uneven):
    task = subjects.numbered_task(uneven)
    got, logits = ca.lenses.logit_lens(subjects.family(name), task, samples=1), by_hand(name, task)
    answers, foils = (torch.tensor([int(getattr(p, r)[1:]) for p in task.pairs]) for r in ("answer", "foil"))
    p = logits.softmax(-1)
    rows = torch.arange(len(task))
    for i in range(len(logits)):
        ahead = (logits[i] > logits[i, rows, answers][:, None]).sum(-1)
        kl = (p[-1] * (p[-1] / p[i]).log()).sum(-1).mean()
        torch.testing.assert_close(got.probability[i], p[i, rows, answers].mean(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got.foil_probability[i], p[i, rows, foils].mean(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got.divergence[i], kl, rtol=1e-3, atol=1e-5)
        assert got.rank[i] == ahead.median()
    assert got.labels["layer"] == ["embed", *map(str, range(len(logits) - 1))]


@pytest.mark.parametrize("name", widely(CAUSAL))
def test_the_last_depth_is_the_model_itself(name):
    model, task = subjects.family(name), subjects.numbered_task()
    got, bound = ca.lenses.logit_lens(model, task, samples=1), task.bind(model)
    with torch.no_grad():
        logits = model.hf(bound.clean.ids).logits[:, -1].float()
    rows = torch.arange(len(task))
    own = logits.softmax(-1)[rows, bound.answers]
    torch.testing.assert_close(got.probability[-1], own.mean(), rtol=1e-4, atol=1e-6)
    assert got.rank[-1] == (logits > logits[rows, bound.answers][:, None]).sum(-1).median()
    assert abs(float(got.divergence[-1])) < 1e-6


@pytest.mark.parametrize("name", list(WIRING))
def test_the_grid_is_the_lens_at_every_position(name):
    model, task = subjects.family(name), subjects.numbered_task(uneven=True)
    grid = ca.lenses.lens_grid(model, task, samples=1)
    words = task.pairs[0].clean.split()
    assert grid.labels["position"] == words
    for position in (0, 2, len(words) - 1):
        part = Task("part", (subjects.Pair(" ".join(words[: position + 1]), "w1 " * position + "w1", "w61", "w71"),))
        logits = by_hand(name, part)[:, 0]
        p, top = logits.softmax(-1).max(-1)
        torch.testing.assert_close(grid.probability[:, position], p, rtol=1e-4, atol=1e-6)
        assert grid.token[:, position].tolist() == top.tolist()
        torch.testing.assert_close(
            grid.answer_probability[:, position], logits.softmax(-1)[:, 61], rtol=1e-4, atol=1e-6
        )
        assert grid.answer_rank[:, position].tolist() == (logits > logits[:, 61:62]).sum(-1).tolist()
    with torch.no_grad():
        own = model.hf(torch.tensor([[int(word[1:]) for word in words]])).logits[0].float()
    assert grid.token[-1].tolist() == own.argmax(-1).tolist()
    assert float(grid.divergence[-1].abs().max()) < 1e-6


def test_the_words_of_the_grid_are_the_tokens_it_found():
    grid = ca.lenses.lens_grid(subjects.miniworld(), ca.tasks.load("ioi", subjects.miniworld(), 1))
    for ids, words in zip(grid.token, grid.labels["token"], strict=True):
        assert words == subjects.miniworld().text.token_texts(ids)


def test_the_rotated_null_is_calibrated_on_models_that_nobody_trained():
    """A fixed answer of a random model is as likely as in a rotated basis: above all 8 samples once in 9 times."""
    above = below = 0
    for seed in range(45):
        model, pair = subjects.random_llama(seed), subjects.llama_task(1)
        curve = ca.lenses.logit_lens(model, pair, samples=8, seed=seed)
        above += bool(curve.probability[-1] > curve.null[-1].max())
        below += bool(curve.probability[-1] < curve.null[-1].min())
    assert 1 <= above <= 12  # 5 expected; the binomial tail beyond is 0.2 %
    assert 1 <= below <= 12


def test_a_trained_model_is_far_outside_its_null_and_an_early_layer_is_not():
    model = subjects.miniworld()
    curve = ca.lenses.logit_lens(model, ca.tasks.load("ioi", model, 12), samples=20)
    assert curve.probability[-1] > 5 * curve.null[-1].max()
    assert curve.interval[-1, 0] > curve.null[-1].max()
    assert curve.rank[-1] == 0
    assert curve.divergence[0] > 1


def test_rotations_of_different_seeds_share_nothing():
    model, task = subjects.random_llama(), subjects.llama_task()
    a, b = (ca.lenses.logit_lens(model, task, samples=4, seed=s).null[-1].tolist() for s in (0, 1))
    assert not set(a) & set(b)


def test_an_encoder_has_no_lens():
    with pytest.raises(Refused):
        ca.lenses.decode.along_depth(m := subjects.family("bert"), m.tokens(torch.tensor([[5, 6, 7]])))
