"""What lenses with interventions find in SmolLM2: wrong answers debugged, relevance of tokens, states put into words.

Prompts are the first of each set; nothing is tuned, and what does not come out is written down as it is.
"""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.core.stats import mean_interval
from tests.real import sets
from tests.real.written import mean, measure, share

SECTION = "reading by lenses"
SMOLLM2 = pytest.mark.parametrize("name", ["smollm2"], indirect=True)


@SMOLLM2
def test_wrong_facts_debugged(model, results):
    """Facts whose answer is not the likeliest token: does the answer come back without the component found?"""
    found = []
    for kind in ("fact_capital", "fact_country", "fact_language"):
        task = sets.task(model, kind, 60)
        bound = task.bind(model)
        logits = model.run_last(bound.clean)
        wrong = (logits.argmax(-1) != bound.answers).nonzero()[:2, 0].tolist()
        for i in wrong:
            prompt = ca.tasks.as_prompts([bound.clean.ids[i][bound.clean.mask[i]].tolist()])
            expected = model.text.token_texts(bound.answers[i : i + 1])[0]
            got = ca.lenses.debug(model, prompt, expected=expected, samples=10)
            at = got.labels["component"].index(got.suspect)
            row = {"value": float(got.effect[at]), "control": [float(got.null.min()), float(got.null.max())]}
            said = f"{task.pairs[i].clean.split('.')[-1].strip()[-40:]} →{got.record['actual'][0]}, not{expected}"
            margin, end = {"value": float(got.difference[-1])}, f"turns at {got.turn}, {got.suspect}"
            results.row(SECTION, f"debug: {said} ({end})", 1, **{"without it": row, "margin": margin})
            found.append(got.confirmed)
    assert any(found)
    assert not all(found), "late MLPs share the work of writing 'the'"
    results.row(SECTION, "debug: confirmed", len(found), confirmed=share(found))


@SMOLLM2
def test_relevance_of_tokens_beats_random_orders(model, results):
    task = sets.task(model, "fact_capital", 16)
    got = ca.lenses.token_relevance(model, task, steps=5, samples=6)
    for i, order in enumerate(got.labels["order"]):
        area = measure(got.area[i], got.interval[i], got.null[i])
        gain = measure(got.gain[i], got.gain_interval[i])
        results.row(SECTION, f"deletion, {order} (capitals)", 16, area=area, **{"below random": gain})
    ahead = measure(got.ahead, got.ahead_interval)
    results.row(SECTION, "deletion: AttnLRP below gradient × input (capitals)", 16, area=ahead)
    results.row(SECTION, "AttnLRP (capitals)", 16, explained=mean(got.total), residual=mean(got.residual))
    assert float(got.gain_interval[0, 0]) > 0, "the most relevant tokens are those that count"


@SMOLLM2
def test_states_of_subjects_put_into_words(model, results):
    """The state of a country's last token, in a prompt that asks for capitals: when does it say the right one?"""
    task = sets.task(model, "fact_capital", 60)
    ids = task.bind(model).answers
    target, each, null, plain = "Japan: Tokyo; Italy: Rome; Egypt: Cairo; x:", [], [], []
    once = {p.subject: i for i, p in reversed([*enumerate(task.pairs)]) if p.subject and p.subject not in target}
    chosen = sorted(once.values())[:12]
    assert len(chosen) == 12
    for i in chosen:
        prompt, answer = (
            ca.tasks.as_prompts(f"We went to {task.pairs[i].subject}"),
            model.text.token_texts(ids[i : i + 1]),
        )
        got = ca.lenses.patchscope(
            model, prompt, target=target, target_back=1, answer=answer[0].strip(), decode=1, samples=4
        )
        each.append(got.probability)
        null.append(got.null.mean(1))
        plain.append(got.unpatched)
    p, chance = torch.stack(each), torch.stack(null)
    for layer in (0, 5, 10, 15, 20, 25, 30):
        name = "embedding" if not layer else f"layer {layer - 1:02}"
        row = mean(p[:, layer], chance[:, layer])
        results.row(SECTION, f"patchscope: capital of a country, {name}", len(chosen), p=row)
    results.row(SECTION, "patchscope: capital of a country, unpatched", len(chosen), p=mean(torch.stack(plain)))
    assert float(mean_interval(p[:, 0])[0]) > float(chance[:, 0].max())
