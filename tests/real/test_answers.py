"""Answers of several tokens, and chats: against plain transformers, and a finding on each with interval and control."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cutaway as ca
from cutaway.interventions.effects import Effects
from cutaway.tasks import Pair, Task
from tests.real import sets
from tests.real.written import mean, measure, share

ANSWERS = "answers of several tokens, and chats"
N = 16
pytestmark = pytest.mark.parametrize("name", ["smollm2"], indirect=True)


@pytest.fixture(scope="module")
def long() -> Task:
    """Countries whose capitals are two to six tokens here, each against the next one's."""
    pairs = [replace(sets.pair(row), group="") for row in sets.rows("fact_capital_long")]
    return Task("capitals of several tokens", pairs)


def said(model: ca.Model, prompt: str, text: str) -> float:
    """log P(text | prompt) from one plain forward of both."""
    first, whole = (model.tokenizer(t, return_tensors="pt")["input_ids"] for t in (prompt, prompt + text))
    assert torch.equal(whole[:, : first.shape[1]], first)
    with torch.no_grad():
        logits = model.hf(whole).logits[0].double().log_softmax(-1)
    return sum(float(logits[i - 1, whole[0, i]]) for i in range(first.shape[1], whole.shape[1]))


def test_the_metric_is_that_of_two_plain_runs(model, long, results):
    bound = long.bind(model)
    assert max(max(t) for t in bound.clean.tails) == 6
    found = {}
    for side, tokens in (("clean", bound.clean), ("corrupt", bound.corrupt)):
        found[side] = model.measure(tokens, bound.measure).cpu()
        plain = [said(model, getattr(p, side), p.answer) - said(model, getattr(p, side), p.foil) for p in long]
        assert torch.allclose(found[side], torch.tensor(plain), atol=2e-3), side
    right = model.measure(bound.clean, bound.measured_by("accuracy", model).measure)
    results.row(
        ANSWERS,
        "capitals of 2 to 6 tokens",
        len(long),
        **{"top-1": share(right > 0), "pair": share(found["clean"] > 0), "flip": share(found["corrupt"] < 0)},
        Δ=mean(found["clean"]),
    )
    assert float((found["clean"] > 0).float().mean()) > 0.9


def test_the_same_head_brings_capitals_of_several_tokens(model, long, results):
    """Head 23.4, which brings capitals of one token, beside its whole layer and a layer before."""
    got = ca.patching.activation(model, long.take(N), site=("z.20.*", "z.23.*"), samples=4)
    assert got.units["effect"] == "nats"
    _strongest(got, "23.4", "a capital of several tokens", results)


def test_a_chat_is_what_transformers_makes_of_it(model):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = ca.chat(model, messages)
    wanted = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert model.tokens(prompt).ids[0].tolist() == list(wanted)
    assert model.generate(prompt, 12) == ["The capital of France is Paris."]
    labels = model.tokens(prompt).labels()
    assert [n for n in labels if "turn" in n or "line" in n] == [
        "system turn", "system line", "user turn", "user line", "assistant turn", "assistant line",
    ]  # fmt: skip


def test_a_question_finds_its_counterfactual_in_what_the_user_says(model):
    prompt = _asked(model, "France")
    task = ca.tasks.with_siblings(model, ca.tasks.from_sentence(model, prompt), 6)
    assert task.pairs[0].answer == " Paris"
    assert len(task) == 6
    for pair in task:
        for text in (pair.clean, pair.corrupt):
            country = text.rsplit(" of ", 1)[1].removesuffix(" is")
            assert text == _asked(model, country)


def test_the_same_head_answers_in_a_chat(model, results):
    """The user asks, the reply has begun: the country stands in both, and the head reads it."""
    pairs = []
    for row in sets.rows("fact_capital"):
        a, b = (row[side].removeprefix("The capital of ").removesuffix(" is") for side in ("prompt", "corrupt"))
        if row["prompt"].startswith("The capital of ") and row["prompt"].endswith(" is"):
            pairs.append(Pair(_asked(model, a), _asked(model, b), row["answer"], row["foil"]))
    lengths = [len({len(r) for r in sets.ids(model.tokenizer, [p.clean, p.corrupt])}) for p in pairs]
    task = Task("capitals in a chat", [p for p, n in zip(pairs, lengths, strict=True) if n == 1][:N])
    assert len(task) == N
    got = ca.patching.activation(model, task, site=("z.20.*", "z.23.*"), samples=4)
    _strongest(got, "23.4", "a capital in a chat", results)


def _asked(model: ca.Model, country: str) -> str:
    messages = [
        {"role": "user", "content": f"What is the capital of {country}?"},
        {"role": "assistant", "content": f"The capital of {country} is"},
    ]
    return ca.chat(model, messages)


def _strongest(got: Effects, head: str, what: str, results) -> None:
    """A head moves the answer most, and by more than random steps of the same length at any."""
    nodes = got.labels["node"]
    i = nodes.index(f"z.{head}")
    recovered = {"value": float(got.recovered[i])}
    effect = measure(got.effect[i], got.interval[i], got.null[i])
    results.row(ANSWERS, f"{what}: {head}", len(got.clean), effect=effect, recovered=recovered)
    rest = got.effect[[n for n in range(len(nodes)) if n != i]]
    spread = {"value": float(rest.mean()), "range": [float(rest.min()), float(rest.max())]}
    results.row(ANSWERS, f"{what}: other heads of 20 and 23", len(got.clean), effect=spread)
    assert int(got.effect.argmax()) == i
    assert float(got.interval[i, 0]) > float(got.null.abs().max())
