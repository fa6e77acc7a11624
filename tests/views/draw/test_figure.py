"""matplotlib figures: every field draws; intervals, controls and hostile labels are in them."""

from __future__ import annotations

import math

import pytest
import torch

import cutaway  # noqa: F401 (results draw once it is imported)
from cutaway.core.refuse import Refused
from cutaway.views.draw.figure import figure
from cutaway.views.spec import fields
from tests.views import samples

EVERY = [(r, f) for r in samples.every() for f in fields(r)]


def texts(drawing) -> str:
    import matplotlib.text

    return "\n".join(t.get_text() for t in drawing.findobj(matplotlib.text.Text))


@pytest.mark.parametrize(("result", "field"), EVERY, ids=[f"{r.kind}-{f}" for r, f in EVERY])
def test_every_field_draws(result, field):
    drawing = figure(result, field)
    drawing.canvas.draw()
    assert field.replace("_", " ") in texts(drawing)


def test_heat_map_is_centred_on_zero_with_its_unit():
    drawing = figure(samples.heads())
    image = drawing.axes[0].images[0]
    assert image.norm.vmin == -image.norm.vmax == pytest.approx(-1.9)
    assert drawing.axes[1].get_ylabel() == "logits"
    torch.testing.assert_close(torch.tensor(image.get_array()).float(), samples.heads().effect)
    assert "outside the pooled band of 60 random heads a cell" in " ".join(texts(drawing).split())


def test_words_are_written_into_the_cells():
    assert "Mary" in [t.get_text() for t in figure(samples.lens()).axes[0].texts]


def test_bars_have_whiskers_and_a_null_band():
    drawing = figure(samples.parts())
    frame = drawing.axes[0]
    assert len(frame.patches) == 2 * 24
    assert len(frame.collections) == 24
    assert {t.get_text() for t in frame.get_legend().get_texts()} == {"interval", "range of 100 random heads"}
    assert "grey unless interval without 0 and outside the range" in " ".join(frame.get_xlabel().split())


def test_line_has_its_band_and_rank_one_is_on_top():
    assert len(figure(samples.lens(), "target").axes[0].collections) == 1
    frame = figure(samples.lens(), "rank").axes[0]
    assert frame.get_yscale() == "log"
    assert frame.get_ylim()[0] > frame.get_ylim()[1]


def test_labels_are_no_mathematics_and_gaps_stay_gaps():
    result = samples.Parts(contribution=torch.tensor([1.0, math.nan]), labels={"component": ["$x_", "\\$"]})
    drawing = figure(result)
    drawing.canvas.draw()
    figure(samples.Heads(effect=torch.full((2, 2), math.nan))).canvas.draw()
    figure(samples.Shapes(curve=torch.tensor([1.0, math.nan, 2.0]))).canvas.draw()
    figure(samples.Shapes(edges=torch.zeros(0))).canvas.draw()


def test_results_draw_themselves():
    drawing = samples.heads().plot()
    assert drawing._repr_png_().startswith(b"\x89PNG")
    assert samples.heads()._repr_html_().startswith("<div><iframe sandbox=allow-scripts ")
    with pytest.raises(Refused, match="field 'nope'"):
        samples.heads().plot("nope")
