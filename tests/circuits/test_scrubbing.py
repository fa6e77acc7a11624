"""Causal scrubbing: a run by hand, programs whose variables are known, and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cutaway as ca
from cutaway.circuits.scrubbing import _drawn
from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.models.edits.wiring import wiring
from tests.circuits.made import written as by_hand
from tests.conformance import subjects


def of_one_length(task: ca.Task, model: ca.Model) -> ca.Task:
    lengths = task.bind(model).clean.lengths.tolist()
    most = max(set(lengths), key=lengths.count)
    return replace(task, pairs=tuple(p for p, n in zip(task.pairs, lengths, strict=True) if n == most))


def test_a_scrubbed_run_by_hand():
    """The last MLP is named: it reads what all others write for any prompt, and writes for a prompt of its group."""
    m = subjects.random_llama()
    task = of_one_length(subjects.llama_task(8), m)
    b, w = task.bind(m), wiring(m)

    def group(text: str) -> int:
        return ord(text[0]) % 3

    got = ca.circuits.scrub(m, task, {"mlp_out.1": group}, draws=1, samples=1)
    chance, everyone = generator(0), torch.zeros(len(task), dtype=torch.long)
    values = {g: i for i, g in enumerate(dict.fromkeys(map(group, b.clean.texts)))}
    groups = torch.tensor([values[group(t)] for t in b.clean.texts])
    assert 1 < len(values) < len(task)
    with torch.no_grad():
        adds, block = by_hand(m, w, b.clean), m.hf.model.layers[1]
        empty = sum(x[_drawn(everyone, chance)] for x in adds)
        others = [_drawn(everyone, chance) for _ in adds]
        before = sum(x[o] for x, o in list(zip(adds, others, strict=True))[:-1])
        last = block.mlp(block.post_attention_layernorm(before))[_drawn(groups, chance)]
        metric = [b.metric(m.hf.lm_head(m.hf.model.norm(x))[:, -1]) for x in (empty, before + last)]
    torch.testing.assert_close(got.value, metric[1], atol=1e-4, rtol=1e-4)
    assert float(got.empty) == pytest.approx(float(metric[0].mean()), abs=1e-4)
    assert got.groups.tolist() == [len(values)]


def count(text: str) -> int:
    return text.split().count(text.split()[-1])


def last(text: str) -> str:
    return text.split()[-1]


def before(text: str) -> str:
    return text.split()[-2]


PROGRAMS = {
    "shift": ({"embed": before, "z.0.0": before}, {"embed": before, "z.0.0": last}),
    "histogram": (
        {"embed": str, "z.0.0": count, "mlp_out.0": count},
        {"embed": str, "z.0.0": last, "mlp_out.0": count},
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_right_hypothesis_keeps_the_answer_of_a_program_and_a_wrong_one_does_not(name):
    m = ca.load(f"compiled/{name}")
    task = of_one_length(ca.tasks.load(name, m, n=160), m)
    right, wrong = (ca.circuits.scrub(m, task, h, samples=3) for h in PROGRAMS[name])
    assert float(right.recovered) == pytest.approx(1, abs=1e-3)
    assert float(right.interval[0]) > float(right.null.max()) + 0.2
    assert float(wrong.interval[1]) < 0.8
    assert (right.groups < len(task)).any()
    everything = dict.fromkeys(map(str, wiring(m).writers), lambda text: text)
    whole = ca.circuits.scrub(m, task, everything, draws=2, samples=1)
    assert float(whole.recovered) == pytest.approx(1, abs=1e-4)


def test_refusals():
    m, task = subjects.random_llama(), subjects.llama_task(4)
    with pytest.raises(Refused, match="no such writer"):
        ca.circuits.scrub(m, of_one_length(task, m), {"z.9.9": str})
    with pytest.raises(Refused, match="several lengths"):
        ca.circuits.scrub(m, subjects.uneven_task(), {"z.0.0": str})
