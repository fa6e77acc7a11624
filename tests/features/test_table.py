"""The table of latents, and latents on a text."""

import json
import shutil

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.features import FeatureStore
from cutaway.features.reading import read_text
from cutaway.features.store.meta import NONE, RULE, Label
from cutaway.features.store.table import LatentTable
from tests.features.common import dictionaries, model


@pytest.fixture
def table(store, tmp_path):
    own = FeatureStore(shutil.copytree(store.folder, tmp_path / "store"))
    own.meta.put([Label("some", i, RULE, f"{'' if i % 2 else NONE + ': '}word {i}", {"F1": i / 10}) for i in range(8)])
    return LatentTable(own, "some")


@pytest.mark.parametrize("sort", ["latent", "density", "largest", "mean", "F1", "label"])
@pytest.mark.parametrize("descending", [True, False])
def test_pages_are_all_latents_in_order(table, sort, descending):
    rows, after = [], ""
    while True:
        page = table.page(sort, descending, only="all", after=after, most=5)
        rows += page.rows
        if not (after := page.next):
            break
    known = table.known
    values = {
        "latent": list(range(24)),
        "density": known.density.tolist(),
        "largest": known.tensors["largest"].tolist(),
        "mean": known.mean().nan_to_num(0.0).tolist(),
        "F1": [i / 10 if i < 8 else -1 for i in range(24)],
        "label": [f"{'' if i % 2 else NONE + ': '}word {i}" if i < 8 else "" for i in range(24)],
    }[sort]
    assert [r.latent for r in rows] == sorted(range(24), key=lambda i: (values[i], i), reverse=descending)
    assert page.total == 24


def test_filters_flags_and_labels(table):
    counts = table.known.count
    assert table.page(only="dead").total == int((counts == 0).sum()) > 0
    assert table.page(only="rare").total == int(((counts > 0) & (counts < 10)).sum())
    assert table.page(only="dense").total == int((table.known.density > 0.1).sum()) > 0
    assert [r.latent for r in table.page("latent", False, only="ruled").rows] == [1, 3, 5, 7]
    assert table.page(only="unruled").total == 20
    assert [r.latent for r in table.page(text="WORD 3").rows] == [3]
    table.store.meta.put([Label("some", 3, "human", "mine")])
    row = table.row(3)
    assert (row.label, row.source) == ("mine", "human")
    top = table.known.tensors["top.place"][3]
    ids = table.store.column("ids").flatten()[top[top >= 0]]
    assert row.peak == table.store.vocabulary(int(ids.max()) + 1)[int(ids.mode().values)]


@pytest.mark.parametrize("after", ["[1", "[]", '[null, "x"]', json.dumps({"a": 1}), f"[1, {10**30}]"])
def test_what_is_no_cursor_column_or_latent_is_refused(table, after):
    with pytest.raises(Refused):
        table.page(after=after)
    for wrong in (lambda: table.page("nothing"), lambda: table.page(only="nothing"), lambda: table.row(99)):
        with pytest.raises(Refused):
            wrong()


@pytest.mark.parametrize("name", ["some", "few"])
def test_a_text_is_read_as_by_hand(name):
    d, text = dictionaries()[name], "Mary went to London"
    found = read_text(model(), d, text)
    acts = model().capture(text, [*d.reads, *d.writes])
    flat = {s: acts[s].flatten(0, 1) for s in {*d.reads, *d.writes}}
    code = d.encode({s: flat[s] for s in d.reads}).dense()
    torch.testing.assert_close(found.code.dense(), code)
    (site,) = d.writes
    gap = flat[site] - (code @ d.decoder[0][site] + d.b_dec[site])
    torch.testing.assert_close(found.error, gap.square().sum(1) / (flat[site] - d.b_dec[site]).square().sum(1))
    assert "".join(found.words).count("London") == 1
