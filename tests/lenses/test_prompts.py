"""Lenses on prompts alone: a text, several, or token ids, without a task's answer and foil."""

from __future__ import annotations

import json

import pytest
import torch

import cutaway as ca
from cutaway.cli import app
from cutaway.core.refuse import Refused
from cutaway.tasks.task import Task
from tests.conformance import subjects

LENSES = [ca.lenses.logit_lens, ca.lenses.lens_grid, ca.lenses.direct_attribution]
PAIRS = subjects.numbered_task().pairs
TEXTS = [p.clean for p in PAIRS]
lenses = pytest.mark.parametrize("lens", LENSES)


def test_with_the_tasks_answer_a_lens_on_prompts_is_the_lens_on_the_task():
    """The same prompt and answer give the same bits: probability, rank, null and grid; only the foil is missing."""
    model, task = subjects.family("llama_gqa"), Task("one", PAIRS[:1])
    on_task, on_text = (
        ca.lenses.logit_lens(model, task, samples=3),
        ca.lenses.logit_lens(model, TEXTS[0], answer="w61", samples=3),
    )
    assert on_text.foil_probability is None
    assert all(torch.equal(t, getattr(on_task, n)) for n, t in on_text.tensors().items() if n != "interval")
    grid, other = ca.lenses.lens_grid(model, task), ca.lenses.lens_grid(model, TEXTS[0], answer="w61")
    assert all(torch.equal(t, getattr(grid, n)) for n, t in other.tensors().items())


def test_without_an_answer_the_models_own_next_tokens_are_followed():
    model = subjects.family("llama_gqa")
    with torch.no_grad():
        logits = model.hf(model.tokens(TEXTS).ids).logits[:, -1]
    curve = ca.lenses.logit_lens(model, TEXTS, samples=2)
    torch.testing.assert_close(curve.probability[-1], logits.softmax(-1).amax(-1).mean(), rtol=1e-4, atol=1e-6)
    assert curve.rank[-1] == 0
    assert curve.record["answer"] == "the model's own next token"
    own = [int(i) for i in logits.argmax(-1)]
    named = torch.stack(
        [ca.lenses.logit_lens(model, t, answer=f"w{i}").probability for t, i in zip(TEXTS, own, strict=True)]
    )
    torch.testing.assert_close(curve.probability, named.mean(0), rtol=1e-4, atol=1e-6)
    grid = ca.lenses.lens_grid(model, TEXTS)
    assert (int(grid.token[-1, -1]), int(grid.answer_rank[-1, -1])) == (own[0], 0)


def test_the_null_picks_its_token_as_the_lens_does():
    """A random model's own token beats that of all 8 rotations once in 9 times, although it is chosen as the top."""
    above = below = 0
    for seed in range(45):
        curve = ca.lenses.logit_lens(subjects.random_llama(seed), subjects.llama_task(1).pairs[0].clean, seed=seed)
        above += bool(curve.probability[-1] > curve.null[-1].max())
        below += bool(curve.probability[-1] < curve.null[-1].min())
    assert 1 <= above <= 12  # 5 expected; the binomial tail beyond is 0.2 %
    assert 1 <= below <= 12


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "gemma2"])
def test_shares_of_prompts_sum_to_the_answers_own_logit(name):
    """By definition: the shares of a task are those of its answer less those of its foil, taken one by one."""
    model = subjects.family(name)
    answer, foil = (
        ca.lenses.direct_attribution(model, TEXTS[0], answer=getattr(PAIRS[0], r), samples=2)
        for r in ("answer", "foil")
    )
    both = ca.lenses.direct_attribution(model, Task("one", PAIRS[:1]), samples=2)
    torch.testing.assert_close(answer.effect - foil.effect, both.effect, atol=1e-5, rtol=0)
    torch.testing.assert_close(answer.effect.sum(), answer.total[0], atol=1e-4, rtol=0)
    if name != "gemma2":  # which caps its logits
        torch.testing.assert_close(answer.total[0], model.run_last(TEXTS[0])[0, 61].float(), atol=1e-4, rtol=0)
    assert answer.record["shares of"] == "logit(answer)"
    assert both.record["shares of"] == "logit(answer) − logit(foil)"


@lenses
def test_texts_tokens_and_ids_are_the_same_prompts(lens):
    model = subjects.family("llama_gqa")
    tokens = model.tokens(TEXTS)
    ways = [TEXTS, ca.tasks.as_prompts(TEXTS), tokens, tokens.ids, tokens.ids.tolist()]
    first, *others = (lens(model, way, samples=2, answer="w61") for way in ways)
    for other in others:
        assert all(torch.equal(t, getattr(first, n)) for n, t in other.tensors().items())
        assert other.labels == first.labels
    assert "no flag says token ids" in others[-1].record["command"]
    made = ca.tasks.as_prompts(tokens).made
    assert made is not None
    assert eval(made.python, {"ca": ca}).ids == tuple(map(tuple, tokens.ids.tolist()))


@lenses
def test_what_a_lens_cannot_follow_is_refused(lens):
    model = subjects.miniworld()
    for wrong, options, why in [
        (Task("one", subjects.llama_task(1).pairs), {"answer": " Mary"}, "answers of its own"),
        ("The capital of Norway is", {"answer": "oslo and tokyo"}, "tokens"),
        ("", {}, "empty"), ([], {}, "empty"), ([[]], {}, "empty"), ([1.5], {}, "neither"), (["a", 3], {}, "neither"),
        ([[model.shape.d_vocab]], {}, "token ids from 0"), (3, {}, "Model, Task or Prompts"),
    ]:  # fmt: skip
        with pytest.raises(Refused, match=why):
            lens(model, wrong, **options)


def test_methods_that_need_a_foil_say_how_to_get_one():
    for prompt in ("The capital of Norway is", ca.tasks.as_prompts("The capital of Norway is")):
        with pytest.raises(Refused, match="it takes Model, Task") as refusal:
            ca.patching.activation(subjects.miniworld(), prompt)
        assert "from_sentence(model, text)" in refusal.value.instead


def test_a_command_takes_a_task_or_prompts(capsys, tmp_path):
    text = "The capital of Norway is"
    for name in ("logit_lens", "lens_grid", "direct_attribution"):
        assert app.main(["lenses", name, "--prompts", text, "--samples", "2", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        own = getattr(ca.lenses, name)(subjects.miniworld(), text, samples=2)
        assert said["record"]["subjects"]["prompts"] == own.record["subjects"]["prompts"]
        main = torch.tensor(said["fields"][own.main]["values"])
        assert torch.equal(main, getattr(own, own.main))
        assert said["record"]["command"].endswith(f"--model miniworld --prompts '{text}' --samples 2")
    (tmp_path / "two.txt").write_text(f"{text}\nThe capital of Japan is\n", "utf-8")
    assert app.main(["lenses", "logit_lens", "--prompts", str(tmp_path / "two.txt"), "--answer", "oslo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["record"]["subjects"]["prompts"]["prompts"] == 2
    for words, why in [
        ([], "--task or --prompts"), (["--prompts", text, "--task", "ioi"], "both are given"),
        (["--task-n", "3"], "without --task"), (["--prompts", text, "--task-n", "3"], "both are given"),
    ]:  # fmt: skip
        assert app.main(["lenses", "logit_lens", *words]) == 2
        assert why in " ".join(capsys.readouterr().err.split())
    assert app.main(["lenses", "logit_lens", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "this or --prompts" in shown
    assert "this or --task" in shown
