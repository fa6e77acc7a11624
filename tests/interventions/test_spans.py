"""What positions are called over several prompts: the word that all share, else what it is to the question."""

from __future__ import annotations

from dataclasses import replace

import pytest

import cutaway as ca
from cutaway.interventions.spans import position_names
from cutaway.patching import ablate, activation, attribution, causal_trace
from cutaway.tasks.pair import Pair
from cutaway.tasks.task import Task
from tests.conformance import subjects

# The subject is the second to fourth word, the answer follows w9; only the first prompt has w1 in front.
ROWS = [("w1 w11 w12 w13 w8 w20 w9", "w12 w13"), ("w2 w14 w15 w16 w8 w21 w9", "w15 w16")]


def _task(rows=ROWS) -> Task:
    pairs = [Pair(text, text.replace(subject.split()[-1], "w50"), f"w{60 + i}", "w70", subject=subject)
             for i, (text, subject) in enumerate(rows)]  # fmt: skip
    return Task("told", tuple(pairs), corruption="the subject's last word becomes another")


def _three(text: str, n: int) -> tuple[str, str]:
    return text, " ".join(text.split()[1 : 1 + n])


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (ROWS, ["first", "before", "first subject", "last subject", "w8", "further", "w9"]),
        ([_three(t, 3) for t, _ in ROWS],
         ["first", "first subject", "middle subject", "last subject", "w8", "further", "w9"]),
        ([_three(t, 1) for t, _ in ROWS], ["first", "subject", "next", "further·3", "w8", "further·5", "w9"]),
        ([_three(ROWS[0][0], 1), _three(ROWS[1][0], 3)], ["first", "@1", "@2", "@3", "w8", "further", "w9"]),
        (ROWS[:1] * 2, ["w1", "w11", "w12", "w13", "w8", "w20", "w9"]),
        ([("w1 w2 w1 w3", "w2")], ["w1·0", "w2", "w1·2", "w3"]),
        ([ROWS[0], ("w14 w15 w16 w8 w21 w9", "w15 w16")],
         ["before@-6", "first subject@-5", "last subject@-4", "w8@-3", "further@-2", "w9@-1"]),
    ],
)  # fmt: skip
def test_positions_have_the_word_of_all_prompts_or_their_role(rows, names):
    assert position_names(_task(rows).bind(subjects.family("gpt2"))) == names


def test_without_a_subject_the_changed_words_stand_for_it():
    task = _task()
    bare = replace(task, pairs=tuple(replace(p, subject="") for p in task.pairs))
    assert position_names(bare.bind(subjects.family("gpt2")))[1:5] == ["before·1", "before·2", "changed", "w8"]


def test_every_result_with_positions_of_several_prompts_says_roles(tmp_path):
    m, task = subjects.family("gpt2"), _task()
    names = ["first", "before", "first subject", "last subject", "w8", "further", "w9"]
    results = [
        activation(m, task, samples=1),
        activation(m, task, site="z.1", by="both", samples=1),
        attribution(m, task, site="z", by="both", samples=1, audit=0),
        ablate(m, task, site="mlp_out", each_position=True, samples=1),
        causal_trace(m, task, by="position", samples=1),
    ]
    assert [r.labels["position"] for r in results] == [names] * len(results)
    listed = activation(m, task, site="z.1.2@3,mlp_out.0@-2", samples=1)
    assert listed.labels["node"] == ["z.1.2 last subject", "mlp_out.0 further"]
    assert ca.open(results[1].save(tmp_path / "a.safetensors")).labels["position"] == names
    drawn = results[0]._repr_html_()
    assert "last subject" in drawn
    assert "w13" not in drawn, "no prompt's own word speaks for the others"
