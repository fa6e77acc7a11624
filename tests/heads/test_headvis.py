"""HeadVis trees: metrics by their definitions, sequences from all over the range, a round trip, and damages refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cutaway as ca
from cutaway.cli import app
from cutaway.core.refuse import Refused
from cutaway.heads import card, headvis, read_headvis, write_headvis
from cutaway.models.edits.library import Replace
from cutaway.tasks import Repeats
from tests.conformance import subjects
from tests.heads.test_classify import ROWS, planted

#: what Neuronpedia's loader asks of config.json or of the pipeline_config in it
ASKED = ("model_name", "dataset_name", "n_sequences", "seq_len", "dtype", "attn_implementation")


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text("utf-8") for p in sorted(folder.rglob("*")) if p.is_file()}


def by_hand(patterns: list[tuple[list[int], torch.Tensor]]) -> dict[str, float]:
    """The metrics of a head, one query and key at a time."""
    own, before, entropy, far, square, back = ([] for _ in range(6))
    for ids, a in patterns:
        for q in range(len(ids)):
            row = [float(x) for x in a[q, : q + 1].double()]
            own.append(row[q])
            before += [row[q - 1]] if q else []
            entropy.append(-sum(x * math.log(x) for x in row if x > 0))
            far.append(sum(x * (q - k) for k, x in enumerate(row)))
            square.append(sum(x * (q - k) ** 2 for k, x in enumerate(row)))
            after = [k + 1 for k in range(q) if ids[k] == ids[q]]
            back += [sum(row[k] for k in after if row[k] >= 0.01)] if after else []
    mean = [sum(x) / len(x) for x in (own, before, entropy, far, square, back)]
    values = [*mean[:4], mean[4] - mean[3] ** 2, mean[5]]
    return dict(zip(headvis.METRICS, values, strict=True))


def test_metrics_and_patterns_are_those_of_the_definition(tmp_path):
    model, prompts = subjects.random_llama(), ca.tasks.as_prompts([*ROWS])
    tree = write_headvis(model, prompts, tmp_path / "tree", intervals=3, keys=4, threshold=0.02)
    patterns = [(ids, model.capture(torch.tensor([ids]), "pattern")["pattern"][:, 0]) for ids in ROWS]
    got = tree.metrics()
    for layer, head in tree.heads:
        mine = [(ids, a[layer, head]) for ids, a in patterns]
        assert got.value[:, layer, head].tolist() == pytest.approx(list(by_hand(mine).values()), abs=6e-5)
        samples = tree.samples(layer, head)
        strength = [float(a[1:, 1:].max()) for _, a in mine]
        assert [s.sequence for s in samples] == sorted(range(3), key=lambda i, x=strength: x[i])
        assert [s.interval for s in samples] == [1, 2, 3]
        for s in samples:
            ids, a = mine[s.sequence]
            assert s.strength == pytest.approx(strength[s.sequence], abs=6e-5)
            assert list(s.tokens) == model.text.token_texts(ids)
            fourth = a.sort(descending=True).values[:, 3:4]
            expected = torch.where((a >= fourth) & (a >= 0.02), a, 0.0)
            torch.testing.assert_close(s.pattern, expected, rtol=0, atol=6e-5)
    page = tree.page(1, 2)
    assert sum(page["histogram"]["bin_values"]) == 3
    assert sum(page["qk_distance_histogram"]["bin_values"]) == pytest.approx(
        sum(x["weight"] for x in page["top_key_tokens"]), abs=1e-2
    )
    hardest = card(model, prompts, head="1.2", contexts=3).looks[:, 3]  # the key of each sequence's hardest look
    assert sorted(hardest.tolist()) == pytest.approx([s.strength for s in tree.samples(1, 2)], abs=6e-5)


def test_known_heads_have_the_metrics_that_the_definitions_give(tmp_path):
    model, evidence = subjects.random_llama(), Repeats(5, 8)
    ids = evidence.bind(model).ids
    n = ids.shape[1]
    alike = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    edits = [Replace("pattern.0.0", alike.expand(5, -1, -1)), Replace("pattern.0.1", planted(ids, "previous token"))]
    with model.edited(*edits, Replace("pattern.1.3", planted(ids, "prefix matching"))):
        tree = write_headvis(model, evidence, tmp_path / "tree", heads=["0.0", "0.1", "1.3"])
    got = {at: dict(zip(headvis.METRICS, tree.metrics().value[:, *at].tolist(), strict=True)) for at in tree.heads}
    entropy = sum(math.log(i + 1) for i in range(n)) / n
    assert got[0, 0]["pattern_entropy"] == pytest.approx(entropy, abs=1e-4)
    assert got[0, 0]["qk_distance"] == pytest.approx((n - 1) / 4, abs=1e-4)
    assert got[0, 1]["prev_token_score"] == 1
    assert got[0, 1]["qk_distance_variance"] == pytest.approx(
        (n - 1) / n**2, abs=1e-4
    )  # the first query looks at itself
    assert got[1, 3]["induction_score"] == 1
    assert math.isnan(float(tree.metrics().value[0, 1, 0])), "a head that was left out"


def foreign() -> dict[str, Any]:
    """A tree as the published skeleton has it: other metrics, ten intervals, a cloud, empty histograms."""
    page = {
        "sequences": [
            {
                "sequence_id": 7, "interval": 10, "tokens": ["a", " b", " a"], "attention_indices": [0, 4, 7],
                "attention_values": [1.0, 0.5, 0.9], "seq_len": 3, "max_activation": 0.9, "note": "kept",
            }
        ],
        "qk_distance_histogram": {"bin_edges": [0, 1, 2], "bin_values": [3, 1]},
        "top_query_tokens": [{"token": "a", "weight": 0.34}], "top_key_tokens": [], "histogram": {}, "statistics": {},
    }  # fmt: skip
    config = {
        "model_name": "m", "heads": [[3, 5]], "n_layers": 4, "n_heads": 8, "n_intervals": 10,
        "metrics": ["induction_score", "logit_std"], "metric_descriptions": {"logit_std": "…"},
        "head_data_pattern": "L{layer}H{head}.json", "has_umap": True, "umap_heads": [[3, 5]], "custom_plots": [],
    }  # fmt: skip
    rows = [{"layer": 3, "head": 5, "induction_score": 0.42, "logit_std": None, "more": 1}]
    return {"config.json": config, "scatter_data.json": rows, "heads/L3H5.json": page}


def lay(folder: Path, tree: dict[str, Any]) -> Path:
    for name, data in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(data if isinstance(data, str) else json.dumps(data), "utf-8")
    return folder


def test_a_tree_survives_reading_and_writing_with_what_is_not_known(tmp_path):
    written = write_headvis(subjects.miniworld(), Repeats(12, 6), tmp_path / "one", heads=["1.*", "3.2"])
    assert set(files(written.folder)) == {
        "config.json", "scatter_data.json", "server_config.json", "attributions/manifest.json",
        *(f"heads/L{i}H{h}.json" for i, h in [(1, 0), (1, 1), (1, 2), (1, 3), (3, 2)]),
    }  # fmt: skip
    assert all((written.config | written.config["pipeline_config"]).get(name) is not None for name in ASKED)
    strongest = [s.strength for s in written.samples(3, 2) if s.interval == 10]
    assert strongest == sorted(strongest, reverse=True)
    for n, tree in enumerate((written, read_headvis(lay(tmp_path / "foreign", foreign())))):
        again = headvis.write_tree(
            tmp_path / f"again-{n}", tree.config, tree.rows, ((at, tree.page(*at)) for at in tree.heads)
        )
        before, after = files(tree.folder), files(again.folder)
        assert {name: json.loads(after[name]) for name in before} == {n: json.loads(t) for n, t in before.items()}
        assert n or before == after, "the same bytes"
        assert torch.equal(again.metrics().value.nan_to_num(-1), tree.metrics().value.nan_to_num(-1))
    sample = tree.samples(3, 5)[0]
    assert sample.pattern.tolist() == [pytest.approx(row) for row in ([1, 0, 0], [0, 0.5, 0], [0, 0.9, 0])]
    assert float(tree.metrics().value[0, 3, 5]) == pytest.approx(0.42)


def in_sequence(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tree: tree["heads/L3H5.json"]["sequences"][0].update(changes)


def in_config(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tree: tree["config.json"].update(changes)


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no config": (lambda t: t.pop("config.json"), "no config.json"),
    "no JSON": (lambda t: t.update({"scatter_data.json": "[{"}), "as JSON"),
    "no page": (lambda t: t.pop("heads/L3H5.json"), "missing"),
    "a list": (lambda t: t.update({"config.json": []}), "no object"),
    "no sizes": (in_config(n_layers="4"), "n_layers"),
    "a head beyond": (in_config(heads=[[4, 0]]), "no head of 4 layers"),
    "a head twice": (in_config(heads=[[3, 5], [3, 5]]), "twice"),
    "metrics": (in_config(metrics="induction_score"), "metrics"),
    "another folder": (in_config(head_data_pattern="../L{layer}H{head}.json"), "no file of a head"),
    "one name for all": (in_config(head_data_pattern="L{layer}.json"), "no file of a head"),
    "attributes": (in_config(head_data_pattern="{layer.real}{head}"), "no file of a head"),
    "a row of no head": (lambda t: t["scatter_data.json"].append({"layer": 9, "head": 0}), "no row of a head"),
    "two rows": (lambda t: t["scatter_data.json"].append({"layer": 3, "head": 5}), "two rows"),
    "a metric in words": (lambda t: t["scatter_data.json"][0].update(logit_std="high"), "no number"),
    "no sequences": (lambda t: t["heads/L3H5.json"].pop("sequences"), "no sequences"),
    "an index beyond": (in_sequence(attention_indices=[0, 4, 9]), "indices"),
    "an index twice": (in_sequence(attention_indices=[0, 4, 4]), "indices"),
    "fewer values": (in_sequence(attention_values=[1.0]), "3 indices with 1 values"),
    "no share": (in_sequence(attention_values=[1.0, 0.5, 9.0]), "shares"),
    "fewer tokens": (in_sequence(tokens=["a"]), "seq_len"),
    "interval 0": (in_sequence(interval=0), "1 to 10"),
    "strength": (in_sequence(max_activation="high"), "max_activation"),
    "edges": (lambda t: t["heads/L3H5.json"].update(histogram={"bin_edges": [0], "bin_values": [1]}), "histogram"),
    "a table": (lambda t: t["heads/L3H5.json"].update(top_key_tokens=[{"token": 3}]), "top_key_tokens"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tree_is_refused(damage, tmp_path):
    tree, (harm, why) = foreign(), DAMAGES[damage]
    harm(tree)
    lay(tmp_path, tree)
    with pytest.raises(Refused, match=why):
        read_headvis(tmp_path).samples(3, 5)


def test_what_cannot_be_written_is_refused(tmp_path):
    model = subjects.random_llama()
    (tmp_path / "note").write_text("mine")
    for given, why in (
        ({"folder": tmp_path}, "not empty"), ({"heads": ["9.0"]}, "9"), ({"intervals": 0}, "nothing"),
        ({"prompts": ca.tasks.as_prompts([[5]])}, "two tokens"),
    ):  # fmt: skip
        prompts, folder = given.pop("prompts", Repeats(2, 4)), given.pop("folder", tmp_path / "new")
        with pytest.raises(Refused, match=why):
            write_headvis(model, prompts, folder, **given)
    assert not (tmp_path / "new").exists()
    tree = read_headvis(lay(tmp_path / "foreign", foreign()))
    with pytest.raises(Refused, match="has heads 3"):
        tree.page(0, 0)


def test_the_commands_write_and_read(tmp_path, capsys):
    folder = tmp_path / "tree"
    line = ["heads", "write_headvis", "--out", str(folder), "--heads", "1.0", "--prompts", "Mary and John and Mary"]
    assert app.main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["heads"] == ["1.0"]
    assert app.main(["heads", "read_headvis", str(folder)]) == 0
    assert "induction_score" in capsys.readouterr().out.replace(" ", "_")
    (folder / "heads" / "L1H0.json").write_text("{}")
    assert app.main(["heads", "read_headvis", str(folder)]) == 2
    assert "no sequences" in capsys.readouterr().err
