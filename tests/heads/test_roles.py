"""Roles of heads on a task: planted heads are found, numbers are those of plain computations and of other methods."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

import cutaway as ca
from cutaway.cli import app
from cutaway.core.refuse import Refused
from cutaway.heads import roles
from cutaway.heads.task_roles import NAMES
from cutaway.models.edits.edit import Edit
from cutaway.models.model import Model
from cutaway.tasks import Pair, Task
from tests.conformance import subjects

IO, S1, AFTER, S2, END = 1, 3, 4, 9, 11  # of "<s> Mary and John went to the store , John gave to"
#: where the planted heads look from, and to
PLANTED = {(0, 0): (END, S2), (0, 1): (S2, S1), (0, 2): (S2, AFTER), (0, 3): (AFTER, S1),
           (1, 0): (END, IO), (1, 1): (END, IO), (1, 2): (END, S2)}  # fmt: skip


@dataclass(frozen=True)
class Looking(Edit):
    """Heads of one layer look from one position at another, whatever they would look at."""

    address: str
    positions: None = None

    def apply(self, x, frame):
        x = x.clone()
        for (layer, head), (q, k) in PLANTED.items():
            if self.address == f"pattern.{layer}" and x.shape[-1] > END:
                x[:, head, q] = 0
                x[:, head, q, k] = 1
        return x


def planted() -> Model:
    """A Llama in which head 1.0 copies what it looks at, 1.1 and 1.2 lower it, and no other component writes."""
    model = subjects.random_llama()
    names = [[model.text.token_id(" " + n) for n in subjects.NAMES],
             [model.tokenizer(n)["input_ids"][-1] for n in subjects.NAMES]]  # fmt: skip
    hf = model.hf.model
    with torch.no_grad():
        hf.embed_tokens.weight[:, :8] = 0
        model.hf.lm_head.weight.zero_()
        for i in range(8):
            for n in (names[0][i], names[1][i]):
                hf.embed_tokens.weight[n] = torch.eye(32)[i]
            model.hf.lm_head.weight[names[0][i], i] = 1
        for i, layer in enumerate(hf.layers):
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
            layer.self_attn.v_proj.weight.copy_(torch.cat([torch.eye(8, 32)] * 2))
            for h, sign in enumerate((2.0, -0.5, -1.0) if i == 1 else ()):
                layer.self_attn.o_proj.weight[:8, 8 * h : 8 * h + 8] = sign * torch.eye(8)
    return model


def test_planted_heads_have_their_roles_and_no_other():
    model, task = planted(), subjects.llama_task(6)
    with model.edited(Looking("pattern.0"), Looking("pattern.1")):
        got = roles(model, task, samples=4)
    assert got.record["heads"] == {
        "name mover": ["1.0"], "negative name mover": ["1.1"], "foil suppressor": ["1.2"], "S-inhibition": ["0.0"],
        "duplicate token": ["0.1"], "induction": ["0.2"], "previous token": ["0.3"],
    }  # fmt: skip
    assert got.named("name mover") == ["1.0"]
    for role, (layer, head) in zip(("S-inhibition", "name mover"), ((0, 0), (1, 0)), strict=True):
        assert float(got.score[NAMES.index(role), layer, head]) == 1.0
    unit = float(got.direct[1, 0]) / 2
    assert got.direct[1, :3].tolist() == pytest.approx([2 * unit, -0.5 * unit, unit], rel=1e-4)
    assert got.reasons["backup name mover"] == "no head is claimed to have it"


@dataclass(frozen=True)
class Backing(Edit):
    """From the end, head 0.0 looks at the answer, and head 1.0 there and, a fifth, at the end itself."""

    address: str
    positions: None = None

    def apply(self, x, frame):
        x = x.clone()
        if x.shape[-1] > END:
            x[:, 0, END] = 0
            x[:, 0, END, IO], x[:, 0, END, END] = (1.0, 0.0) if self.address == "pattern.0" else (0.8, 0.2)
        return x


def test_a_head_that_writes_more_without_the_mover_is_its_backup():
    """Head 0.0 moves the name, and writes it once more where 1.0 reads it as a reason to hold its own back."""
    model, task = planted(), subjects.llama_task(6)
    first, second = (layer.self_attn for layer in model.hf.model.layers)
    with torch.no_grad():
        second.o_proj.weight.zero_()
        for rows in (slice(0, 8), slice(8, 16)):
            first.o_proj.weight[rows, :8] = 2 * torch.eye(8)
        model.hf.model.embed_tokens.weight[:, 8:16] = 0
        second.v_proj.weight[:8, 8:16] = -2 * torch.eye(8)
        second.o_proj.weight[:8, :8] = torch.eye(8)
    with model.edited(Backing("pattern.0"), Backing("pattern.1")):
        got = roles(model, task, how="zero", samples=4)
    assert got.named("name mover")[0] == "0.0"
    assert got.named("backup name mover") == ["1.0"]
    assert float(got.grown[1, 0]) > float(got.grown_null[1, 0].max()) + 0.1
    assert float(got.direct[1, 0] + got.grown[1, 0]) > 0


def test_attention_is_that_between_the_words():
    model, task = subjects.random_llama(), subjects.uneven_task()
    got, each = roles(model, task, samples=2), []
    for pair in task:
        words = ["<s>", *pair.clean.replace(",", " ,").split()]
        first, repeat = (i for i, w in enumerate(words) if w == pair.foil.strip())
        end, answer, x = len(words) - 1, words.index(pair.answer.strip()), model.capture(pair.clean, "pattern")
        p = torch.stack([x[f"pattern.{i}"][0] for i in range(2)])  # [layer head q k]
        assert p.shape[-1] == len(words), "a word is a token"
        to = p[:, :, end, answer]
        each.append(torch.stack([
            to, to, p[:, :, end, first] + p[:, :, end, repeat], to, p[:, :, end, repeat], p[:, :, repeat, first],
            p[:, :, repeat, first + 1], p[:, :, first + 1, first], 0 * to,
        ]))  # fmt: skip
    torch.testing.assert_close(got.score[:-1], torch.stack(each).mean(0)[:-1], atol=1e-5, rtol=1e-4)
    assert got.score[-1].isnan().all(), "what the corruption changes is the foil, and no subject besides"


def test_direct_effects_and_joint_removals_are_those_of_other_methods():
    model = subjects.miniworld()
    task = ca.tasks.load("ioi", model, n=8)
    got = roles(model, task, samples=2)
    parts = ca.lenses.direct_attribution(model, task, samples=2)
    at = [i for i, c in enumerate(parts.labels["component"]) if c.startswith("head_out")]
    torch.testing.assert_close(got.direct.flatten(), parts.effect[at], atol=1e-4, rtol=1e-4)
    r, heads = NAMES.index("foil suppressor"), got.named("foil suppressor")
    assert "3.1" in heads, "heads that look at the foil solve it in this model"
    whole = ca.patching.group(model, task, heads=heads, how="mean", samples=2)
    torch.testing.assert_close(got.change[r], whole.effect, atol=1e-4, rtol=1e-4)
    assert got.record["random sets"]["foil suppressor"] == whole.record["random sets"]
    assert float(got.change_interval[r, 1]) < float(got.change_null[r].min())
    assert got.reasons["grown"] == "no name mover is claimed"


def test_growth_without_the_movers_is_that_under_hand_written_hooks():
    model, task, movers = subjects.random_llama(), subjects.llama_task(3), ((0, 1), (0, 2))
    bound, hf, kept = task.bind(model), model.hf, {}

    def direct() -> torch.Tensor:
        """Each head's share [prompt layer head] with the scale of the first run, in float64."""
        with torch.no_grad():
            stream = hf.model(bound.clean.ids).last_hidden_state
        assert stream.shape[0] == 3
        w = hf.lm_head.weight.double()
        toward = (w[bound.answers] - w[bound.foils]) * hf.model.norm.weight.double() / kept["scale"][:, None]
        z = torch.stack([kept[i][:, -1].double().unflatten(-1, (4, 8)) for i in range(2)], 1)
        o = torch.stack([x.self_attn.o_proj.weight.double().unflatten(-1, (4, 8)) for x in hf.model.layers])
        return torch.einsum("plhd,lmhd,pm->plh", z, o, toward).detach()

    def keep(i):
        return lambda _, args: kept.__setitem__(i, args[0])

    def scale(_, args):
        x = args[0][:, -1].double()
        kept.setdefault("scale", (x.square().mean(-1) + hf.config.rms_norm_eps).sqrt())

    hooks = [hf.model.layers[i].self_attn.o_proj.register_forward_pre_hook(keep(i)) for i in range(2)]
    hooks.append(hf.model.norm.register_forward_pre_hook(scale))
    before = direct()

    def remove(_, args):
        z = args[0].unflatten(-1, (4, 8)).clone()
        for _, h in movers:
            z[:, 1:, h] = z[:, 1:, h].mean((0, 1))
        return (z.flatten(-2),)

    hooks.insert(0, hf.model.layers[0].self_attn.o_proj.register_forward_pre_hook(remove, prepend=True))
    grown = direct() - before
    for hook in hooks:
        hook.remove()
    got = roles(model, task, movers=("0.1", "0.2"), samples=2)
    torch.testing.assert_close(got.grown.double(), grown.mean(0), atol=2e-5, rtol=1e-4)
    assert float(grown[:, 1].abs().max()) > 0.01
    assert int(got.removed[0]) == 2
    assert float(got.looks[0]) == 0, "what movers look at does not hang on what they write"


def test_what_cannot_be_asked_is_refused(capsys):
    model, task = subjects.random_llama(), subjects.llama_task()
    with pytest.raises(Refused, match="share of attention"):
        roles(model, task, least=1.0)
    with pytest.raises(Refused, match=r"9\.9"):
        roles(model, task, movers=("9.9",))
    facts = ca.tasks.load("facts", subjects.miniworld(), n=4)
    told = roles(subjects.miniworld(), facts, samples=2)
    assert told.record["prompts with the keys"] == dict.fromkeys(NAMES, 0) | {"subject head": 4}
    x = [subjects.miniworld().capture(p.clean, "pattern.4")["pattern.4"][0] for p in facts]
    at = [facts.bind(subjects.miniworld()).span("subject")[i].nonzero()[:, 0] for i in range(4)]
    by_hand = torch.stack([p[:, -1, k].sum(-1) for p, k in zip(x, at, strict=True)]).mean(0)
    torch.testing.assert_close(told.score[-1, 4], by_hand, atol=1e-5, rtol=1e-4)
    unsaid = Pair("Mary and Anna went to the", "Mary and Anna went to a", " park", " river")
    with pytest.raises(Refused, match="says its answer, its foil"):
        roles(model, Task("places", [unsaid]))
    once = roles(model, Task("once", [Pair("Mary and Anna went to", "Lucy and Anna went to", " Mary", " Anna")] * 2))
    assert once.reasons["duplicate token"] == "no prompt has such places"
    assert once.score[NAMES.index("duplicate token")].isnan().all()
    assert once.score[NAMES.index("name mover")].isfinite().all()
    line = "heads roles --model miniworld --task ioi --task-n 2 --samples 2 --movers 4.0,4.3 --json"
    assert app.main(line.split()) == 0
    assert json.loads(capsys.readouterr().out)["record"]["heads"]["name mover"] == ["4.0", "4.3"]
