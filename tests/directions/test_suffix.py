"""Suffixes searched for by gradients: slopes and losses by hand, and an attack on the bundled model and its monitor."""

from functools import cache

import pytest
import torch

import cutaway as ca
from cutaway.core.stats import generator
from cutaway.directions.attacked import AIMS, Attacked
from cutaway.directions.suffix import _Search
from cutaway.tasks import read_labelled
from cutaway.zoo.miniworld.properties import TAUGHT
from tests.conformance.subjects import miniworld, random_llama
from tests.directions.test_find import labelled


@cache
def small() -> _Search:
    model, data = random_llama(), labelled()
    one = ca.directions.direction({"resid_post.0": torch.randn(32, generator=generator(0))}, "park")
    attacked = Attacked.of("directions.suffix", model, data, one, ["drink", "book"], 3, 0.1, 0)
    return _Search(attacked, 6)


def by_hand(search: _Search, aim: str, one_hot: torch.Tensor) -> torch.Tensor:
    """The loss of a suffix of one-hot tokens, mean over prompts that are run one at a time on the user's own model."""
    hf, a, total = search.model.hf, search.attacked, []
    table = hf.get_input_embeddings().weight
    for front, end in zip(search.fronts[:3], search.ends[:3], strict=True):
        x = torch.cat([table[front], one_hot @ table, table[end]])
        out = hf(inputs_embeds=x[None], output_hidden_states=True)
        log_prob = out.logits[0, -1].log_softmax(-1)[a.ids].logsumexp(0)
        total.append(AIMS[aim](log_prob, (out.hidden_states[1][0, -1] @ a.unit - a.threshold) / a.spread))
    return torch.stack(total).mean()


@pytest.mark.parametrize("aim", list(AIMS))
def test_slopes_and_losses_are_those_of_one_hot_tokens_in_one_prompt_at_a_time(aim):
    search = small()
    now = search.random(4, generator(1))
    hot = torch.nn.functional.one_hot(now, len(search.allowed)).float().requires_grad_()
    slope = torch.autograd.grad(by_hand(search, aim, hot), hot)[0]
    torch.testing.assert_close(search.slopes(search.attacked.loss(aim), now) / 3, slope, rtol=1e-3, atol=1e-5)
    flat = search.allowed.expand(4, -1).float()
    tried = search.replaced(now, flat, generator(2))
    assert len(tried)
    assert bool((tried != now).sum(1).le(1).all())
    assert bool(search.allowed[tried].all())
    losses = search.losses(search.attacked.loss(aim), now, tried)
    for i, ids in enumerate(tried):
        with torch.no_grad():
            own = by_hand(search, aim, torch.nn.functional.one_hot(ids, len(search.allowed)).float())
        assert float(losses[i]) == pytest.approx(float(own), rel=1e-4, abs=1e-4)


def test_a_suffix_makes_the_bundled_model_grant_what_it_refuses_and_its_monitor_silent():
    model, data = miniworld(), read_labelled("world/misconduct", miniworld())
    options = {"sites": ("resid_post.4",), "finders": ("mean_difference",), "readings": ("last",), "samples": 2}
    one = ca.directions.find(model, data.of_groups(*TAUGHT), **options).direction()
    found = ca.directions.suffix(model, data, one, length=6, prompts=4, steps=10, candidates=24, samples=1)
    assert bool((found.loss[:, 1:] <= found.loss[:, :-1]).all())
    assert not bool(found.control[0].any())  # without a suffix every request is refused, and raises the alarm
    held_out = found.share[0, 1]
    assert float(found.interval[0, 1, 0, 0]) > 0.5, "granted: the aim transfers to other requests and wordings"
    bad = [t for t, y in zip(data.texts, data.shown[:, 0].tolist(), strict=True) if y]
    rows = [t.split(": ", 1)[1] for t in found.labels["prompt"][4:]]
    texts = [t.replace(" Assistant:", f"{found.suffixes[0]} Assistant:") for t in rows]
    assert len(texts) == len(bad) - 50
    said = [s.startswith(" sure") for s in model.generate(texts, 1)]
    assert said == found.each[0, 4:, 0].bool().tolist()
    x = model.capture(texts, "resid_post.4", logits=False)["resid_post.4@-1"]
    silent = x @ one.unit().vector[0] < found.threshold
    assert torch.equal(silent, found.each[0, 4:, 1].bool())
    assert float(held_out[2]) == pytest.approx(float((silent & torch.tensor(said)).float().mean()))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"length": 0}, "counts from 1"),
        ({"prompts": 0}, "none to fit on"),
        ({"candidates": 0}, "counts from 1"),
        ({"length": 60}, "the model takes 64"),
    ],
)
def test_what_is_no_search_is_refused(options, why):
    one = ca.directions.direction({"resid_post.1": torch.ones(32)}, "park")
    with pytest.raises(ca.Refused, match=why):
        ca.directions.suffix(random_llama(), labelled(), one, **{"steps": 1, "samples": 1, **options})
