"""Attention knockout against masks put in by hand, and what must hold of its groups, windows and readings."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import pytest
import torch

import cutaway as ca
from cutaway.core.record import counting
from cutaway.core.refuse import Refused
from cutaway.interventions.grid import window_of
from cutaway.models.sweep.executor import sweep
from cutaway.patching import knockout
from cutaway.patching.knockout import SOURCES, _random, _unread, extraction, source_groups
from cutaway.tasks.task import Task
from tests.conformance.subjects import llama_task, miniworld, random_llama, told, uneven_task


@cache
def llama():
    return random_llama()


def by_hand(model, ids, layers, keys):
    """Last logits where these layers' attention gets a mask without the edges from `keys` to the last position."""
    n, least = ids.shape[1], torch.finfo(torch.float32).min
    mask = torch.full((n, n), least).triu(1)
    mask[-1, list(keys)] = least

    def masked(module, args, kw):
        return args, {**kw, "attention_mask": mask[None, None]}

    with ExitStack() as stack, torch.no_grad():
        for i in layers:
            handle = model.hf.model.layers[i].self_attn.register_forward_pre_hook(masked, with_kwargs=True)
            stack.callback(handle.remove)
        return model.hf(ids).logits[:, -1]


def probability(logits, bound):
    return logits.softmax(-1).gather(1, bound.answers[:, None])[:, 0]


@pytest.mark.parametrize("task", [llama_task(), uneven_task()], ids=["even", "uneven"])
@pytest.mark.parametrize("window", [1, 2])
def test_every_cell_equals_the_definition(task, window):
    model, bound = llama(), task.bind(llama())
    groups, _ = source_groups(bound)
    want, change = torch.zeros(2, len(SOURCES), 2, len(bound)), torch.zeros(len(SOURCES), 2, len(bound))
    for n in range(len(bound)):
        part, ids = bound.rows([n]), bound.clean.row(n).ids
        clean = by_hand(model, ids, [], [])
        for s, keys in enumerate(groups[n]):
            for i in range(2):
                for kind, width in enumerate((window, 1)):
                    got = by_hand(model, ids, window_of(i, width, range(2)), keys)
                    want[kind, s, i, n] = probability(got, part)[0] / probability(clean, part)[0] - 1
                    change[s, i, n] = change[s, i, n] if kind else (part.metric(got) - part.metric(clean))[0]
    result = knockout(model, task, window=window, samples=1)
    assert torch.allclose(result.effect, want[0].mean(-1), atol=1e-4)
    assert torch.allclose(result.single, want[1].mean(-1), atol=1e-4)
    assert torch.allclose(result.difference, change.mean(-1), atol=1e-4)
    assert result.effect.abs().min() > 1e-4  # every cut does something


def test_groups_part_the_prompt():
    bound = uneven_task().bind(llama())
    groups, says = source_groups(bound)
    assert says == "the tokens that the corruption changes"
    for i, (subject, other, last, first) in enumerate(groups):
        n = int(bound.clean.lengths[i])
        assert sorted(subject + other + last) == list(range(n))
        assert (last, first) == ((n - 1,), (0,))
        assert "Anna Peter Mary John Tom".find(bound.clean.pieces[i][subject[0]].strip()) >= 0


def test_random_positions_are_as_many_and_others():
    g = torch.Generator().manual_seed(0)
    drawn = {_random((2, 5), 9, g) for _ in range(60)}
    assert len(drawn) == 15  # all pairs out of the other six
    assert all(not set(d) & {2, 5, 8} for d in drawn)
    assert all(len(_random((0, 1, 2, 3), 6, g)) == 4 for _ in range(5))
    assert _random((4,), 5, g) in {(0,), (1,), (2,), (3,)}


def test_single_layers_stand_beside_windows_and_a_fifth_of_the_depth_is_the_default():
    task = llama_task()
    one, two = knockout(llama(), task, window=1, samples=1), knockout(llama(), task, window=2, samples=1)
    assert torch.equal(one.effect, one.single)
    assert torch.allclose(two.single, one.effect, atol=1e-5)
    assert torch.allclose(two.effect[:, 0], one.effect[:, 0], atol=1e-5)  # [-1, 1) holds layer 0 alone
    assert knockout(llama(), task, samples=1).record["window"] == 1
    assert knockout(miniworld(), ca.tasks.load("ioi", miniworld(), 2), samples=1).record["window"] == 1


def test_only_the_last_position_runs_again_and_equal_cuts_once(monkeypatch):
    """A column a cut, beside three plain forwards: single layers are windows of one, and of the random positions many
    are drawn twice."""
    task, cuts = llama_task(), list[list[tuple[int, tuple[int, ...]]]]()

    def spied(model, tokens, variants, metric):
        cuts.append([(e.where.layer or 0, e.keys) for (e,) in variants])
        return sweep(model, tokens, variants, metric)

    monkeypatch.setattr(sys.modules["cutaway.patching.knockout"], "sweep", spied)
    result = knockout(llama(), task, window=1, samples=20)
    n, width = len(task), task.bind(llama()).clean.ids.shape[1]
    plain = n * (1 + 1 + 1)  # its own metric, the reading of updates, one clean run of the sweeps
    with counting() as spent:  # four sources in two layers, each its own attention only
        llama().capture(task.bind(llama()).clean, "attn_out.0", logits=False)
    with counting() as entering:
        llama().capture(task.bind(llama()).clean, ["resid_pre.0", "resid_pre.1"], logits=False)
    read = 4 * 2 * spent.forwards + entering.forwards
    ran = sum(2 - layer for (layer, _) in cuts[0]) * n
    assert len(cuts[0]) == len(set(cuts[0])) < 2 * 4 * 15
    assert result.record["cost"]["forwards"] == pytest.approx(plain + read + ran / 2 / width)


def test_facts_are_read_from_the_subject_in_the_middle_of_the_small_world():
    model = miniworld()
    task = ca.tasks.load("facts", model, 12)
    result = knockout(model, task, window=3, samples=4)
    subject, other = result.effect[SOURCES.index("subject")], result.effect[SOURCES.index("other")]
    assert subject.min() < -0.5
    assert subject.min() < result.null[0].min()  # random positions carry less
    assert float(result.extraction.min()) >= 0
    assert result.extraction[0].max() > result.extraction_foil[0].max()
    assert other.isfinite().all()


def test_capitals_are_extracted_by_attention_from_the_subject():
    result = knockout(miniworld(), ca.tasks.load("capital", miniworld(), 12), samples=1)
    best = int(result.extraction[0].argmax())
    assert result.extraction_interval[0, best, 0] > result.extraction_foil_interval[0, best, 1]
    blocked = dict(zip(SOURCES, result.extraction_blocked_interval[:, best], strict=True))
    assert blocked["subject"][1] < result.extraction_interval[0, best, 0]
    assert blocked["last"][0] > blocked["subject"][1]  # its own position gives nothing
    assert result.record["extraction in any layer"]["attention"] >= result.extraction[0].max()


def test_extraction_reads_the_attention_that_writes_the_answer():
    model, task = llama(), llama_task()
    bound, norm = task.bind(model), model.hf.model.norm
    seen = []
    handle = model.hf.model.layers[1].self_attn.o_proj.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model.hf(bound.clean.ids)
        best = model.hf.lm_head(norm(seen[0][:, -1])).argmax(-1)
    handle.remove()
    always = replace(bound, answers=best, foils=bound.answers)
    assert extraction(model, always, [0, 1])[0, 0, 1].mean() == 1
    assert extraction(model, replace(bound, answers=bound.answers, foils=best), [0, 1])[1, 0, 1].mean() == 1
    assert torch.equal(extraction(model, bound, [0, 1])[0, 0, 1], (best == bound.answers).float())


def test_extraction_by_the_mlp_and_without_a_source_equal_the_definition():
    model, task = llama(), uneven_task()
    bound, groups = task.bind(model), source_groups(task.bind(model))[0]
    norm, head, layer = model.hf.model.norm, model.hf.lm_head, model.hf.model.layers[1]
    for i in range(len(bound)):
        part, ids, seen = bound.rows([i]), bound.clean.row(i).ids, {}
        hooks = [m.register_forward_hook(lambda _, a, out, n=n, seen=seen: seen.update({n: out}))
                 for n, m in (("mlp", layer.mlp), ("attention", layer.self_attn.o_proj))]  # fmt: skip
        by_hand(model, ids, [], [])
        said = head(norm(seen["mlp"][:, -1])).argmax(-1)
        got = extraction(model, replace(part, answers=said, foils=said + 1), [0, 1])
        assert got[0, 1, 1] == 1
        for s, keys in enumerate(groups[i]):
            by_hand(model, ids, [1], keys)
            said = head(norm(seen["attention"][:, -1])).argmax(-1)
            got = _unread(model, replace(part, answers=said, foils=said + 1), [groups[i]], [0, 1])
            assert got[s, 1] == 1
        for hook in hooks:
            hook.remove()


def test_prompts_without_what_is_to_be_cut_are_refused():
    pair = told("Mary", "John", "Anna")
    same = replace(pair, corrupt=pair.clean)
    with pytest.raises(Refused, match="no subject before"):
        knockout(llama(), Task("same", (same,)))
