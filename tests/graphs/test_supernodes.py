"""Supernodes: features split in two are found again, effects are those of edits by hand, and files that do not fit are
refused.
"""

import json
from dataclasses import replace

import pytest
import torch

import cutaway as ca
from cutaway.core.node import parse_node
from cutaway.graphs import Neurons, Supernodes, read_supernodes
from cutaway.graphs.validate import along_all_paths
from cutaway.views.html import html
from tests.graphs.made import IDS, model, transcoders

PROMPTS = ca.tasks.as_prompts(IDS)
GIVEN = {"targets": ("logit.17-40",), "leading": 1}


def traced(kind="plain"):
    units = Neurons() if kind == "neurons" else transcoders("llama_gqa", kind)
    return units, ca.graphs.trace(model("llama_gqa"), PROMPTS, units, samples=2, **GIVEN)


def measured(tmp_path, units, groups, **options):
    file = Supernodes({name: tuple(nodes) for name, nodes in groups.items()}).save(tmp_path / "groups.json")
    return ca.graphs.supernodes(
        model("llama_gqa"), PROMPTS, units, groups=str(file), **GIVEN, **{"samples": 3} | options
    )


def largest(whole, n):
    """The units of the largest influence."""
    order = torch.where(whole.kinds["unit"], whole.influence, -1.0).argsort(descending=True)[:n]
    return [whole.labels["node"][i] for i in order.tolist()]


def split_in_two(d):
    """The same dictionary with each latent there twice, which write halves."""

    def twice(rows):
        return tuple({s: torch.cat([w, w]) for s, w in part.items()} for part in rows)

    halves = tuple({s: w / 2 for s, w in part.items()} for part in twice(d.decoder))
    blocks = tuple(replace(b, n_latents=2 * b.n_latents) for b in d.blocks)
    return replace(
        d, blocks=blocks, encoder=twice(d.encoder), decoder=halves, b_enc=tuple(torch.cat([b, b]) for b in d.b_enc)
    )


def test_features_split_in_two_are_suggested_as_one():
    d = split_in_two(transcoders("llama_gqa", "plain"))
    found = ca.graphs.supernodes(model("llama_gqa"), PROMPTS, d, similarity=0.95, share=1.0, samples=2, **GIVEN)
    assert len(found.supernodes.groups) > 10
    for members in found.supernodes.groups.values():
        one, other = sorted(map(parse_node, members))
        assert (one.block, one.index + 12, one.position) == (other.block, other.index, other.position)


@pytest.mark.parametrize("kind", ["plain", "neurons"])
def test_effects_are_what_edits_by_hand_change_and_of_one_unit_those_of_validate(kind, tmp_path):
    (units, whole), m = traced(kind), model("llama_gqa")
    several = largest(whole, 3)
    one, three = (measured(tmp_path, units, {"some": nodes}) for nodes in (several[:1], several))
    alone = ca.graphs.validate(m, PROMPTS, units, top=1, samples=2, **GIVEN)
    assert float(one.effect[0]) == pytest.approx(float(alone.effect[0]), rel=1e-4)
    edits = []
    for node in map(parse_node, several):
        if kind == "neurons":
            edits.append(ca.edits.Ablate(node))
            continue
        act = whole.activation[whole.labels["node"].index(str(node))]
        step = act * units.decoder[node.block][f"mlp_out.{node.block}"][node.index]
        edits.append(ca.edits.Add(f"mlp_out.{node.block}@{node.position}", -step))
    plain, cut = (m.capture(IDS, "logits", e)["logits"][0, -1] for e in ((), edits))
    lost = float((plain - cut)[17] - (plain - cut)[40])
    assert float(three.effect[0]) == pytest.approx(lost, rel=1e-3, abs=1e-5)


def test_the_prediction_counts_each_member_once(tmp_path):
    units, whole = traced("cross-layer")
    members = [n for n in whole.labels["node"] if n.startswith("latent") and n.endswith("@5")][::2]  # of every layer
    found = measured(tmp_path, units, {"some": members})
    n, inside = len(whole.influence), whole.mask(members)
    step = torch.zeros(n, n, dtype=torch.float64)  # how far each unit follows each source, in shares of its value
    rows = whole.node_of[whole.share == 0]
    step[rows] = whole.weight[whole.share == 0] / whole.value[whole.share == 0, None]
    step[inside] = 0.0
    gone = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - step, inside.double())
    wanted = float(whole.weight[-1] @ gone)
    assert float(found.predicted[0]) == pytest.approx(wanted, rel=1e-5)
    assert float(along_all_paths(whole)[inside].sum()) != pytest.approx(wanted, rel=1e-5)


def test_random_groups_are_as_large_and_of_the_same_layers_and_positions(tmp_path):
    units, whole = traced()
    cell = [n for n in map(parse_node, whole.labels["node"]) if str(n).startswith("latent.1.") and n.position == 5]
    names = [str(n) for n in cell]
    every, one = (measured(tmp_path, units, {"some": nodes}, samples=30) for nodes in (names, names[:1]))
    assert torch.allclose(every.effect_null, every.effect.expand(1, 30), atol=1e-5), "all of a layer are a control"
    each = measured(tmp_path, units, {n: [n] for n in names}, samples=1).effect
    assert all(bool((x - each).abs().min() < 1e-5) for x in one.effect_null[0])


def test_of_several_prompts_each_has_its_effect_and_units_that_are_active_there(tmp_path):
    m, d = ca.load("miniworld"), ca.dictionaries.load("miniworld/transcoders")
    said = [f"The capital of {c} is" for c in ("Norway", "Japan", "France")]
    first = ca.graphs.supernodes(m, said[0], d, samples=2)
    file = str(first.supernodes.save(tmp_path / "a.json"))
    together = ca.graphs.supernodes(m, [*said, "In Norway, the capital is"], d, groups=file, samples=2)
    with pytest.raises(ca.Refused, match="another graph"):
        ca.graphs.supernodes(m, said[1], d, groups=file)
    assert "the 3 of its length among 4" in together.record["split"]
    assert bool((together.interval[:, 0] <= together.effect).all() & (together.effect <= together.interval[:, 1]).all())
    assert first.interval.isnan().all()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda data: data.update(version=2), "version that is known"),
        (lambda data: data["supernodes"][0].update(nodes=[]), "has no nodes"),
        (lambda data: data["supernodes"].append(data["supernodes"][0]), "there twice"),
        (lambda data: data["supernodes"][0]["nodes"].append("latent.0.999@3"), "no node of the graph"),
        (lambda data: data["supernodes"][0]["nodes"].append("embed@3"), "no unit"),
        (lambda data: data["supernodes"].append({**data["supernodes"][0], "name": "other"}), "in 'pair' and in"),
        (lambda data: data["graph"].update(ids=[1, 2]), "another graph"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(change, word, tmp_path):
    whole = traced()[1]
    file = Supernodes({"pair": tuple(largest(whole, 2))}, {"ids": list(whole.ids)}).save(tmp_path / "a.json")
    assert read_supernodes(file).groups == {"pair": tuple(largest(whole, 2))}
    data = json.loads(file.read_text("utf-8"))
    change(data)
    file.write_text(json.dumps(data), "utf-8")
    with pytest.raises(ca.Refused, match=word):
        ca.graphs.prune(whole, supernodes=read_supernodes(file))


def test_units_that_are_not_alike_are_no_supernode():
    found = ca.graphs.supernodes(model("llama_gqa"), PROMPTS, transcoders("llama_gqa"), similarity=1.0, **GIVEN)
    assert not found.supernodes.groups
    assert "supernode" in html(found)
    with pytest.raises(ca.Refused, match="0 to 1"):
        ca.graphs.supernodes(model("llama_gqa"), PROMPTS, transcoders("llama_gqa"), similarity=1.5, **GIVEN)


def test_supernodes_are_drawn_exported_and_read_again(tmp_path):
    whole = traced()[1]
    few = Supernodes({"<one>": tuple(largest(whole, 3)), "two": tuple(largest(whole, 5)[3:])})
    small = ca.graphs.prune(whole, nodes=0.3, supernodes=few)
    named = dict(zip(small.labels["node"], small.groups, strict=True))
    assert {n: g for n, g in named.items() if g} == {n: g for g, nodes in few.groups.items() for n in nodes}
    drawn = html(small)
    assert "<title>&lt;one&gt;</title>" in drawn
    assert drawn.count("class=cw-group") >= 2
    small.plot()
    data = ca.graphs.graph_data(whole, small)
    assert [row[0] for row in data["qParams"]["supernodes"]] == list(dict.fromkeys(g for g in small.groups if g))
    back = ca.graphs.read_graph(ca.graphs.write_graph(tmp_path / "g.json", whole, small))
    assert back.groups == small.groups
    data["qParams"]["supernodes"].append(["three", data["qParams"]["supernodes"][0][1]])
    (tmp_path / "g.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(ca.Refused, match="in the supernodes"):
        ca.graphs.read_graph(tmp_path / "g.json")
