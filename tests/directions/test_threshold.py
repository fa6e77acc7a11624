"""Thresholds: chosen on some groups and counted by hand on others, and the condition that they are for."""

import pytest
import torch

import cutaway as ca
from cutaway.directions.threshold import chosen
from cutaway.interventions.probes import folds
from cutaway.interventions.text_vectors import text_vectors
from cutaway.tasks import Labelled
from tests.conformance.subjects import miniworld
from tests.directions.made import reviews, sentiment


@pytest.fixture(scope="module")
def data():
    """Held-out reviews of the bundled model's world, in groups of six."""
    positive, negative = reviews(30)
    shown = torch.tensor([True] * 30 + [False] * 30)[:, None]
    return Labelled((*positive, *negative), ("positive",), shown, tuple(str(i // 5) for i in [*range(30)] * 2))


def test_shares_are_counted_on_groups_that_the_threshold_was_not_chosen_on(data):
    model, direction = miniworld(), sentiment().select(address=["resid_post.0", "resid_post.5"])
    found = ca.directions.threshold(model, data, direction, reading="last", rate=0.1, samples=19)
    x = text_vectors(model, data.texts, direction.places, ["last"]).vectors[0]
    along, y = direction.component(x), data.shown[:, 0]
    above = torch.zeros(2, 60, dtype=torch.bool)
    for fit, test in folds(y, data.group_of):
        for a in range(2):
            without, every = along[a, fit][~y[fit]], along[a, fit]
            rates = [(float((without >= t).float().mean()), t) for t in sorted(every.tolist())]
            least = next(t for share, t in rates if share <= 0.1 + 1e-6)
            above[a, test] = along[a, test] > (least + max(t for t in every.tolist() if t < least)) / 2
    torch.testing.assert_close(found.recall, above[:, y].float().mean(1))
    torch.testing.assert_close(found.false_positive, above[:, ~y].float().mean(1))
    assert float(found.interval[1, 0]) > float(found.null[1].median())
    assert float(found.false_positive_interval[1, 0]) <= 0.1
    one = found.condition("resid_post.5")
    assert torch.equal(one.holds(x[1]), along[1] >= found.threshold[1])
    edit = ca.edits.Conditional(direction.select(address="resid_post.5").add(-8.0), one)
    texts = list(data.texts)
    plain, steered = (model.run_last(texts, e) for e in ((), edit))
    assert torch.equal((plain != steered).any(1), along[1] >= found.threshold[1])


@pytest.mark.parametrize(("rate", "want"), [(0.0, 4.5), (0.25, 3.5), (0.5, 1.5), (0.6, 1.5)])
def test_the_least_threshold_that_keeps_the_rate_is_chosen(rate, want):
    without = torch.tensor([0.0, 1.0, 3.0, 4.0])
    assert float(chosen(without, torch.tensor([*without.tolist(), 2.0, 5.0]), rate)) == want
    alone = float(chosen(without, without, 0.0))
    assert 4.0 < alone < 4.0001


def test_what_has_no_threshold_is_refused(data):
    model, direction = miniworld(), sentiment()
    for given, change, why in (
        (data, {"rate": 1.0}, "it is no share"),
        (Labelled(data.texts, data.concepts, torch.ones(60, 1, dtype=torch.bool), data.groups), {}, "every text shows"),
        (Labelled(data.texts, data.concepts, data.shown, ("one",) * 60), {}, "of one group"),
        (data, {"concept": "none"}, "labelled with positive"),
    ):
        with pytest.raises(ca.Refused, match=why):
            ca.directions.threshold(model, given, direction, **change)
    with pytest.raises(ca.Refused, match="16 wide"):
        ca.directions.threshold(model, data, ca.directions.direction({"resid_post.0": torch.ones(16)}))
