"""The study of sums: its problems, its parts against the methods that do one each, and the bundled model."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.models.edits.library import Ablate
from cutaway.neurons import ArithmeticStudy, arithmetic
from cutaway.neurons.arithmetic import OPERATIONS, problems
from tests.conformance import subjects


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_every_problem_is_true_and_its_counterpart_has_another_result(name):
    plain, words = problems(name, 200, shots=2)
    lines = [p.clean.split("\n") for p in plain.pairs]
    for parts, p, told in zip(lines, plain.pairs, words.pairs, strict=True):
        a, _, b, _ = parts[-1].split()
        assert eval(f"{a} {name} {b}") == int(p.answer) != int(p.foil)
        assert all(eval(line.replace("=", "==")) for line in parts[:-1])
        assert not any(line.startswith(parts[-1]) for line in parts[:-1])
        assert {a, b} <= set(told.clean.replace(".", " ").split())
        assert told.answer == p.answer
    assert len({parts[-1] for parts in lines}) == len(lines) == len(OPERATIONS[name].problems()) - 2


@cache
def study() -> ArithmeticStudy:
    """The bundled model, which adds and subtracts."""
    return arithmetic(subjects.miniworld(), prompts=16, sizes=(10, 30), samples=3, null_cells=6)


def test_heads_and_neurons_are_those_of_plain_ablation():
    model, got = subjects.miniworld(), study()
    bound = problems("-", 16)[0].narrow(model).bind(model, "prob")
    ids, rows = bound.answers, torch.arange(len(bound))
    own = model.run_last(bound.clean).softmax(-1)[rows, ids]
    each = {
        h: model.run_last(bound.clean, [Ablate(f"z.{h}")]).softmax(-1)[rows, ids] - own
        for h in {"0.1", "2.1", "4.3", got.labels["key"][1][0]}
    }
    for head, change in each.items():
        layer, unit = map(int, head.split("."))
        assert float(got.effect[1, layer, unit]) == pytest.approx(float(change.mean()), abs=1e-5)
        if head in got.labels["key"][1]:
            at = got.labels["key"][1].index(head)
            assert float(got.key[1, at]) == pytest.approx(float(change[1::2].mean()), abs=1e-5)
    plus = problems("+", 16)[0].narrow(model).bind(model, "prob")
    both = [Ablate(f"z.{h}") for h in got.labels["key"][1]]
    held, answer = plus.rows(range(1, 16, 2)), plus.answers[1::2]
    runs = [model.run_last(held.clean, edits).softmax(-1)[rows[:8], answer] for edits in (both, [])]
    assert float(got.shared[1, 0]) == pytest.approx(float((runs[0] - runs[1]).mean()), abs=1e-5)
    edits = [Ablate(f"mlp_post.{n}@-1") for n in got.labels["score"][1][:10]]
    masked = model.run_last(bound.rows(range(1, 16, 2)).clean, edits).softmax(-1)
    assert float(got.masked[1, 0, 0]) == pytest.approx(float(masked[rows[:8], ids[1::2]].mean()), abs=1e-5)


def test_the_bundled_model_needs_few_neurons_for_sums_but_not_only_them():
    got = study()
    for i in range(2):
        assert float(got.untouched[i, 1]) == 1, "it can do these"
        null = got.null[i][got.null[i].isfinite()]
        assert len(null)
        assert float(got.key[i, 0]) < min(float(null.min()), float(got.key_null[i, 0].min()))
        assert float(got.shared[i, i]) < float(got.shared_null[i, i].min())
        assert float(got.score[i, :10].mean()) > float(got.score_null[i, :10].mean(0).max())
        assert float(got.masked[i, 0, 1]) < float(got.masked_null[i, 0, 1].min()) - 0.1
        assert float(got.kept[i, 0, 1]) < float(got.untouched[i, 0]), "30 of 2304 are not enough"
        assert float(got.words_untouched[i, 1]) == 0, "it never read word problems"


def test_some_layers_alone_are_looked_at():
    whole, got = (
        study(),
        arithmetic(
            subjects.miniworld(), operations="+", prompts=16, sizes=(10,), layers=(2, 4), samples=1, null_cells=1
        ),
    )
    assert got.labels["layer"] == [2, 4]
    torch.testing.assert_close(got.effect[0], whole.effect[0, [2, 4]])
    assert {n.split(".")[0] for n in [*got.labels["key"][0], *got.labels["score"][0]]} <= {"2", "4"}
    assert float(got.kept[0, 0, 0]) > float(whole.kept[0, 0, 0]), "the other layers stay"


def test_what_is_no_operation_is_refused():
    with pytest.raises(Refused, match="no operation"):
        arithmetic(subjects.miniworld(), operations="+,%")
