"""The page of one neuron, against its definition written out and a neuron planted by hand."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch

import cutaway as ca
from cutaway.cli import app
from cutaway.core.refuse import Refused
from cutaway.models.model import Model
from cutaway.models.tokens import batch
from cutaway.neurons import card, memories, statistics, triggers, values
from tests.conformance import subjects
from tests.neurons.test_triggers import planted, rows

LAYER, NEURON = 1, 17


def by_text(model: Model, texts: list[list[int]], held: float | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The activations of every neuron of the layer and the losses of each text, with plain modules; with `held`, the
    neuron is at that value everywhere but at the first token.
    """
    found = []

    def see(module, args):
        x = args[0]
        if held is not None:
            x = torch.cat([x[..., :NEURON], torch.full_like(x[..., :1], held), x[..., NEURON + 1 :]], -1)
            x = torch.cat([args[0][:, :1], x[:, 1:]], 1)
        found.append(x[0].detach())
        return (x,)

    hook = model.hf.model.layers[LAYER].mlp.down_proj.register_forward_pre_hook(see)
    losses = []
    for ids in texts:
        logits = model.hf(torch.tensor([ids])).logits[0, :-1].detach()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
    hook.remove()
    return list(zip(found, losses, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_number_is_that_of_the_definition_whatever_the_padding(side, monkeypatch):
    monkeypatch.setattr(memories, "_TOKENS", 40)  # several batches
    model, texts, tokens = subjects.family("llama_gqa"), rows(9, 12), Model.tokens
    monkeypatch.setattr(ca.tasks.Prompts, "bind", lambda self, model: tokens(model, batch(self.ids, side=side)))
    got = card(model, ca.tasks.as_prompts([*texts, texts[0]]), neuron=f"{LAYER}.{NEURON}", examples=1, samples=3)
    assert got.record["texts"] == 9, "a text that is there twice counts once"
    plain = by_text(model, texts)
    c = torch.cat([x[1:-1, NEURON] for x, _ in plain])
    order = c.argsort()
    parts = [order[[i for i in range(len(c)) if i * 10 // len(c) == d]] for d in range(10)]
    torch.testing.assert_close(got.strength, torch.stack([c[p].mean() for p in parts]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.activation, torch.stack([c[p].max() for p in reversed(parts)]), rtol=1e-4, atol=1e-6)
    assert got.labels["example"][0].startswith("10: ")
    assert got.density.tolist() == pytest.approx(
        [float((x > 0).float().mean()) for x in (c, c.abs() - c.abs().max() / 10)]
    )
    at = [max(1, math.ceil(float(q) * len(c))) - 1 for q in got.labels["quantiles"]]
    torch.testing.assert_close(got.quantile, c.sort().values[at], rtol=1e-4, atol=1e-6)
    held = by_text(model, texts, float(torch.cat([x[1:, NEURON] for x, _ in plain]).mean()))
    rise = torch.cat([new[1:] - old[1:] for (_, old), (_, new) in zip(plain, held, strict=True)])
    between = torch.cat(parts[1:-1])
    expected = torch.stack([rise[parts[-1]].mean(), rise[between].mean(), rise[parts[0]].mean()])
    torch.testing.assert_close(got.effect, expected, rtol=1e-3, atol=1e-6)
    largest = max(float(x[1:-1, NEURON].max()) for x, _ in plain)
    assert float(got.window[0, got.labels["offset"].index("0")]) == pytest.approx(largest, rel=1e-4)
    whole = {"value": memories.values(model, LAYER), **memories.keys(model, LAYER)}
    assert got.norm.tolist() == pytest.approx([float(whole[n][NEURON].norm()) for n in got.labels["vector"]])


def test_it_agrees_with_the_methods_that_it_is_made_of():
    model, prompts, name = subjects.family("llama_gqa"), ca.tasks.as_prompts(rows(9, 12)), f"{LAYER}.{NEURON}"
    got = card(model, prompts, neuron=name, tokens=5, samples=4)
    for i, sign in enumerate(("positive", "negative")):
        k = max(1, sum(len(r) - 2 for r in rows(9, 12)[1::2]) // 4)
        alone = triggers(model, prompts, neurons=name, contexts=min(10, k), sign=sign, samples=4)
        assert torch.equal(got.share[i], alone.share[0])
        assert torch.equal(got.agreement_null[i], alone.agreement_null[0])
    alone = values(model, prompts, neurons=name, tokens=5, samples=4)
    for field, side in (("promotes", "promotes"), ("gate_reads", "gate reads"), ("reads", "linear reads")):
        mine = getattr(got, field), getattr(got, f"{field}_null")
        at = alone.labels["side"].index(side)
        assert float(mine[0].mean()) == pytest.approx(float(alone.score[at, 0]))
        torch.testing.assert_close(mine[1].mean(0), alone.null[at, 0])
    assert torch.equal(got.score, statistics(model, prompts, layers=(LAYER,)).score[:, 0, NEURON])
    best = got.labels["neighbours"][0].split()[-1]
    layer, n = map(int, best.split("."))
    cosine = torch.cosine_similarity(memories.values(model, layer)[n], memories.values(model, LAYER)[NEURON], dim=0)
    assert float(got.neighbour[0]) == pytest.approx(float(cosine), abs=1e-6)
    rest = torch.cosine_similarity(memories.values(model, layer), memories.values(model, LAYER)[NEURON, None], dim=1)
    assert int((rest > got.neighbour[0] + 1e-6).sum()) == int(layer == LAYER), "only the neuron itself is nearer"


def test_a_planted_neuron_is_told_in_its_largest_decile_alone():
    names = ("Anna", "Tom", "Lucy", "Paul", "Emma", "John", "Peter", "Anna")
    form = "Then {} went near Mary to the {} and {} gave it to me near Mary to"
    texts = [form.format(a, place, b) for a, b in pairwise(names) for place in ("park", "store")]
    model = planted()
    with torch.no_grad():
        model.hf.model.layers[0].mlp.down_proj.weight[:, 7] *= 0.003  # its mean says nothing
        model.hf.lm_head.weight *= 10
    got = card(model, ca.tasks.as_prompts(texts), neuron="0.7", samples=20)
    at = got.labels["span"].index("largest decile")
    assert float(got.effect_interval[at, 0]) > float(got.effect_null[at].max()), "it alone foretells what follows Mary"
    elsewhere = got.labels["span"].index("between")
    assert abs(float(got.effect[elsewhere])) < float(got.effect[at]) / 5
    end = got.labels["end"].index("largest")
    assert got.share[end] == got.agreement[end] == 1
    assert got.labels["example"][0].endswith("⟦ Mary⟧")
    assert not any(name.endswith("⟦ Mary⟧") for name in got.labels["example"] if name.startswith("5: "))
    assert got.labels["promoted"][0].strip() == "to"
    assert got.labels["gate_read"][0].strip() == "Mary"
    assert float(got.promotes[0]) > float(got.promotes_null[0].max()) + 1


def test_a_model_without_gates_has_one_key_and_few_tokens_say_which_deciles_are_empty():
    got = card(subjects.family("gpt2"), ca.tasks.as_prompts([[5, 6, 7, 8, 9]]), neuron="0.3", samples=2)
    assert got.gate_reads is None
    assert got.labels["vector"] == ["value", "reads"]
    empty = [name for name, x in zip(got.labels["decile"], got.strength.tolist(), strict=True) if x != x]
    assert len(empty) == 7
    assert all(got.reasons[name] == "3 tokens do not fill every decile" for name in empty)
    assert got.share.isnan().all()
    assert "held out" in got.reasons["share"]


@pytest.mark.parametrize(
    ("neuron", "why"), [("", "about one neuron"), ("1.*", "48 neurons"), ("1", "layer.neuron"), ("1.999", "1.999")]
)
def test_what_is_not_one_neuron_is_refused(neuron, why):
    with pytest.raises(Refused, match=why):
        card(subjects.family("llama"), ca.tasks.as_prompts(rows(2, 6)), neuron=neuron)


def test_the_command_shows_the_page(capsys, tmp_path):
    (tmp_path / "texts.txt").write_text("The capital of Norway is Oslo\nThe capital of France is Paris\n", "utf-8")
    words = ["neurons", "card", "--model", "miniworld", "--neuron", "3.17", "--prompts", str(tmp_path / "texts.txt")]
    assert app.main(words) == 0
    shown = capsys.readouterr().out
    for word in ("effect", "window", "strength", "promotes", "gate reads", "neighbour", "neuron 3.17"):
        assert word in shown
    assert app.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["record"]["texts"] == 2
