"""Retrieval heads: greedy generation by plain transformers, removals by a hook, and two models whose truth is known."""

from __future__ import annotations

import json
import math

import pytest
import torch

import cutaway as ca
from cutaway.cli import app
from cutaway.core.refuse import Refused
from cutaway.heads import retrieval
from cutaway.tasks import Needles
from tests.conformance import subjects


@torch.no_grad()
def generated(hf, row: list[int], span: range, steps: int) -> torch.Tensor:
    """The count of Wu et al.: tokens of the greedy continuation of a row that each head looks hardest at in a span."""
    found, ids = torch.zeros(1), list(row)
    for _ in range(steps):
        out = hf(torch.tensor([ids]), output_attentions=True)
        said = int(out.logits[0, -1].argmax())
        at = torch.stack([a[0, :, -1].argmax(-1) for a in out.attentions])  # [layer, head]
        found = found + torch.tensor([[k in span and ids[k] == said for k in heads] for heads in at.tolist()]).float()
        ids.append(said)
    return found / steps


def test_scores_are_those_of_greedy_generation_where_answers_are_right():
    model, needles = ca.load("induction", attention="eager"), Needles(10, 16, 6)
    hidden = needles.bind(model)
    got = retrieval(model, needles, sizes=(1,), samples=2)
    own, right = [], []
    for row, start, end in zip(hidden.tokens.ids.tolist(), hidden.start.tolist(), hidden.end.tolist(), strict=True):
        own.append(generated(model.hf, row[:-4], range(start, end), 4))
        ids = model.hf.generate(torch.tensor([row[:-4]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        right.append(ids[0].tolist() == row)
    assert sum(right) == 7, "the others differ from the answer, and so do their runs"
    for d in range(5):
        mine = [own[i] for i in (d, d + 5) if right[i]]
        if len(mine) == 2:
            torch.testing.assert_close(got.by_depth[d], torch.stack(mine).mean(0))
            assert float(got.answered[d]) == 1.0
    assert float(got.score.max()) > 0.7


@torch.no_grad()
def test_effects_are_those_of_a_hook_on_the_other_rounds_of_depths():
    model, needles = ca.load("induction"), Needles(20, 16, 6)
    got = retrieval(model, needles, sizes=(2,), how="zero", samples=2)
    hidden, heads = needles.bind(model), [int(h.split(".")[1]) for h in got.record["heads in order"]]
    assert {h.split(".")[0] for h in got.record["heads in order"]} == {"1"}

    def zeroed(_, args):
        z = args[0].unflatten(-1, (4, -1)).clone()
        z[:, :, heads] = 0
        return (z.flatten(-2),)

    def losses() -> torch.Tensor:
        each = torch.full((20, 2), math.nan)
        for i in (*range(5, 10), *range(15, 20)):
            row, needle = hidden.tokens.ids[i], range(int(hidden.start[i]), int(hidden.end[i]))
            loss = -model.hf(row[None]).logits[0, :-1].log_softmax(-1).gather(-1, row[1:, None])[:, 0]
            around = [k - 1 for k in range(2, len(row) - 6) if k not in needle]  # the last six ask, and are answered
            each[i] = torch.stack([loss[-4:].mean(), loss[around].mean()])
        return each

    before = losses()
    handle = model.hf.model.layers[1].self_attn.o_proj.register_forward_pre_hook(zeroed)
    rise = losses() - before
    handle.remove()
    torch.testing.assert_close(got.effect[:, 0], rise.nanmean(0), atol=1e-4, rtol=1e-4)
    assert got.record["loss with all heads"] == pytest.approx(before.nanmean(0).tolist(), abs=1e-4)


def test_the_heads_of_the_induction_model_retrieve_and_none_of_its_twin():
    got = retrieval(ca.load("induction"), Needles(), sizes=(2, 5))
    assert set(got.named()) == {"1.0", "1.1", "1.2", "1.3"}
    assert got.overlap.tolist() == [1.0, 1.0]
    assert float(got.answered[1:4].min()) > 0.9
    assert float(got.effect_interval[0, 0, 0]) > 1 > float(got.effect_interval[1, 0, 1])
    assert float(got.attended_null.max()) < 0.1
    assert got.effect[:, 1].isnan().all()
    assert got.reasons["5"] == "4 heads retrieve a token of the first half"
    twin = retrieval(ca.load("shortcut"), Needles(), samples=2)
    assert not twin.named()
    assert float(twin.score.max()) == 0.0
    assert twin.reasons["overlap"] == "no head is claimed"
    assert twin.reasons["1"] == "no heads retrieve a token of the first half"


def test_the_bundled_model_loses_its_needles_with_four_heads():
    got = retrieval(subjects.miniworld(), Needles(20), sizes=(4,), samples=4)
    assert set(got.record["heads"]) == {"3.0", "3.2", "4.0", "4.3"}
    assert float(got.effect_interval[0, 0, 0]) > float(got.effect_null[0, 0].max()) + 1, "nats"
    assert float(got.accuracy[0, 0]) < 0.2 < float(got.accuracy_null[0, 0].min())


def test_the_command_hides_sentences_in_texts(tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(subjects.miniworld().world.words()), "utf-8")
    asked = {"needle": "The capital of Norway is Oslo.", "question": "The capital of Norway is", "answer": "Oslo"}
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked), "utf-8")
    files = f"--needles-texts {tmp_path / 'texts.txt'} --needles-asked {tmp_path / 'asked.jsonl'}"
    assert app.main(f"heads retrieval --needles 10 --sizes 1 --samples 2 --json {files}".split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["record"]["subjects"]["needles"]["sentences"] == 1
    assert all(f in found["record"]["command"] for f in ("--needles-asked", "--needles-texts"))


def test_what_cannot_be_asked_is_refused():
    model = subjects.random_llama()
    with pytest.raises(Refused, match="a score is a share of tokens"):
        retrieval(model, Needles(10, 8, 4), least=1.0)
    with pytest.raises(Refused, match="a set has at least one head"):
        retrieval(model, Needles(10, 8, 4), sizes=(0,))
    with pytest.raises(Refused, match="the model takes 64"):
        retrieval(model, Needles(10, 60, 4))
