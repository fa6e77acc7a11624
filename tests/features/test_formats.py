"""Bulk exports for Neuronpedia: every key, the same back, and equal to activations by hand; SAEDashboard's batches."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.features import FeatureStore
from cutaway.features.formats.neuronpedia import (
    SCHEMA,
    Export,
    Writer,
    check_row,
    read_neuronpedia,
    write_neuronpedia,
)
from cutaway.features.formats.saedashboard import write_saedashboard
from cutaway.features.store.meta import Label
from tests.features.common import brute, dictionaries, found, model

EXPORT = Export("random-llama", "some-24", created="2026-01-01T00:00:00Z")


@pytest.fixture(scope="module")
def copy(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "store"
    shutil.copytree(store.folder, folder)
    own = FeatureStore(folder)
    own.meta.put([Label("some", 3, "rule", "after “ the”", {"F1": 0.5})])
    return own


@pytest.fixture(scope="module")
def tree(copy, tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    return write_neuronpedia(copy, out, EXPORT, model(), dictionaries()["some"], dictionary="some")


def test_an_export_comes_back_as_it_was_written(copy, tree):
    back = read_neuronpedia(tree)
    assert tree.name == "1-some-24"
    writer = Writer(copy, copy.latents("some"), EXPORT, model(), dictionaries()["some"])
    with torch.no_grad():
        rows = writer.batch(range(24))
    for kind, own in rows.items():
        assert back.rows[kind] == json.loads(json.dumps(own)), kind
    for kind, row in writer.whole().items():
        assert back.rows[kind] == [row]
    assert all(set(row) == set(SCHEMA[kind]) for kind, rows in back.rows.items() for row in rows)
    assert back.rows["explanations"][0]["description"] == "after “ the”"


def test_pages_are_those_of_the_activations(copy, tree):
    back, code = read_neuronpedia(tree), found(brute().codes["some"], copy)
    known, d = copy.latents("some"), dictionaries()["some"]
    logits = d.decoder[0]["resid_post.1"] @ (model().hf.lm_head.weight * model().hf.model.norm.weight).T
    for i in (0, 11, 23):
        row, column = back.feature(i), code[..., i]
        assert row["hookName"] == "blocks.1.hook_resid_post"
        assert row["frac_nonzero"] == pytest.approx(float((column != 0).sum()) / copy.counted)
        assert row["maxActApprox"] == pytest.approx(float(column.max()), rel=1e-5, abs=1e-5)
        assert sum(row["freq_hist_data_bar_heights"]) == int((column != 0).sum())
        assert row["vector"] == pytest.approx(d.decoder[0]["resid_post.1"][i].tolist())
        assert row["pos_values"] == pytest.approx(logits[i].topk(10).values.tolist(), abs=1e-4)
        assert row["neg_values"] == pytest.approx(logits[i].topk(10, largest=False).values.tolist(), abs=1e-4)
        assert sum(row["logits_hist_data_bar_heights"]) == logits.shape[1]
        active = (code.flatten(0, 1) != 0).double()
        for j, phi in zip(row["correlated_features_indices"], row["correlated_features_pearson"], strict=True):
            counted = copy.column("flags").flatten() & 1 > 0
            pair = active[counted][:, [i, j]].T
            assert phi == pytest.approx(float(torch.corrcoef(pair)[0, 1]), abs=1e-6)
        examples = [*known.top(i), *known.sampled(i)] if i != 23 else []
        assert len(back.activations(i)) == len(examples)
        for page, e in zip(back.activations(i), examples, strict=True):
            at = page["qualifyingTokenIndex"]
            first = e.position - at
            context = code[e.context, first : first + len(page["values"]), i]
            torch.testing.assert_close(torch.tensor(page["values"]), context, rtol=2e-3, atol=1e-6)
            assert page["values"][at] == pytest.approx(float(code[e.context, e.position, i]), rel=1e-5, abs=1e-5)
            ids = copy.context(e.context)["ids"][first : first + len(page["values"])]
            assert page["tokens"] == model().text.token_texts(ids)
            assert page["maxValue"] == max(page["values"]) == page["values"][page["maxValueTokenIndex"]]
            if e.octave is None:
                assert (page["binMin"], page["binMax"]) == (-1, -1)
            else:
                assert page["binMin"] <= page["values"][at] < page["binMax"]
                assert 0 < page["binContains"] <= 1


def test_saedashboard_batches_have_the_same_pages(copy, tree, tmp_path):
    folder = write_saedashboard(copy, tmp_path / "sd", EXPORT, model(), dictionaries()["some"], dictionary="some")
    batch = json.loads((folder / "batch-0.json").read_text("utf-8"))
    assert (batch["model_id"], batch["layer"], batch["sae_id_suffix"]) == ("random-llama", 1, "some-24")
    back = read_neuronpedia(tree)
    for row in batch["features"]:
        theirs = back.feature(row["feature_index"])
        assert row["pos_str"] == theirs["pos_str"]
        examples = back.activations(row["feature_index"])
        assert [e["values"] for e in row["activations"]] == [e["values"] for e in examples]
        assert [e["bin_min"] for e in row["activations"]] == [e["binMin"] for e in examples]


def test_what_does_not_keep_to_the_schema_is_refused(copy, tree, tmp_path):
    row = read_neuronpedia(tree).feature(3)
    for wrong, why in (
        ({n: v for n, v in row.items() if n != "neg_str"}, "lacks 'neg_str'"),
        (row | {"more": 1}, "has 'more'"),
        (row | {"vector": "x"}, "'vector' is"),
        (row | {"maxActApprox": True}, "'maxActApprox' is"),
        ([], "not an object"),
    ):
        with pytest.raises(Refused, match=why):
            check_row("features", wrong, "a row")
    shutil.copytree(tree, tmp_path / "bad")
    file = tmp_path / "bad" / "features" / "batch-0.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"index": "0"}\n'))
    with pytest.raises(Refused, match="line 1 of batch-0"):
        read_neuronpedia(tmp_path / "bad")
    file.write_bytes(b"no gzip")
    with pytest.raises(Refused, match="cannot be read"):
        read_neuronpedia(tmp_path / "bad")
    with pytest.raises(Refused, match="not empty"):
        write_neuronpedia(copy, tree.parents[1], EXPORT, model(), dictionaries()["some"], dictionary="some")
    with pytest.raises(Refused, match="this one"):
        write_neuronpedia(copy, tmp_path / "x", EXPORT, model(), dictionaries()["few"], dictionary="some")
