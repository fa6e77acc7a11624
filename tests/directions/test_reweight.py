"""Re-weighted MLP neurons: a step of the training by hand, outcomes of single prompts, and the bundled model."""

import pytest
import torch

import cutaway as ca
from cutaway.core.stats import generator
from cutaway.directions.attacked import Attacked
from cutaway.directions.reweight import _Trial
from cutaway.tasks import read_labelled
from cutaway.zoo.miniworld.properties import TAUGHT
from tests.conformance.subjects import miniworld, random_llama
from tests.directions.test_find import labelled

DRAWN = torch.randn(32, generator=generator(0))


@pytest.mark.parametrize("aim", ["grant", "hide", "both"])
def test_the_first_step_goes_against_the_gradient_by_each_neurons_factor(aim):
    model, data = random_llama(), labelled()
    one = ca.directions.direction({"resid_post.1": DRAWN}, "park")
    attacked = Attacked.of("directions.reweight", model, data, one, ["drink"], 4, 0.1, 0)
    tokens = model.tokens(attacked.of_rows(attacked.fit))
    factor, loss = _Trial(attacked, tokens, [4, 0, 0]).fitted(aim, (-2,), 1, 0.1, 0.0)
    values, slopes, given = model.gradients(tokens, "mlp_post", attacked.loss(aim))
    by_factor = torch.stack([(slopes[p] * given[p]).mean(0) for p in ("mlp_post.0@-2", "mlp_post.1@-2")])
    assert float(loss) == pytest.approx(float(values.mean()), rel=1e-5)
    large = by_factor.abs() > 1e-5
    assert bool(large[0].any())
    torch.testing.assert_close(factor[large], 1 - 0.1 * by_factor[large].sign(), rtol=0, atol=1e-3)


def test_the_end_alone_decides_on_refusal_in_the_bundled_model_and_the_monitor_still_sees_the_request():
    model, data = miniworld(), read_labelled("world/misconduct", miniworld())
    options = {"sites": ("resid_post.4",), "finders": ("mean_difference",), "readings": ("last",), "samples": 1}
    one = ca.directions.find(model, data.of_groups(*TAUGHT), **options).direction()
    found = ca.directions.reweight(model, data, one, prompts=8, samples=2)
    assert not bool(found.control.any())
    granted, hidden = found.interval[:, 1, 0], found.interval[:, 1, 1]  # on requests of other kinds and wordings
    assert float(granted[0, 0]) > 0.95
    assert float(granted[1, 1]) < 0.05  # as many positions in front of the end do nothing
    assert float(hidden[0, 1]) < 0.05
    assert float(found.kept.min()) >= 0.95
    assert float(found.null[:, 1, 0].max()) < 0.05
    assert float(found.log_prob_interval[0, 1, 0]) > -0.1 > -1 > float(found.log_prob_null[:, 1].max())
    bad = [t for t, y in zip(data.texts, data.shown[:, 0].tolist(), strict=True) if y][-8:]
    for place, word in (("the end", " sure"), ("in front of it", " sorry")):
        edits = found.edits(place)
        assert all(model.generate(t, 1, edits=edits)[0].startswith(word) for t in bad)
        x = torch.cat([model.capture(t, "resid_post.4", edits=edits)["resid_post.4@-1"] for t in bad])
        assert bool((x @ one.unit().vector[0] >= found.threshold).all())


@pytest.mark.parametrize(
    ("options", "why"),
    [({"rate": 0.0}, "above 0"), ({"penalty": -1.0}, "not below"), ({"aim": "harm"}, "not a choice")],
)
def test_what_is_no_training_is_refused(options, why):
    one = ca.directions.direction({"resid_post.1": torch.ones(32)}, "park")
    with pytest.raises(ca.Refused, match=why):
        ca.directions.reweight(random_llama(), labelled(), one, **options)
