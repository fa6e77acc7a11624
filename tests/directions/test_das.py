"""Distributed alignment search: a planted line is found, by hand the same numbers, and controls that do not find it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
import transformers as tf
from torch.nn.functional import cosine_similarity, normalize

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.directions.das import relabelled
from cutaway.interventions.alignment import Alignment, align, orthonormal
from cutaway.interventions.interchange import HeldOut, bind_exchanges, class_means, exchanges, outcomes, tried
from cutaway.models.model import Model
from cutaway.tasks import Pair, Task
from tests.conformance.subjects import NAMES, PLACES, miniworld, tokenizer
from tests.directions.made import seeded

WIDTH, YES, NO = 24, " cake", " key"
HALVES = NAMES[:4], NAMES[4:]


def planted() -> tuple[Model, torch.Tensor]:
    """A model that says what stands along one line of the last token's embedding, and the line.

    Attention and MLP write nothing. The names of one half have the line's vector, those of the other its opposite,
    beside one of four vectors that no answer reads, and which are the same in both halves.
    """
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = tf.LlamaForCausalLM(config).eval()
    line = normalize(seeded(1, WIDTH), dim=0)
    beside = seeded(2, 4, WIDTH)
    beside -= (beside @ line)[:, None] * line
    answers = [tokenizer()(f"Then{a}")["input_ids"][-1] for a in (YES, NO)]
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for half, sign in zip(HALVES, (1.0, -1.0), strict=True):
            for i, name in enumerate(half):
                hf.model.embed_tokens.weight[tokenizer()(f"Then {name}")["input_ids"][-1]] = beside[i] + sign * line
        hf.lm_head.weight.zero_()
        hf.lm_head.weight[answers[0]], hf.lm_head.weight[answers[1]] = 6 * line, -6 * line
    return Model(hf, tokenizer(), "planted"), line


def names() -> Task:
    """Pairs of a name of each half, in both orders; in a group each name is once in every place."""
    pairs = []
    for one, other in product(range(4), range(4)):
        front = f"Then {PLACES[(one + other) % 4]} and"
        a, b = f"{front} {HALVES[0][one]}", f"{front} {HALVES[1][other]}"
        pairs += [Pair(a, b, YES, NO, group=front), Pair(b, a, NO, YES, group=front)]
    return Task("halves", tuple(pairs))


def test_a_planted_line_is_found_and_controls_do_not_find_it():
    model, line = planted()
    found = ca.directions.das(model, names(), site="resid_post.0", rate=0.03, steps=60)
    assert float(cosine_similarity(found.basis[:, 0], line, dim=0).abs()) > 0.95
    assert float(found.iia) == 1.0
    assert found.converged
    control = dict(zip(found.labels["control"], found.control, strict=True))
    assert float(control["no exchange"][1:].max()) == 0.0
    assert float(control["shuffled labels"][1]) < 0.8
    assert float(control["untrained"][1]) < 0.2  # its weights are mixed up: nothing predicts the answers
    assert float(found.iia_null.mean()) < 0.1
    assert float(control["whole vector"][1:].min()) == 1.0
    direction = found.subspace().direction()
    assert (direction.positive, direction.negative) == (YES.strip(), NO.strip())
    assert float(direction.vector[0] @ line) == pytest.approx(2.0, abs=0.2)  # the classes stand at ±1


def test_of_full_rank_it_is_the_exchange_of_the_whole_vector():
    model, _ = planted()
    found = ca.directions.das(model, names().take(8), site="resid_post.0", rank=WIDTH, steps=2)
    whole = torch.stack([found.margin, found.iia, found.preferred])
    torch.testing.assert_close(whole, found.control[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(WIDTH), atol=1e-5, rtol=0)


def test_a_boundary_shrinks_to_few_dimensions_that_carry_the_variable():
    model, task = miniworld(), ca.tasks.load("gender", miniworld(), n=12)
    bound = bind_exchanges(model, task)
    (batches,) = exchanges(model, bound, model.places("resid_post.4"), "last", range(len(bound)))
    with model.edited():
        found = align(batches, bound.measure, 1, 100, 0.02, generator(0), boundless=True)
    assert float(found.boundary[0]) == 0.5
    assert float(found.boundary[-1]) < 0.1
    assert found.basis.shape[1] == max(1, round(128 * float(found.boundary[-1]))) <= 12
    assert float(tried(batches, lambda e: e.within(found.basis), outcomes(bound, model))[:, 1].mean()) == 1.0


@pytest.mark.parametrize(("site", "positions"), [("resid_post.4", "last"), ("resid_post.2", "changed")])
def test_accuracies_are_those_of_hooks_written_by_hand(site, positions):
    model, task = miniworld(), ca.tasks.load("gender", miniworld(), n=12)
    found = ca.directions.das(model, task, site=site, positions=positions, rank=2, steps=12, rate=0.05, samples=1)
    bound = bind_exchanges(model, task)
    said, layer = [], int(site.split(".")[1])
    for pair in [p for i, p in enumerate(task) if i in _test_rows(bound)]:
        base, source = (model.tokenizer(t, return_tensors="pt")["input_ids"] for t in (pair.corrupt, pair.clean))
        where = -1 if positions == "last" else int((base != source).nonzero()[0, 1])
        with torch.no_grad():
            donor = model.hf(source, output_hidden_states=True).hidden_states[layer + 1][0, where]

        def exchange(module, args, out, donor=donor, where=where):
            x = (out[0] if isinstance(out, tuple) else out).clone()
            x[0, where] += (donor - x[0, where]) @ found.basis @ found.basis.T
            return (x, *out[1:]) if isinstance(out, tuple) else x

        handle = model.hf.model.layers[layer].register_forward_hook(exchange)
        with torch.no_grad():
            said.append(model.tokenizer.decode(model.hf(base).logits[0, -1].argmax()) == pair.answer)
        handle.remove()
    assert float(found.iia) == pytest.approx(sum(said) / len(said))
    assert sum(said) > 0


def _test_rows(bound) -> set[int]:
    return set(HeldOut.of(bound, 0).test)


def test_edits_of_the_subspace_do_what_was_tested():
    model, task = miniworld(), ca.tasks.load("gender", miniworld(), n=8)
    space = ca.directions.das(model, task, site="resid_post.4", rank=2, steps=8, rate=0.05, samples=1).subspace()
    bound = bind_exchanges(model, task)
    (batches,) = exchanges(model, bound, model.places("resid_post.4"), "last", range(len(bound)))
    source = model.capture(bound.clean, "resid_post.4", logits=False)["resid_post.4@-1"]
    by_edits = model.run_last(bound.corrupt, edits=space.swap(source, [-1]))
    for e in batches:
        with model.edited():
            swept = e.run(e.within(space.basis)).last_logits
        torch.testing.assert_close(by_edits[list(e.rows)], swept, atol=2e-3, rtol=1e-3)
    out = model.capture(bound.clean, "resid_post.4", edits=space.project_out(), logits=False)["resid_post.4@-1"]
    assert float((out @ space.basis).abs().max()) < 1e-4


def test_gradients_are_those_of_a_plain_backward():
    model, task = miniworld(), ca.tasks.load("gender", miniworld(), n=6)
    bound = bind_exchanges(model, task)
    (batches,) = exchanges(model, bound, model.places("resid_post.3"), "changed", range(len(bound)))
    (e,) = batches
    change = torch.zeros_like(e.step).requires_grad_(True)
    with model.edited(), torch.enable_grad():
        (slope,) = torch.autograd.grad(e.measured(change, bound.measure).sum(), change)
    _, plain, _ = model.gradients(e.bound.corrupt, "resid_post.3", bound.metric)
    where = e.where[..., None]
    torch.testing.assert_close(slope * where, plain["resid_post.3"] * where, atol=1e-4, rtol=1e-3)


def test_it_tells_of_trainings_that_did_not_converge():
    falling = Alignment(torch.eye(2), torch.linspace(4, 1, 50), None)
    assert falling.slope == pytest.approx(-3 / 49, rel=1e-4)
    assert not falling.converged
    assert Alignment(torch.eye(2), torch.cat([torch.linspace(4, 1, 25), torch.ones(50)]), None).converged
    model, _ = planted()
    found = ca.directions.das(model, names().take(16), site="resid_post.0", steps=20, samples=1)
    assert not found.converged
    assert any("did not converge" in note and "true labels" in note for note in found.record["notes"])


def test_it_tells_of_pairs_with_one_label():
    one = replace(names(), pairs=tuple(p for p in names() if p.answer == YES))
    found = ca.directions.das(planted()[0], one, site="resid_post.0", steps=2, samples=1)
    assert any(note.startswith("one label") for note in found.record["notes"])


def test_labels_are_shuffled_among_the_pairs_that_are_fitted_on_alone():
    bound = bind_exchanges(planted()[0], names().take(8))
    mixed = relabelled(bound, [0, 1, 2, 3], [3, 2, 1, 0])
    assert mixed.answers.tolist() == [*bound.answers[:4].flip(0).tolist(), *bound.answers[4:].tolist()]


def test_columns_stay_orthonormal_and_keep_their_signs():
    raw = seeded(3, 6, 2)
    q = orthonormal(raw)
    torch.testing.assert_close(q.T @ q, torch.eye(2), atol=1e-6, rtol=0)
    assert bool(((q * raw).sum(0) > 0).all())


def test_parameters_get_no_gradients_and_the_line_of_two_classes_is_the_difference_of_means():
    model, task = miniworld(), ca.tasks.load("gender", miniworld(), n=4)
    bound = bind_exchanges(model, task)
    (batches,) = exchanges(model, bound, model.places("resid_post.4"), "last", range(len(bound)))
    with model.edited():
        align(batches, bound.measure, 1, 2, 1e-3, generator(0))
    assert all(p.grad is None for p in model.hf.parameters())
    line = class_means(batches)
    x = torch.cat([torch.stack([e.base[:, -1], e.base[:, -1] + e.step[:, -1]]).flatten(0, 1) for e in batches])
    y = torch.cat([torch.cat([e.bound.foils, e.bound.answers]) for e in batches])
    by_hand = x[y == y[0]].mean(0) - x[y != y[0]].mean(0)
    assert float(cosine_similarity(line[:, 0], by_hand, dim=0).abs()) > 0.9999


def test_wrong_input_is_refused():
    model, task = miniworld(), ca.tasks.load("gender", miniworld(), n=4)
    for options, match in [
        ({"site": "embed"}, "same values"),
        ({"site": "resid_post"}, "6 addresses"),
        ({"site": "pattern.1"}, "no site of vectors"),
        ({"site": "resid_post.9"}, "resid_post.9"),
        ({"positions": "first"}, "no positions"),
        ({"rank": 0}, "wide"),
        ({"rank": 129}, "128 wide"),
    ]:
        with pytest.raises(Refused, match=match):
            ca.directions.das(model, task, **{"site": "resid_post.4", "steps": 1, **options})
    several = replace(task, pairs=tuple(replace(p, answer=p.answer + " wanted a") for p in task))
    with pytest.raises(Refused, match="several tokens"):
        ca.directions.das(model, several)
