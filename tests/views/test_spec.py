"""Pictures from axes: kinds, intervals, controls, words, panels, pooling."""

from __future__ import annotations

import math

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.core.stats import null_band
from cutaway.views import palette
from cutaway.views.band import plural
from cutaway.views.spec import aligned, fields, pictures, valued
from cutaway.views.wording import amount, number, span, ticks, visible
from tests.views import samples


def only(result, field=None, **options):
    (picture,) = pictures(result, field, **options)
    return picture


@pytest.mark.parametrize(
    ("field", "kind", "panels", "rows", "columns"),
    [
        ("strip", "strip", 1, 1, 13), ("strips", "strip", 3, 1, 13), ("pattern", "heat", 1, 13, 13),
        ("patterns", "heat", 4, 13, 13), ("edges", "bars", 1, 24, 1), ("curve", "line", 1, 1, 40),
        ("odd", "heat", 1, 3, 8), ("deep", "heat", 12, 4, 13), ("neurons", "heat", 1, 4, 64),
        ("count", "number", 1, 1, 1), ("flags", "bars", 1, 4, 1),
    ],
)  # fmt: skip
def test_axes_choose_the_picture(field, kind, panels, rows, columns):
    found = pictures(samples.shapes(), field)
    assert len(found) == panels
    assert {(p.kind, len(p.rows), len(p.columns)) for p in found} == {
        (kind, rows, columns if field != "neurons" else 64)
    }


def test_layer_with_few_candidates_is_a_line_with_one_curve_each():
    p = only(samples.lens(), "answer")
    assert (p.kind, p.rows, p.columns[0]) == ("line", ("Mary", "John"), "embed")
    assert p.values[1] == pytest.approx(samples.lens().answer[:, 1].tolist())


def test_values_interval_and_null_stay_together():
    result = samples.heads()
    p = only(result)
    low, high = torch.tensor(p.low), torch.tensor(p.high)
    torch.testing.assert_close(torch.stack([low, high], -1), result.interval)
    expected, share, _ = null_band(result.null.flatten(0, 1), groups=torch.arange(6).repeat_interleave(8))
    torch.testing.assert_close(torch.tensor([p.null_low, p.null_high]).movedim(0, -1).flatten(0, 1), expected)
    assert p.mark == "interval without 0 and outside the pooled band of 60 random heads a cell"
    assert p.chance == "chance alone marks at most about 1 of 48 cells"
    assert share <= 1 / 48
    outside = {(r, c) for r in range(6) for c in range(8) if p.stands_out(r, c)}
    assert {(4, 1), (4, 5), (3, 2), (5, 6), (2, 7)} <= outside
    assert len(outside) < 15


@pytest.mark.parametrize("samples_", [1, 2, 4, 20])
@pytest.mark.parametrize("uneven", [False, True])
def test_chance_marks_no_more_cells_than_the_legend_says(samples_, uneven):
    """An exchangeable null: the effect is drawn like its own control, in every cell from another distribution."""
    marked, pictured, cells = 0, 60, 48
    for seed in range(pictured):
        g = torch.Generator().manual_seed(seed)
        drawn = torch.randn(6, 8, samples_ + 1, generator=g)
        if uneven:
            drawn *= torch.rand(6, 8, 1, generator=g) ** 2
            drawn += 3 * torch.randn(6, 8, 1, generator=g) * (samples_ > 1)
        p = only(samples.Heads(effect=drawn[..., 0].clone(), null=drawn[..., 1:].clone()))
        marked += sum(bool(p.stands_out(r, c)) for r in range(6) for c in range(8))
    assert p.chance == f"chance alone marks at most about 1 of {cells} cells"
    assert 0 < marked <= 1.5 * pictured


def test_a_mark_needs_the_interval_and_the_band():
    x = torch.tensor([[1.0, 1.0, 0.05, 0.05]])
    null = torch.linspace(-0.1, 0.1, 9).expand(1, 4, 9).clone()
    bounds = torch.tensor([[[0.5, 1.5], [-0.5, 2.5], [0.01, 0.09], [math.nan, math.nan]]])
    p = only(samples.Heads(effect=x, interval=bounds, null=null))
    assert [p.stands_out(0, c) for c in range(4)] == [True, False, False, False]
    once = only(samples.Heads(effect=x, interval=torch.full((1, 4, 2), math.nan), null=null))
    assert [once.stands_out(0, c) for c in range(4)] == [True, True, False, False]
    assert once.mark == "outside the pooled band of 9 random controls a cell"


def test_too_few_controls_mark_nothing():
    p = only(samples.Heads(effect=torch.ones(1, 2), null=torch.zeros(1, 2, 4)))
    assert (p.stands_out(0, 0), p.mark, p.chance) == (None, "", "")
    assert p.control == "range of 4 random controls, too few to mark cells"


def test_enough_controls_are_their_own_range_and_one_null_serves_every_cell():
    null = torch.randn(1, 4, 20, generator=torch.Generator().manual_seed(0))
    p = only(samples.Heads(effect=torch.ones(1, 4), null=null))
    torch.testing.assert_close(torch.tensor([p.null_low, p.null_high]), torch.stack([null.amin(-1), null.amax(-1)]))
    assert (p.control, p.chance) == ("range of 20 random controls", "chance alone marks at most one of 4 cells")
    whole = pictures(samples.sites())
    assert [p.panel for p in whole] == ["site resid_pre", "site attn_out", "site mlp_out"]
    assert len({v for p in whole for row in p.null_low for v in row}) == 1
    assert whole[0].control == "band of 40 random heads"


def test_metrics_of_different_units_have_bands_of_their_own():
    from cutaway.patching import Effects

    g, n = torch.Generator().manual_seed(0), torch.zeros(2)
    null = torch.randn(2, 3, 4, 4, generator=g) * torch.tensor([1.0, 1000.0])[:, None, None, None]
    x = torch.zeros(3, 4)
    bare = {"grid": ("layer", "head"), "effect": x, "recovered": x, "interval": torch.zeros(3, 4, 2)}
    result = Effects(**bare, null=null[0], clean=n, corrupt=n, metrics=torch.zeros(2, 3, 4), metrics_null=null)
    small, large = pictures(result, "metrics")
    assert 0 < small.null_high[0][0] - small.null_low[0][0] < 10 < large.null_high[0][0] - large.null_low[0][0]


def test_a_curve_keeps_the_range_of_every_point():
    from cutaway.patching.knockout_curve import KnockoutCurve

    null = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    none = torch.full((3, 2), math.nan)
    result = KnockoutCurve(metric=torch.zeros(3), interval=none, null=null, accuracy=torch.zeros(3),
                           accuracy_interval=none, accuracy_null=null, record={"control": "random_set"})  # fmt: skip
    p = only(result)
    assert p.null_high == (tuple(null.amax(-1).tolist()),)
    assert p.control == "range of 4 random sets at each point, left by chance at 40 %"


def test_of_too_many_panels_those_with_the_largest_values_are_shown():
    x = torch.zeros(20, 2, 2, 5)
    x[17, 1, 0, 2], x[3, 0, 1, 1] = -9.0, 5.0
    (one,) = pictures(samples.Shapes(deep=x), "deep", panels=1)
    assert (one.panel, one.note) == ("batch 17; layer 1", "39 more panels")
    assert [p.panel for p in pictures(samples.Shapes(deep=x), "deep", panels=2)] == ["batch 3; layer 0", one.panel]


def test_panels_and_fields_without_a_value_are_left_out():
    x = torch.full((3, 2, 2, 5), math.nan)
    x[1, 0, 0, 2] = 1.0
    (one,) = pictures(samples.Shapes(deep=x), "deep")
    assert (one.panel, one.note) == ("batch 1; layer 0", "5 panels without a value")
    assert len(pictures(samples.Shapes(deep=torch.full_like(x, math.nan)), "deep")) == 6
    assert valued(samples.Shapes(deep=torch.full_like(x, math.nan), curve=torch.zeros(5)))[1] == ["deep"]


def test_entries_with_units_of_their_own_have_a_panel_a_unit():
    from cutaway.dictionaries.evaluation.scores import Score, collect

    result = collect([Score("l0", 20.0, unit="latents"), Score("loss", 0.1, unit="nats"), Score("dead", 0.5)], {})
    found = pictures(result)
    assert [(p.kind, p.rows, p.unit, p.limit) for p in found] == [
        ("bars", ("l0",), "latents", 20.0), ("bars", ("loss",), "nats", pytest.approx(0.1)),
        ("bars", ("dead",), "", 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("control", "n", "words"),
    [("random_direction", 4, "random directions"), ("random_direction", 1, "random direction"),
     ("random_heads", 20, "random heads"), ("rotated_basis", 2, "rotated bases"), ("random_edges", 1, "random edge")],
)  # fmt: skip
def test_controls_are_counted_in_words(control, n, words):
    assert plural(control, n) == words


def test_without_a_null_the_interval_decides():
    p = only(samples.Heads(effect=torch.tensor([[1.0, 0.1]]), interval=torch.tensor([[[0.5, 1.5], [-0.1, 0.3]]])))
    assert (p.stands_out(0, 0), p.stands_out(0, 1)) == (True, False)
    assert p.mark == "interval without 0"
    bare = only(samples.Heads(effect=torch.ones(1, 1)))
    assert bare.stands_out(0, 0) is None
    assert bare.mark == ""


@pytest.mark.parametrize(
    ("unit", "neutral", "mark"),
    [("AUROC", {}, "interval without 0.5 AUROC"), ("ratio", {}, "interval without 1 ratio"),
     ("probability", {"effect": 0.625}, "interval without 62.5 %"), ("AUROC", {"effect": 0.0}, "interval without 0")],
)  # fmt: skip
def test_no_effect_need_not_be_0(unit, neutral, mark, tmp_path):
    values, bounds = torch.tensor([[0.9, 1.2]]), torch.tensor([[[0.4, 1.0], [1.1, 1.3]]])
    result = samples.Heads(effect=values, interval=bounds, units={"effect": unit}, neutral=neutral)
    again = ca.open(result.save(tmp_path / "result.safetensors"))
    assert again.neutral == neutral
    p = only(again)
    assert (p.stands_out(0, 0), p.stands_out(0, 1)) == (mark.endswith(" 0"), True)
    assert p.mark == mark


def test_interval_belongs_to_its_own_field_only():
    assert only(samples.lens(), "target").low is not None
    assert only(samples.lens(), "rank").low is None
    assert only(samples.parts(), "residual").null_low is None


def test_bars_are_sorted_by_size_and_keep_their_labels():
    result = samples.parts()
    p = only(result)
    sizes = [abs(row[0]) for row in p.values]
    assert sizes == sorted(sizes, reverse=True)
    assert p.rows[:3] == ("head 4.1", "head 4.2", "head 5.2")
    assert p.note == "24 largest of 32"
    index = result.labels["component"].index("head 5.2")
    assert [p.low[2][0], p.high[2][0]] == pytest.approx(result.interval[index].tolist())


def test_words_come_from_the_field_or_the_ids_beside_it():
    p = only(samples.lens())
    assert p.title == "probability"
    assert p.words[-1][-1] == "Mary"
    assert fields(samples.lens()) == ["probability", "target", "rank", "answer"]
    assert only(samples.lens(), "token").words == p.words
    own = samples.Places(effect=torch.ones(1, 2), labels={"effect": [["a", "b"]]})
    assert only(own).words == (("a", "b"),)


def test_pooling_keeps_the_largest_entry_and_says_so():
    x = torch.zeros(4, 700)
    x[2, 333] = -5.0
    p = only(samples.Shapes(neurons=x))
    assert min(v for row in p.values for v in row) == -5.0
    assert "largest value of 1 × 11 entries" in p.note
    c = p.values[2].index(-5.0)
    first, last = p.columns[c].split("…")
    assert int(first) <= 333 <= int(last)


def test_nan_and_infinity_are_no_values():
    x = torch.tensor([[math.nan, math.inf], [1.0, -2.0]])
    p = only(samples.Heads(effect=x))
    assert p.limit == 2.0
    assert palette.step(math.inf, p.limit) == palette.STEPS
    assert amount(math.nan) == "no value"
    assert only(samples.Heads(effect=torch.full((2, 2), math.nan))).limit == 0.0


def test_bad_fields_are_refused():
    with pytest.raises(Refused, match="no such field"):
        pictures(samples.heads(), "efect")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (3.0, "3"), (-0.12345, "−0.123"), (1.2e-6, "1.2e−6"), (123456.7, "123457"), (1e9, "1000000000"),
     (math.nan, "–"), (-math.inf, "−∞")],
)  # fmt: skip
def test_numbers_are_short_and_true(value, text):
    assert number(value) == text.replace("1000000000", "1e9")


def test_texts():
    assert amount(0.9, "probability") == "90 %"
    assert amount(0.5, "logits") == "0.5 logits"
    assert span(0.1, 0.2, "probability") == "[10, 20] %"
    assert [visible(x) for x in (" Mary", "\n", "", "  ", "\x1b[31m", 3)] == ["Mary", "⏎", "∅", "␣␣", "\\x1b[31m", "3"]
    assert aligned(-0.024, only(samples.parts())) == "−0.02"
    assert ticks(0.0, 0.9, 4) == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_step_is_readable_and_steps_differ(theme):
    numbers = range(-palette.STEPS, palette.STEPS + 1)
    assert min(palette.contrast(palette.colour(n, theme), palette.ink(n, theme)) for n in numbers) >= 4.5
    assert len({palette.colour(n, theme) for n in numbers}) == 2 * palette.STEPS + 1


def test_one_layer_of_many_neurons_is_shown_as_its_largest():
    from cutaway.patching import Effects

    effect = torch.linspace(-1, 1, 200)[None]
    result = Effects(
        grid=("layer", "neuron"), effect=effect, interval=torch.stack([effect - 0.1, effect + 0.1], -1),
        null=torch.zeros(1, 200, 2), recovered=effect, clean=torch.ones(2), corrupt=torch.zeros(2),
        labels={"layer": [2]},
    )  # fmt: skip
    (picture,) = pictures(result)
    assert (picture.kind, picture.panel) == ("bars", "layer 2")
    assert set(picture.rows[:2]) == {"0", "199"}
    assert picture.low is not None
    assert picture.null_low is not None
