"""Function vectors: effects, gains and removals by hooks on plain transformers, and the bundled model's functions."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from cutaway.cli import app
from cutaway.core.refuse import Refused
from cutaway.heads import function_vectors
from cutaway.heads.shots import Shots, show
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks import Concepts, concepts
from tests.conformance import subjects

WORDS = ("Mary", "John", "Anna", "Peter", "Tom", "Lucy", "store", "park", "school", "river", "market", "garden")
PLACES = tuple(zip(WORDS[:6], WORDS[6:], strict=True))
TASKS = Concepts(("next", "place"), (tuple(pairwise(WORDS[:7])), PLACES))
OPTIONS = {"prompts": 4, "shots": 2, "top": 2, "samples": 2}


def rows(tokens: Tokens) -> list[torch.Tensor]:
    return [ids[mask] for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]


@torch.no_grad()
def last_z(model: Model, tokens: Tokens) -> torch.Tensor:
    """z at the last token of each prompt: [prompt, layer, head, d_head]."""
    kept: list[torch.Tensor] = []
    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0][0, -1]))
             for layer in model.hf.model.layers]  # fmt: skip
    for ids in rows(tokens):
        model.hf(ids[None])
    for handle in hooks:
        handle.remove()
    return torch.stack(kept).unflatten(-1, (4, 8)).unflatten(0, (-1, 2))


@torch.no_grad()
def said(model: Model, some: Shots, tokens: Tokens, i: int) -> torch.Tensor:
    """Probability of the answer, top-1, log-probability and logit(answer) − logit(foil) of one prompt."""
    logits, a, f = model.hf(rows(tokens)[i][None]).logits[0, -1], int(some.answer[i]), int(some.foil[i])
    p = logits.log_softmax(-1)[a]
    return torch.stack([p.exp(), (logits.argmax() == a).float(), p, logits[a] - logits[f]])


def test_effects_are_those_of_hooks():
    model = subjects.random_llama()
    got = function_vectors(model, TASKS, **OPTIONS, null_cells=3)
    chose, _, _ = show(model, TASKS, 4, 2, "{} ->", "; ")
    z = last_z(model, chose.shown)
    assert len(z) == 8
    assert int(got.null[..., 0].isfinite().sum()) == 3
    for layer, head in ((0, 1), (1, 0), (1, 3)):
        each = []
        for i in range(8):
            others = [j for j in range(8) if chose.task[j] == chose.task[i] and chose.word[j] != chose.word[i]]
            mean = z[others, layer, head].mean(0)

            def put(_, args, mean=mean, head=head):
                x = args[0].clone()
                x[0, -1, 8 * head : 8 * head + 8] = mean
                return (x,)

            before = said(model, chose, chose.shuffled, i)
            handle = model.hf.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(put)
            each.append(said(model, chose, chose.shuffled, i) - before)
            handle.remove()
        own = torch.stack(each)
        assert float(got.effect[layer, head]) == pytest.approx(float(own[:, 0].mean()), abs=1e-6)
        assert float(got.logits[layer, head]) == pytest.approx(float(own[:, 3].mean()), abs=1e-5)
        torch.testing.assert_close(got.by_task[:, layer, head], torch.stack([own[:4, 0].mean(), own[4:, 0].mean()]))


def test_vectors_gains_and_removals_are_those_of_hooks():
    model = subjects.random_llama()
    got = function_vectors(model, TASKS, **OPTIONS, scales=(1, 3))
    chose, held, _ = show(model, TASKS, 4, 2, "{} ->", "; ")
    best = [tuple(map(int, h.split("."))) for h in got.record["heads"]]
    assert {(i // 4, i % 4) for i in got.effect.flatten().argsort()[-2:].tolist()} == set(best)
    z, o = last_z(model, chose.shown), [m.self_attn.o_proj.weight.unflatten(1, (4, 8)) for m in model.hf.model.layers]
    vectors = [sum(o[i][:, h] @ z[chose.task == t, i, h].mean(0) for i, h in best).detach() for t in (0, 1)]
    torch.testing.assert_close(got.vector, torch.stack(vectors))

    def added(layer: int, k: int) -> torch.Tensor:
        def add(_, args, out):
            x = (out[0] if isinstance(out, tuple) else out).clone()
            x[0, -1] += k * vectors[t]
            return (x, *out[1:]) if isinstance(out, tuple) else x

        each = []
        for i in range(len(held.task)):
            t, before = int(held.task[i]), said(model, held, held.bare, i)
            handle = model.hf.model.layers[layer].register_forward_hook(add)
            each.append(said(model, held, held.bare, i) - before)
            handle.remove()
        return torch.stack(each).mean(0)[:3]

    for s, k in enumerate((1, 3)):
        for layer in (0, 1):
            torch.testing.assert_close(got.gain[s, :, layer], added(layer, k), atol=1e-5, rtol=1e-4)
    every = torch.cat([ids[1:] for ids in rows(held.shown)])
    acts = model.capture(held.shown, ["z.0", "z.1"])
    assert len(every) == int(held.shown.mask.sum()) - len(held.task)
    mean = {
        i: torch.cat([acts[f"z.{i}"][b, 1 : len(ids)] for b, ids in enumerate(rows(held.shown))]).mean(0)
        for i in (0, 1)
    }
    before = torch.stack([said(model, held, held.shown, i) for i in range(len(held.task))])

    def removed(_, args, layer):
        x = args[0].unflatten(-1, (4, 8)).clone()
        for i, h in best:
            if i == layer:
                x[:, 1:, h] = mean[i][h]
        return (x.flatten(-2),)

    hooks = [m.self_attn.o_proj.register_forward_pre_hook(lambda m, args, i=i: removed(m, args, i))
             for i, m in enumerate(model.hf.model.layers)]  # fmt: skip
    after = torch.stack([said(model, held, held.shown, i) for i in range(len(held.task))])
    for handle in hooks:
        handle.remove()
    torch.testing.assert_close(got.change, (after - before).mean(0)[:3], atol=1e-5, rtol=1e-4)


def test_prompts_show_words_that_choose_and_ask_about_others():
    model = subjects.miniworld()
    chose, held, short = show(model, concepts("world", model), 6, 4, "{} ->", "; ")
    assert not short.keys() & set(chose.names)
    words = {n: dict(pairs) for n, pairs in model.world.functions().items()}
    seen: dict[str, set[str]] = {}
    for some in (chose, held):
        for i, t in enumerate(some.task.tolist()):
            shown, shuffled, bare = ([p.strip() for p in tokens.texts[i].split(";")] for tokens in some.conditions)
            *examples, last = ([w.strip() for w in p.split("->")] for p in shown)
            exchanged = [p.split("->")[1].strip() for p in shuffled[:-1]]
            name = some.names[t]
            assert [last[0] + " ->"] == bare == [shuffled[-1]]
            assert all(words[name][a] == b for a, b in examples)
            assert sorted(exchanged) == sorted(b for _, b in examples)
            assert last[0] not in [a for a, _ in examples]
            seen.setdefault(name, set()).update(a for a, _ in examples)
            assert model.text.token_id(words[name][last[0]]) == int(some.answer[i]) != int(some.foil[i])
            if some is held:
                assert last[0] not in seen[name], "held out"


def test_vectors_of_four_heads_make_the_bundled_model_do_its_functions_without_examples():
    model = subjects.miniworld()
    world = concepts("world", model)
    names = ("antonym", "same_adjective", "plural", "same_noun", "next_letter", "same_letter")
    some = Concepts(names, tuple(dict(zip(world.names, world.pairs, strict=True))[n] for n in names))
    got = function_vectors(model, some, prompts=6, top=4, samples=4, null_cells=8)
    assert set(got.record["heads"]) == {"5.3", "5.2", "5.0", "4.2"}
    assert {"5.3", "5.2", "5.0"} == set(got.named())
    top1, layer = got.labels["measure"].index("top-1"), 3
    alone = got.baseline[:, 2, top1]
    reached = alone + got.gain_by_task[:, 0, top1, layer]
    assert float(reached.min()) > 0.95 > 0.6 > float(alone.mean())
    assert float(got.gain_interval[0, top1, layer, 0]) > float(got.gain_null[0, top1, layer].max()) + 0.2
    assert float(got.baseline[-1, 1, top1]) < 0.3 < 0.9 < float(got.baseline[-1, 0, top1])


def test_what_cannot_be_asked_is_refused(capsys):
    model = subjects.random_llama()
    for options, why in (
        ({"top": 0}, "it needs an example and a head"),
        ({"form": "word ->"}, "stands for the word"),
        ({"shots": 9}, "ask for fewer examples"),
    ):
        with pytest.raises(Refused, match=why):
            function_vectors(model, TASKS, **options)
    with pytest.raises(Refused, match="only models of the zoo"):
        concepts("world", model)
    asked = ["heads", "function_vectors", "--concepts", "antonym", "--form", "{}:", "--shots", "3", "--prompts", "2"]
    assert app.main([*asked, "--samples", "2", "--null-cells", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["record"]["options"]["form"] == "{}:"
    assert "--form '{}:'" in found["record"]["command"]
